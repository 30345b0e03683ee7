"""A folder of generated files beside a user's own: only what is still as it was generated is ever replaced."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.storage.files import make_folder, remove_leftovers, write_atomically
from fl_taskarith.storage.record_files import read_json

MANIFEST = ".generated.json"  # {name: SHA-256 of what was written under it, or two of them while it is being replaced}
FOLDERS = (Path("tables"), Path("figures"))  # where what is not generated any more is removed

log = logging.getLogger("fl_taskarith")


def write_generated(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (names relative to `folder`), and remove unchanged files of `FOLDERS` that are generated no more.

    Raises:
        ConfigError: a user wrote or changed one of the files; names all such, and nothing is written.
        CheckpointError: a file cannot be written, or the folder or its manifest cannot be read.
    """
    remove_leftovers(folder, below=True)
    known = _read_manifest(folder)
    changed = [name for name, content in files.items() if not _replaceable(folder / name, content, known.get(name, []))]
    if changed:
        raise ConfigError(
            f"In {folder} these files were changed since they were generated, or this command did not write them: "
            f"{', '.join(changed)}. Nothing was written. To keep your version, rename it and use that name in main.tex "
            "(your references belong in own.bib); else delete it, and it is generated again. Or give another --output."
        )
    known = _write(folder, files)
    for name in [name for name in known if name not in files and Path(name).parent in FOLDERS]:
        if _digest_of(folder / name) in known.pop(name):
            try:
                (folder / name).unlink()
            except OSError as error:
                raise CheckpointError(
                    f"Cannot remove {folder / name}, which is not of the results any more: {error.strerror}."
                ) from error
    _write_manifest(folder, known)


def write_unless_there(folder: Path, name: str, content: bytes) -> None:
    """Write a file that is the user's from then on, unless there is one of this name.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not _exists(folder / name):
        _write(folder, {name: content})


def write_product(folder: Path, name: str, content: bytes) -> None:
    """Write what is made of the other files; a file of this name that somebody else made is renamed, NAME-1, NAME-2.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / name
    if not _replaceable(path, content, _read_manifest(folder).get(name, [])):
        numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, 10**6))
        aside = next(each for each in numbered if not _exists(each))
        try:
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"Cannot rename {path} to {aside}: {error.strerror}. It is kept.") from error
        log.warning("%s was not made by this command, or was changed since: it is kept as %s.", path, aside.name)
    _write(folder, {name: content})


def _write(folder: Path, files: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Write `files` and return the manifest.

    A command that is killed has left some files as they were and some rebuilt: the manifest lists both meanwhile.
    """
    known = _read_manifest(folder)
    now = {name: _digest(content) for name, content in files.items()}
    make_folder(folder)
    _write_manifest(folder, known | {name: [*known.get(name, []), digest] for name, digest in now.items()})
    for name, content in files.items():
        make_folder((folder / name).parent)
        if _digest_of(folder / name) != now[name]:
            write_atomically(folder / name, content)
    known |= {name: [digest] for name, digest in now.items()}
    _write_manifest(folder, known)
    return known


def _replaceable(path: Path, content: bytes, known: list[str]) -> bool:
    return not _exists(path) or _digest_of(path) in (*known, _digest(content))


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(path: Path) -> str:
    """Return the digest of a file's content; empty where there is none."""
    try:
        return _digest(path.read_bytes()) if path.is_file() else ""
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _read_manifest(folder: Path) -> dict[str, list[str]]:
    remedy = "It tells what of the folder was generated: restore it, or give another --output."
    record: dict[str, list[str]] | None = read_json(folder / MANIFEST, {str: [str]}, remedy, optional=True)
    return record or {}


def _write_manifest(folder: Path, digests: Mapping[str, list[str]]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(dict(sorted(digests.items())), indent=1) + "\n")
