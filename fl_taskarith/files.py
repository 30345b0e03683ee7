"""Files that are the old one or the new one, whatever happens while they are written, and that can tell damage."""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from fl_taskarith.errors import CheckpointError, ConfigError

CHECKSUM_DIGITS = 32  # hexadecimal digits of SHA-256 that a verified file carries in its name
CHECKSUMS = "SHA256SUMS"  # in a finished run's folder, of its tables, as `sha256sum --check` reads it


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to a temporary neighbour, flush it to the disk, and rename it over `path`.

    Raises:
        CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise CheckpointError(f"Cannot write {path}: {reason}. What was there before is kept.") from error


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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system lets folders be flushed (Windows and some mounts do not)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
