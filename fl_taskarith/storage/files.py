"""Files that are the old one or the new one, whatever happens while they are written, and that can tell damage.

A file that is being written is a temporary neighbour, `.NAME.PID-XXXXXXXX.fl-taskarith.tmp`, locked by its process. A
process that is killed leaves it behind; whoever writes to the folder next finds it without a lock and removes it.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import IO, BinaryIO

from fl_taskarith.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

CHECKSUM_DIGITS = 32  # hexadecimal digits of SHA-256 that a verified file carries in its name
CHECKSUMS = "SHA256SUMS"  # in a finished run's folder, of its tables, as `sha256sum --check` reads it
A_DAY = 86_400.0  # seconds

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.fl-taskarith\.tmp")
_NAME_BYTES = 150  # of a file's name that its temporary neighbour repeats; file systems allow 255 in all
_SCRATCH, _MARKER = "fl-taskarith-", ".in-use"  # beginning of a scratch folder's name, and the locked file in it
_LOCKED = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)  # what flock says where another process has the lock

log = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to a temporary neighbour, flush it to the disk, and rename it over `path`.

    Raises:
        CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with replacement(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"Cannot write {path}: {reason}. What was there before is kept.") from error


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; it takes the place of `path` when the block ends well.

    When the block raises, Ctrl-C included, the neighbour is removed and `path` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    _remove_leftovers_once(path.parent)
    file, temporary = _open_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            if fcntl is not None:  # under its lock, so that nobody takes it for a leftover
                os.replace(temporary, path)
        if fcntl is None:  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` whose processes were killed while they wrote them.

    Those that a process still writes stay, on whichever machine it runs, and so do all files of other programs. Where
    files cannot be locked, only one that nobody wrote to for a day counts as left behind.
    """
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry) for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):  # gone by now, or of another user
            _remove_if_abandoned(path)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder among the system's temporary files, and remove it with all it holds when the block ends.

    Those of processes that were killed are removed first.
    """
    for marker in Path(gettempdir()).glob(f"{_SCRATCH}*/{_MARKER}"):
        with contextlib.suppress(OSError):
            _remove_if_abandoned(marker)
            if not marker.exists():
                shutil.rmtree(marker.parent, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as name:
        folder = Path(name)
        begun = folder / (_MARKER if fcntl is None else f"{_MARKER}.new")
        with open(begun, "wb") as marker_file:
            if hold(marker_file) is not None:  # under its name only once it is locked
                os.replace(begun, folder / _MARKER)
            yield folder


def hold(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed: True if it is locked now, False if another process has locked it.

    None where files cannot be locked so: on Windows, and on some network and FUSE file systems.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _LOCKED else None
    return True


@lru_cache
def can_lock(folder: Path) -> bool:
    """Whether files in `folder` can be locked.

    Raises:
        OSError: no file can be made there.
    """
    with TemporaryFile(dir=folder) as file:
        return fcntl is None or hold(file) is not None


def write_verified(folder: Path, stem: str, content: bytes) -> Path:
    """Write `content` atomically to folder/STEM-CHECKSUM.safetensors; makes `folder`.

    The name carries the checksum, so no index can disagree with the file, and equal content has an equal name.

    Raises:
        CheckpointError: it cannot be written; names the path.
    """
    path = folder / verified_name(stem, content)
    make_folder(folder)
    write_atomically(path, content)
    return path


def version_of(path: Path) -> tuple[int, int]:
    """Changes when the file is replaced or edited: its time of modification in ns, and its size."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are missing.

    Raises:
        CheckpointError: it cannot be made; names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the folder {folder}: {error.strerror}. Name another, or see to this one."
        ) from error


def require_new(paths: Iterable[Path], overwrite: bool = False) -> None:
    """That nothing is at `paths`, which a command is about to write, or that --overwrite lets it replace files there.

    Raises:
        ConfigError: something is there; names it.
    """
    there = [path for path in paths if os.path.lexists(path)]
    if folders := [path for path in there if path.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder, where a file is to be written: give another --output.")
    if there and not overwrite:
        names = ", ".join(map(str, there))
        raise ConfigError(f"Already there: {names}. Give another --output, or --overwrite to replace what is there.")


def verified_name(stem: str, content: bytes) -> str:
    """The name under which `write_verified` writes `content`."""
    return f"{stem}-{_checksum(content)}.safetensors"


def read_verified(path: Path) -> bytes | None:
    """The content of a file that `write_verified` wrote, or None if it is missing or not what its name says."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if path.stem.endswith(f"-{_checksum(content)}") else None


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS in `folder`: of each file of `names` that is there, for `check_unchanged`.

    Raises:
        CheckpointError: it cannot be written, or a file cannot be read.
    """
    try:
        contents = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    except OSError as error:
        raise CheckpointError(f"Cannot read {folder} back: {error}.") from error
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()]
    write_atomically(folder / CHECKSUMS, "".join(lines))


def check_unchanged(path: Path, content: bytes) -> None:
    """That `content`, read from `path`, is what SHA256SUMS beside it says; true of a file that it does not name.

    Raises:
        CheckpointError: it is not.
    """
    try:
        lines = (path.parent / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Cannot read {path.parent / CHECKSUMS}: {error}.") from error
    recorded = [line.partition("  ")[0] for line in lines if line.partition("  ")[2] == path.name]
    if recorded and recorded != [hashlib.sha256(content).hexdigest()]:
        raise CheckpointError(
            f"{path} has changed since its run ended ({CHECKSUMS} beside it has another checksum): it is damaged, or "
            f"was edited. Restore it or run again; if the change was meant, delete {CHECKSUMS}."
        )


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:CHECKSUM_DIGITS]


def _open_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary neighbour of `path`, open for writing and locked where that is possible, and its path."""
    name = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    while True:
        temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.fl-taskarith.tmp")
        file = open(temporary, "xb")
        if hold(file) is not False and temporary.exists():
            return file, temporary
        file.close()  # another process saw it before it was locked, and removed it


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file unless its process may live.

    Raises:
        OSError: it is gone, or may not be opened or removed.
    """
    quiet = time.time() - path.lstat().st_mtime > A_DAY
    if fcntl is None:
        if quiet:
            path.unlink()  # an error where it is open
        return
    with open(path, "r+b") as file:
        locked = hold(file)
        if locked or (locked is None and quiet):
            size = os.fstat(file.fileno()).st_size
            path.unlink()  # under the lock: its process may be between opening it and locking it
            log.info("Removed %s (%.1f MB), which a killed process left behind.", path, size / 1e6)


@lru_cache(maxsize=4096)
def _remove_leftovers_once(folder: Path) -> None:
    remove_leftovers(folder)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system lets folders be flushed (Windows and some mounts do not)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
