"""Files that are the old one or the new one, whatever happens while they are written, and that can tell damage."""

import contextlib
import hashlib
import os
from pathlib import Path

from fl_taskarith.errors import CheckpointError

CHECKSUM_DIGITS = 32  # hexadecimal digits of SHA-256 that a verified file carries in its name


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    write_atomically(path, content)
    return path


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
