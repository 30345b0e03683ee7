"""run.json, and by it which files belong to a run."""

from pathlib import Path
from typing import Any

from fl_taskarith.config.settings import course_of
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.record_files import COUNT, SCALAR, Within, parsed_json, read_content
from fl_taskarith.storage.verified_files import ALWAYS, CHECKSUMS, check_unchanged, checksum_of_file, read_checksums

Record = dict[str, Any]

RECORD = "run.json"
SETTINGS = {"num-rounds?": Within(int, 1, 2**53), str: SCALAR}
START = {"started?": (str, None), "versions?": ({str: str}, None), "first_round": COUNT, "last_round?": (COUNT, None)}
SHAPE = {  # what is read of it; whatever else it holds is for people
    "status": str,
    "config": SETTINGS,
    "device?": str,
    "threads?": COUNT,
    "machine?": {"processor?": (str, None)},
    "versions?": {str: str},
    "mask?": {"density?": Within(float, 0, 1)},
    "head?": {"logit_scale?": float},
    "shards?": {"smallest": COUNT},
    "data?": {"train": COUNT},
    "starts?": [START],
    "own_modules?": {str: str},
    "stopped_early?": {"round": COUNT},
}
REMEDY = "Restore it, or move the folder away to run it again."


def read_record(folder: Path, *, checked: bool = True) -> Record | None:
    """Return the run.json of a run's folder; None without one, or where it has no bytes, as a cut network drive leaves.

    Args:
        checked: whether it must be what SHA256SUMS beside it says, if there is one.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is no record of a run.
    """
    path = folder / RECORD
    content = read_content(path, REMEDY, optional=True)
    if not content:
        return None
    if checked:
        check_unchanged(path, content)
    record: Record = parsed_json(path, content, SHAPE, REMEDY)
    return record


def is_finished(record: Record | None) -> bool:
    """Whether the run with this run.json has ended well."""
    return record is not None and record["status"] == "finished"


def check_belongs(path: Path, run: str | None) -> None:
    """Check a mask or a model against the run in whose folder it lies, if there is one.

    Args:
        run: `course_of` the settings of the run that wrote the file, if it says so.

    Raises:
        ValueError: it is not the file that the run left.
    """
    if not any((path.parent / name).exists() for name in ALWAYS):
        return  # no run's folder, whatever a SHA256SUMS in it is of
    try:
        listed = read_checksums(path.parent).get(path.name)
    except CheckpointError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if listed is not None and listed != checksum_of_file(path):
        raise ValueError(
            f"{CHECKSUMS} beside it has another checksum: it is damaged, or not the file that the run in this folder "
            f"left. If the change was meant, delete {CHECKSUMS}"
        )
    if run is None:
        return
    try:
        record = read_record(path.parent, checked=False)
    except CheckpointError:
        return  # another program's, or damaged, which its own reader says
    if record is not None and course_of(record["config"]) != run:
        raise ValueError("it is another run's: the settings of the run in this folder are not those that it was made "
                         "under")  # fmt: skip
