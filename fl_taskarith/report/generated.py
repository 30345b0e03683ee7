"""A folder of generated files beside a user's own: only what is still as it was generated is ever replaced."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.storage.files import make_folder, write_atomically

MANIFEST = ".generated.json"  # {name: SHA-256 of what was written under it, or two of them while it is being replaced}
FOLDERS = ("tables", "figures")  # where what is not generated any more is removed

log = logging.getLogger("fl_taskarith")

Digests = dict[str, list[str]]


def check_replaceable(folder: Path, files: Mapping[str, bytes]) -> None:
    """That every file of `files` (names relative to `folder`) is missing there, or as it was generated or would be.

    Raises:
        ConfigError: a user wrote or changed one; names all such.
        CheckpointError: the folder or its manifest cannot be read.
    """
    known = _read_manifest(folder)
    kept = [name for name, content in files.items() if not _replaceable(folder / name, content, known.get(name, []))]
    if kept:
        raise ConfigError(
            f"In {folder} these files were changed since they were generated, or are not of this command's making: "
            f"{', '.join(kept)}. Nothing was written. To keep your version, rename it and name it so in main.tex (your "
            "references belong in own.bib); else delete it, and it is generated again. Or give another --output."
        )


def write_generated(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, and remove what was generated into `FOLDERS` before, is not among them, and was not changed since.

    Raises:
        ConfigError: as `check_replaceable`.
        CheckpointError: a file cannot be written, or the folder or its manifest cannot be read.
    """
    check_replaceable(folder, files)
    _write(folder, files)
    known = _read_manifest(folder)
    stale = [name for name in known if name not in files and Path(name).parts[:-1] in [(each,) for each in FOLDERS]]
    for name in stale:
        if _digest_of(folder / name) in known.pop(name):
            _remove(folder / name)
    _write_manifest(folder, known)


def write_unless_there(folder: Path, name: str, content: bytes) -> bool:
    """Write a file that is the user's from then on; whether it was written, since there was none of this name.

    Raises:
        CheckpointError: it cannot be written.
    """
    if _there(folder / name):
        return False
    _write(folder, {name: content})
    return True


def write_product(folder: Path, name: str, content: bytes) -> None:
    """Write what is made of the other files; a file of this name that is not of our making is renamed, NAME-1, NAME-2.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / name
    if not _replaceable(path, content, _read_manifest(folder).get(name, [])):
        numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, 10**6))
        aside = next(each for each in numbered if not _there(each))
        try:
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"Cannot rename {path} to {aside}: {error.strerror}. It is kept.") from error
        log.warning("%s was not made by this command, or was changed since: it is kept as %s.", path, aside.name)
    _write(folder, {name: content})


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    known = _read_manifest(folder)
    now = {name: _digest(content) for name, content in files.items()}
    make_folder(folder)
    # A command that is killed here has left some files as they were and some anew: both are of its making.
    _write_manifest(folder, known | {name: [*known.get(name, []), digest] for name, digest in now.items()})
    for name, content in files.items():
        make_folder((folder / name).parent)
        if _digest_of(folder / name) != now[name]:
            write_atomically(folder / name, content)
    _write_manifest(folder, known | {name: [digest] for name, digest in now.items()})


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise CheckpointError(
            f"Cannot remove {path}, which is not of the results any more: {error.strerror}."
        ) from error


def _replaceable(path: Path, content: bytes, known: Sequence[str]) -> bool:
    return not _there(path) or _digest_of(path) in (*known, _digest(content))


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _digest_of(path: Path) -> str:
    """Of a file's content; empty where there is none."""
    try:
        return _digest(path.read_bytes()) if path.is_file() else ""
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_manifest(folder: Path) -> Digests:
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): [str(digest) for digest in digests] for name, digests in record.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path} ({error}), which tells what of the folder was generated: restore it, or give another "
            "--output."
        ) from error


def _write_manifest(folder: Path, digests: Mapping[str, Sequence[str]]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(dict(sorted(digests.items())), indent=1) + "\n")
