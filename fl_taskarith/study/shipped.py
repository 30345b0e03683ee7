"""Which results came with the project: its authors ran them, and whoever reads them elsewhere did not.

`shipped_runs.json` lists a digest of every finished run that is committed under results/. A run is known by what was
measured of it, its seconds to the last bit among that, and not by where it lies: a copy of the results stays marked,
and a run of one's own with the same settings is not.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.storage.record_files import read_csv

LIST = "study/shipped_runs.json"
MARK = "shipped"  # at the end of a run's line in `study --list`
RUN_LINE = {
    "run": (str, None),
    "state": (str, None),
    "test_percent": (float, None),
    "seconds": (float, None),
}  # of runs.csv
DIGITS = 16  # hexadecimal digits of a run's digest


def is_shipped(name: str, test_percent: float | None, seconds: float | None) -> bool:
    """Return whether a run of this name, test accuracy (in percent) and seconds of work is one of the project's own."""
    return bool(name) and digest(name, test_percent, seconds) in _known()


def line_is_shipped(line: Mapping[str, Any]) -> bool:
    """Return whether the run in a line of runs.csv, with its numbers read, is one of the project's own."""
    accuracy, seconds = (None if (value := line.get(key)) is None else float(value)
                         for key in ("test_percent", "seconds"))  # fmt: skip
    return is_shipped(line.get("run") or "", accuracy, seconds)


def count_shipped(table: Path) -> tuple[int, int]:
    """Count shipped and finished runs in a runs.csv, each run once; (0, 0) where it cannot be read."""
    try:
        lines = read_csv(table, RUN_LINE, "", optional=True) or []
    except CheckpointError:
        return 0, 0
    finished = {line["run"]: line for line in lines if line["state"] == "done"}
    return sum(map(line_is_shipped, finished.values())), len(finished)


def origin_words(shipped: int, finished: int) -> str:
    """Return a sentence on how many of the finished runs were shipped; "" if none was."""
    if not shipped:
        return ""
    if shipped < finished:
        return (
            f"{shipped} of the {finished} finished runs were shipped with fl_taskarith and run by its authors; the "
            f"other {finished - shipped} were not."
        )
    runs = "The finished run was" if finished == 1 else f"All {finished} finished runs were"
    return f"{runs} shipped with fl_taskarith and run by its authors."


def digest(name: str, test_percent: float | None, seconds: float | None) -> str:
    """Return what identifies a finished run in the list."""
    return hashlib.sha256(f"{name} {test_percent!r} {seconds!r}".encode()).hexdigest()[:DIGITS]


@functools.cache
def _known() -> frozenset[str]:
    families = json.loads(shipped_file(LIST).read_text(encoding="utf-8"))["runs"]
    return frozenset(digest for digests in families.values() for digest in digests.split())
