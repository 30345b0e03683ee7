"""Files that are either the old one or the new one, whatever happens while they are written."""

import os
from pathlib import Path

from fl_taskarith.errors import CheckpointError


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


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and does without."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
