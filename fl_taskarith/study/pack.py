"""Finished and diverged runs of a study family move from their folders into one file, which studies read as well."""

import shutil
from pathlib import Path

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.packed_runs import PackedRun, pack_of, read_pack, write_pack
from fl_taskarith.study.results import SETTLED, read_outcome


def pack_runs(runs: Path) -> tuple[Path, int]:
    """Pack every finished or diverged run with a folder in `runs`, and remove these folders once the pack is verified.

    Their logs and masks go with the folders. Runs that a pack held already stay in it, unless a folder has another.

    Returns:
        The pack, and how many folders went.

    Raises:
        CheckpointError: a folder or the pack cannot be read or written, or is a link; then no folder is removed.
    """
    if links := [path for path in sorted(runs.glob("*")) if path.is_symlink()]:
        raise CheckpointError(f"{links[0]} is a link, which packing would not remove: put the folder in its place.")
    outcomes = {path: read_outcome(path) for path in sorted(runs.glob("*/")) if any(path.iterdir())}
    settled = {path: outcome for path, outcome in outcomes.items() if outcome.state in SETTLED}
    packed = {path.name: PackedRun(each.record, each.rows, each.cause) for path, each in settled.items()}
    pack = pack_of(runs)
    if packed:
        write_pack(pack, {**read_pack(pack), **packed})
    for path in settled:
        shutil.rmtree(path)
    return pack, len(settled)
