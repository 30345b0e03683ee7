"""The cells of a one-shot benchmark: their files, and the numbers in them by cell, seed, method and source of loss."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_taskarith.errors import CheckpointError
from fl_taskarith.figures.statistics import Paired, Summary, paired, summarise
from fl_taskarith.one_shot.benchmark_file import Cell, OneShot
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.record_files import Within, read_json

Record = dict[str, Any]
Place = tuple[str, str]  # (data level, training level)

CHECKSUM = "sha256"  # in a cell's file: of the rest of it
CHOSEN = ("value", "scale", "edge", "val_normalised", "test_normalised", "test_accuracy")
FACTS = ("own_test_accuracy", "pretrained_test_accuracy", "mean_cosine")  # that no method changes

SHARE = Within(float, 0, 1)
SHAPE = {
    "methods": {str: {
        "value": (float, None), "scale": float, "edge": bool, "val_normalised": Within(float, 0),
        "test_normalised": Within(float, 0), "test_accuracy": SHARE,
    }},
    "own_test_accuracy": SHARE,
    "pretrained_test_accuracy": SHARE,
    "mean_cosine": Within(float, -1.001, 1.001),
    "learning_rate": Within(float, 0),
    "environment": {"machine": {"processor": str}},
    "seconds": Within(float, 0),
}  # fmt: skip

log = logging.getLogger(__name__)


def write_cell(one_shot: OneShot, cell: Cell, folder: Path, record: Record) -> None:
    """Write the record of a finished cell, with a checksum."""
    path = _path(one_shot, cell, folder)
    make_folder(path.parent)
    write_atomically(path, json.dumps({**record, CHECKSUM: _checksum(record)}, indent=1) + "\n")


def read_cell(one_shot: OneShot, cell: Cell, folder: Path) -> Record | None:
    """Return the record of this cell under these settings and at least these methods; None if it is not there.

    A damaged file counts as none and is logged as a warning.
    """
    path = _path(one_shot, cell, folder)
    try:
        record: Record | None = read_json(path, SHAPE, "It is run again.", optional=True)
        if record is not None and record.pop(CHECKSUM, None) not in (None, _checksum(record)):
            raise CheckpointError(f"{path} has another checksum than when it was written. It is run again.")
    except CheckpointError as error:
        log.warning("A finished cell is damaged. %s", error)
        return None
    return record if record is not None and set(one_shot.methods) <= record["methods"].keys() else None


def _checksum(record: Record) -> str:
    as_read = json.loads(json.dumps(record))  # whose keys are strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _path(one_shot: OneShot, cell: Cell, folder: Path) -> Path:
    words = re.sub(r"[^a-z0-9.]+", "-", f"{cell.data}-{cell.training}".lower()).strip("-.")
    return folder / "cells" / f"{words}-s{cell.seed}-{one_shot.fingerprint(cell)}.json"


class OneShotResults:
    """All finished cells; `records` holds them by place and seed."""

    def __init__(self, one_shot: OneShot, folder: Path) -> None:
        self.one_shot = one_shot
        self.records: dict[Place, dict[int, Record]] = {
            (data, training): {} for data in one_shot.data for training in one_shot.training
        }
        for cell in one_shot.cells:
            if (record := read_cell(one_shot, cell, folder)) is not None:
                self.records[cell.data, cell.training][cell.seed] = record

    @property
    def corners(self) -> list[Place]:
        """(lowest, lowest), (highest, lowest), (lowest, highest), (highest, highest), each once."""
        return list(dict.fromkeys((d, t) for t in ends(self.one_shot.training) for d in ends(self.one_shot.data)))

    def accuracy(self, place: Place, method: str, measure: str = "test_accuracy") -> dict[int, float]:
        """Return percent by seed: the mean over tasks of accuracy, or "test_normalised", or "val_normalised"."""
        return {seed: 100 * record["methods"][method][measure] for seed, record in self.records[place].items()}

    def fact(self, place: Place, name: str, factor: float = 1.0) -> Summary:
        """Summarise over seeds one of `FACTS` of a cell."""
        return summarise([factor * record[name] for record in self.records[place].values()])

    def chosen(self, place: Place, method: str, name: str) -> list[Any]:
        """Return a hyper-parameter as chosen, by seed in order; None where there is none."""
        return [record["methods"][method][name] for _, record in sorted(self.records[place].items())]

    def summary(self, place: Place, method: str, measure: str = "test_accuracy") -> Summary:
        """Summarise over seeds, in percent."""
        return summarise(list(self.accuracy(place, method, measure).values()))

    def difference(self, place: Place, method: str) -> Paired:
        """Return test accuracy minus the reference's, matched by seed, in points."""
        return paired(self.accuracy(place, method), self.accuracy(place, self.one_shot.reference))

    def attribution(self, method: str) -> dict[str, Paired]:
        """Return what a method loses by each source, in points of test accuracy, matched by seed.

        Against its own result where both heterogeneities are lowest: with that of data highest, with that of training
        highest, with both highest, and their interaction, which is "both" minus the sum of the two.
        """
        data, training = list(self.one_shot.data), list(self.one_shot.training)
        base, by_data, by_training, by_both = (
            self.accuracy((data[at_data], training[at_training]), method)
            for at_training, at_data in ((0, 0), (0, -1), (-1, 0), (-1, -1))
        )
        seeds = base.keys() & by_data.keys() & by_training.keys() & by_both.keys()
        additive = {seed: by_data[seed] + by_training[seed] - base[seed] for seed in seeds}
        return {
            "data heterogeneity": paired(by_data, base),
            "training heterogeneity": paired(by_training, base),
            "both": paired(by_both, base),
            "interaction": paired(by_both, additive),
        }

    def runs(self) -> list[Record]:
        """Return the lines of runs.csv: every cell, seed and method."""
        return [
            {"data": place[0], "training": place[1], "seed": seed, "method": method}
            | {name: chosen[name] for name in CHOSEN}
            | {name: record[name] for name in FACTS}
            for place, cells in self.records.items()
            for seed, record in sorted(cells.items())
            for method, chosen in record["methods"].items()
        ]

    def table(self) -> list[Record]:
        """Return the lines of table.csv: every cell and method over seeds, in percent and points."""
        return [self._line(place, method) for place in self.records for method in self.one_shot.methods]

    def _line(self, place: Place, method: str) -> Record:
        accuracy, difference = self.summary(place, method), self.difference(place, method)
        normalised = self.summary(place, method, "test_normalised")
        return {
            **{"data": place[0], "training": place[1], "method": method, "n": accuracy.n},
            **{"test_percent": accuracy.mean, "test_percent_sd": accuracy.sd},
            **{"test_normalised_percent": normalised.mean, "test_normalised_percent_sd": normalised.sd},
            **{"difference": difference.mean, "difference_low": difference.low, "difference_high": difference.high},
            "detectable": difference.detectable,
        }


def ends(levels: Mapping[str, object]) -> list[str]:
    """Return the lowest and the highest level; one where they are the same."""
    names = list(levels)
    return list(dict.fromkeys((names[0], names[-1])))
