"""Files that can tell damage: the name carries a checksum of the content, or SHA256SUMS beside it does."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.record_files import read_content

CHECKSUM_DIGITS = 32  # hexadecimal digits of SHA-256 that a verified file carries in its name
CHECKSUMS = "SHA256SUMS"  # in a finished run's folder, of what it left, as `sha256sum --check` reads it
ALWAYS = ("rounds.csv", "run.json")  # what it lists of every run, last: what is cut off from it is among them
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


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
    """Write SHA256SUMS in `folder`: of each file of `names` that is there, in this order.

    Raises:
        CheckpointError: it cannot be written, or a file cannot be read.
    """
    try:
        sums = {name: checksum_of_file(folder / name) for name in names if (folder / name).exists()}
    except OSError as error:
        raise CheckpointError(f"Cannot read {folder} back: {error}.") from error
    write_atomically(folder / CHECKSUMS, "".join(f"{checksum}  {name}\n" for name, checksum in sums.items()))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return what SHA256SUMS in `folder` says of each file; {} without one, as in a run that is not finished.

    Raises:
        CheckpointError: it is damaged, or does not list what every finished run has.
    """
    path = folder / CHECKSUMS
    remedy = f"Restore it, or run again; if the files of {folder} are as they should be, delete {CHECKSUMS}."
    content = read_content(path, remedy, optional=True)
    if content is None:
        return {}
    lines = [_LINE.fullmatch(line) for line in content.decode(errors="replace").split("\n")[:-1]]
    sums = {line[2]: line[1] for line in lines if line is not None}
    absent = [name for name in ALWAYS if name not in sums]
    if absent or len(sums) < len(lines) or not content.endswith(b"\n"):
        raise CheckpointError(
            f"{path} is damaged: it does not list {' and '.join(absent)}. {remedy}"
            if absent
            else f"{path} has a damaged line. {remedy}"
        )
    return sums


def check_unchanged(path: Path, content: bytes) -> None:
    """Check that `content`, read from `path`, is what SHA256SUMS beside it says, if there is one.

    Raises:
        CheckpointError: it is not, or SHA256SUMS does not list it.
    """
    sums = read_checksums(path.parent)
    if sums and sums.get(path.name) != _checksum(content):
        said = "has another checksum" if path.name in sums else "does not list it"
        raise CheckpointError(
            f"{path} has changed since its run ended ({CHECKSUMS} beside it {said}): it is damaged, or was edited. "
            f"Restore it or run again; if the change was meant, delete {CHECKSUMS}."
        )


def checksum_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
