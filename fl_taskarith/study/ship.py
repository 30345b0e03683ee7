"""Write the list of shipped runs, after results were committed: python -m fl_taskarith.study.ship results."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fl_taskarith.figures.run_groups import find_runs
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.storage.record_files import read_csv
from fl_taskarith.study.results import Outcome, State
from fl_taskarith.study.shipped import LIST, RUN_LINE, digest


def shipped_digests(results: Path) -> dict[str, list[str]]:
    """Return digests of all finished runs in tables, run folders and packs, by the folder right below `results`."""
    found: dict[str, set[str]] = {}
    for path, each in (*_of_tables(results), *_of_runs(results)):
        found.setdefault(path.relative_to(results).parts[0], set()).add(each)
    return {family: sorted(digests) for family, digests in sorted(found.items())}


def _of_tables(results: Path) -> Iterator[tuple[Path, str]]:
    for path in results.rglob("runs.csv"):
        for line in read_csv(path, RUN_LINE, "Restore it.") or []:
            if line["run"] and line["state"] == "done":
                yield path, digest(line["run"], line["test_percent"], line["seconds"])


def _of_runs(results: Path) -> Iterator[tuple[Path, str]]:
    for run in find_runs([results]):
        outcome = Outcome(State.DONE, run.rows, name=run.folder.name)
        yield run.folder, digest(outcome.name, outcome.test_percent, outcome.seconds)


if __name__ == "__main__":
    runs = {family: " ".join(digests) for family, digests in shipped_digests(Path(sys.argv[1])).items()}
    record = {"by": "the authors of fl_taskarith", "runs": runs}
    write_atomically(shipped_file(LIST), json.dumps(record, indent=1) + "\n")
