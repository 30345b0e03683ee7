"""Finished and diverged runs of a study family move from their folders into one file, which studies read as well."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from fl_taskarith.errors import CheckpointError, FolderInUse
from fl_taskarith.storage.folder_choice import hold
from fl_taskarith.storage.locks import owned
from fl_taskarith.storage.packed_runs import PackedRun, pack_of, read_pack, write_pack
from fl_taskarith.storage.paths import portable
from fl_taskarith.study.results import SETTLED, read_outcome


def pack_runs(runs: Path) -> tuple[Path, int]:
    """Pack every finished or diverged run with a folder in `runs`, and remove these folders once the pack is verified.

    Their logs and masks go with the folders. Runs that a pack held already stay in it, unless a folder has another. A
    folder that another process holds stays, and wins over the pack.

    Returns:
        The pack, and how many folders went.

    Raises:
        FolderInUse: another process packs these runs.
        CheckpointError: a folder or the pack cannot be read or written, or is a link; then no folder is removed.
    """
    if not runs.is_dir():
        return pack_of(runs), 0
    pack = pack_of(runs)
    with _only_packer(pack):
        return pack, _packed(runs, pack)


def _packed(runs: Path, pack: Path) -> int:
    if links := [path for path in sorted(runs.glob("*")) if path.is_symlink()]:
        raise CheckpointError(f"{links[0]} is a link, which packing would not remove: put the folder in its place.")
    outcomes = {path: read_outcome(path) for path in sorted(runs.glob("*/")) if any(path.iterdir())}
    settled = {path: outcome for path, outcome in outcomes.items() if outcome.state in SETTLED}
    for path, outcome in settled.items():
        if (name := (outcome.record or {"config": {}})["config"].get("run-name", "")) not in ("", path.name):
            raise CheckpointError(
                f"{path} is a copy of the run {name}: move it elsewhere, or delete it. No folder was packed or removed."
            )
    packed = {path.name: PackedRun(_placed(each.record, runs), each.rows, each.cause) for path, each in settled.items()}
    if packed:
        write_pack(pack, {**read_pack(pack), **packed})
    return sum(map(_remove, settled))


def _placed(record: dict[str, Any] | None, runs: Path) -> dict[str, Any] | None:
    """Return run.json with `runs` as its results folder: folders that were copied here name where they were made."""
    return record and {**record, "config": {**record["config"], "results-dir": portable(runs.absolute())}}


def _remove(path: Path) -> bool:
    """Remove a run's folder, unless another process holds it; return whether it went."""
    try:
        lock = hold(path)
    except FolderInUse:
        return False
    if lock is not None:
        lock.release()
    shutil.rmtree(path)
    return True


@contextlib.contextmanager
def _only_packer(pack: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(owned(pack))
        except Timeout as error:
            raise FolderInUse(f"Another process is writing {pack}: wait until it is done.") from error
        except OSError as error:
            raise CheckpointError(f"Cannot write to {pack.parent}: {error.strerror or error}.") from error
        yield
