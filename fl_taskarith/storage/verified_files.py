"""Files that can tell damage: the name carries a checksum of the content, or SHA256SUMS beside it does."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.files import make_folder, write_atomically

CHECKSUM_DIGITS = 32  # hexadecimal digits of SHA-256 that a verified file carries in its name
CHECKSUMS = "SHA256SUMS"  # in a finished run's folder, of its tables, as `sha256sum --check` reads it


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


def verified_name(stem: str, content: bytes) -> str:
    """Return the name under which `write_verified` writes `content`."""
    return f"{stem}-{_checksum(content)[:CHECKSUM_DIGITS]}.safetensors"


def read_verified(path: Path) -> bytes | None:
    """Return the content of a file that `write_verified` wrote; None if it is missing or not what its name says."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if path.stem.endswith(f"-{_checksum(content)[:CHECKSUM_DIGITS]}") else None


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS in `folder`: of each file of `names` that is there, for `check_unchanged`.

    Raises:
        CheckpointError: it cannot be written, or a file cannot be read.
    """
    try:
        contents = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    except OSError as error:
        raise CheckpointError(f"Cannot read {folder} back: {error}.") from error
    write_atomically(
        folder / CHECKSUMS, "".join(f"{_checksum(content)}  {name}\n" for name, content in contents.items())
    )


def check_unchanged(path: Path, content: bytes) -> None:
    """Check that `content`, read from `path`, is what SHA256SUMS beside it says, if that names the file.

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
    if recorded and recorded != [_checksum(content)]:
        raise CheckpointError(
            f"{path} has changed since its run ended ({CHECKSUMS} beside it has another checksum): it is damaged, or "
            f"was edited. Restore it or run again; if the change was meant, delete {CHECKSUMS}."
        )


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
