"""Files that are the old one or the new one, whatever happens while they are written.

A file that is being written is a temporary neighbour, `.NAME.PID-XXXXXXXX.fl-taskarith.tmp`, owned by its process. A
process that is killed leaves it behind; whoever writes to the folder next finds it without an owner and removes it.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import BinaryIO

from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.storage.locks import owned, remove_if_abandoned

_TEMPORARY = re.compile(r"(\..+\.\d+-[0-9a-f]{8}\.fl-taskarith\.tmp)(?:\.lock)?")
_SCRATCH = re.compile(r"(fl-taskarith-\d+-[0-9a-f]{8})(?:\.lock)?")
_PART_LENGTH = 100  # characters of a file's name that are made of words
_NAME_BYTES = 150  # of a file's name that its temporary neighbour repeats; file systems allow 255 in all


def write_atomically(path: Path, content: bytes | str | Iterator[bytes | memoryview]) -> None:
    """Write `content`, whole or piece by piece, to a temporary neighbour, flush it, and rename it over `path`.

    Raises:
        CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with replacement(path) as file:
            file.writelines([data] if isinstance(data, bytes) else data)
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
    name = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.fl-taskarith.tmp")
    with owned(temporary):
        try:
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # make the rename durable; Windows and some mounts flush no folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove the temporary files in `folder`, or in it and all `below` it, whose processes were killed meanwhile.

    Those that a process still writes stay, on whichever machine it runs, and so do all files of other programs.
    """
    for here, _, names in os.walk(folder):
        _remove_abandoned(Path(here), _TEMPORARY, names)
        if not below:
            break


def _remove_abandoned(folder: Path, pattern: re.Pattern[str], names: Iterable[str]) -> None:
    """Remove what is named by `pattern`, a lock without its file among it, unless a process owns it."""
    for name in {found[1] for name in names if (found := pattern.fullmatch(name))}:
        with contextlib.suppress(OSError):  # gone by now, or of another user
            remove_if_abandoned(folder / name)


@lru_cache(maxsize=4096)
def _remove_leftovers_once(folder: Path) -> None:
    remove_leftovers(folder)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder among the system's temporary files, and remove it with all it holds when the block ends.

    Those of processes that were killed are removed first.
    """
    with contextlib.suppress(OSError):
        _remove_abandoned(Path(gettempdir()), _SCRATCH, [path.name for path in Path(gettempdir()).iterdir()])
    folder = Path(gettempdir()) / f"fl-taskarith-{os.getpid()}-{secrets.token_hex(4)}"
    with owned(folder):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, where they are missing, to write in it.

    Raises:
        CheckpointError: it cannot be made, or nothing can be written in it; names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "nothing can be written in it")
    except OSError as error:
        raise CheckpointError(
            f"Cannot make the folder {folder}: {error.strerror}. Name another, or see to this one."
        ) from error


def require_writable(folder: Path) -> None:
    """Check that `folder`, or what of it is missing, can be made and written to, without making it.

    Raises:
        CheckpointError: it cannot; names it.
    """
    above = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    effective = os.access in os.supports_effective_ids
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK, effective_ids=effective):
        reason = "may not be written to" if above.is_dir() else "is no folder"
        raise CheckpointError(f"Cannot make the folder {folder}: {above} {reason}. Name another, or see to this one.")


def require_new(paths: Iterable[Path], overwrite: bool = False) -> None:
    """Check that nothing is at `paths`, which a command is about to write, or that --overwrite lets it replace files.

    Raises:
        ConfigError: something is there; names it.
    """
    there = [path for path in paths if os.path.lexists(path)]
    if folders := [path for path in there if path.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder, where a file is to be written: give another --output.")
    if there and not overwrite:
        names = ", ".join(map(str, there))
        raise ConfigError(f"Already there: {names}. Give another --output, or --overwrite to replace what is there.")


def file_names(words: Iterable[str]) -> dict[str, str]:
    """Return of each of `words` a part of a file's name, lower case, with "-" for what a name should not hold.

    No two are alike: where that would be so, or nothing is left, digits of a checksum of the words follow.
    """
    plain = {each: re.sub(r"[^a-z0-9.]+", "-", each.lower()).strip("-.")[:_PART_LENGTH] for each in words}
    counts = Counter(plain.values())
    return {
        each: name
        if name and counts[name] == 1
        else f"{name}-{hashlib.sha256(each.encode()).hexdigest()[:8]}".strip("-")
        for each, name in plain.items()
    }


def version_of(path: Path) -> tuple[int, int]:
    """Return what changes when the file is replaced or edited: its time of modification in ns, and its size."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
