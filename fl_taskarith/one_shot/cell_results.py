"""The numbers of a one-shot benchmark, from its cells' files: per cell, paired by seed, and by source of loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.figures.statistics import Paired, Summary, paired, summarise
from fl_taskarith.one_shot.benchmark import read_cell
from fl_taskarith.one_shot.benchmark_file import OneShot

Place = tuple[str, str]  # (data level, training level)
BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Attribution:
    """What a method loses, in points of test accuracy, against its own result where both heterogeneities are lowest.

    data, training: with that one highest and the other lowest; both: with both highest; interaction: both minus the sum
    of the two.
    """

    data: Paired
    training: Paired
    both: Paired
    interaction: Paired


class OneShotResults:
    """All cells that are done."""

    def __init__(self, one_shot: OneShot, folder: Path) -> None:
        self.one_shot = one_shot
        self.folder = folder
        self.records: dict[Place, dict[int, dict[str, Any]]] = {
            (data, training): {} for data in one_shot.data for training in one_shot.training
        }
        for cell in one_shot.cells:
            if (record := read_cell(one_shot, cell, folder)) is not None:
                self.records[cell.data, cell.training][cell.seed] = record

    @property
    def corners(self) -> list[Place]:
        """(lowest, lowest), (highest, lowest), (lowest, highest), (highest, highest), each once."""
        data, training = list(self.one_shot.data), list(self.one_shot.training)
        return list(dict.fromkeys((d, t) for t in (training[0], training[-1]) for d in (data[0], data[-1])))

    def accuracy(self, place: Place, method: str, measure: str = "test_accuracy") -> BySeed:
        """Percent by seed: mean over tasks of accuracy, or "test_normalised", or "val_normalised"."""
        return {seed: 100 * record["methods"][method][measure] for seed, record in self.records[place].items()}

    def fact(self, place: Place, name: str, factor: float = 1.0) -> Summary:
        """A number of the cell that no method changes."""
        return summarise([factor * record[name] for record in self.records[place].values()])

    def chosen(self, place: Place, method: str, name: str) -> list[Any]:
        """A hyper-parameter as chosen, by seed in order; None where there is none."""
        return [record["methods"][method][name] for _, record in sorted(self.records[place].items())]

    def summary(self, place: Place, method: str, measure: str = "test_accuracy") -> Summary:
        """Over seeds, in percent."""
        return summarise(list(self.accuracy(place, method, measure).values()))

    def difference(self, place: Place, method: str) -> Paired:
        """Test accuracy minus the reference's, matched by seed, in points."""
        return paired(self.accuracy(place, method), self.accuracy(place, self.one_shot.reference))

    def attribution(self, method: str) -> Attribution:
        """The loss of a method by its sources; needs at least two levels of each."""
        data, training = list(self.one_shot.data), list(self.one_shot.training)
        base, by_data, by_training, by_both = (
            self.accuracy(place, method)
            for place in ((data[0], training[0]), (data[-1], training[0]), (data[0], training[-1]),
                          (data[-1], training[-1]))
        )  # fmt: skip
        seeds = base.keys() & by_data.keys() & by_training.keys() & by_both.keys()
        additive = {seed: by_data[seed] + by_training[seed] - base[seed] for seed in seeds}
        return Attribution(
            data=paired(by_data, base),
            training=paired(by_training, base),
            both=paired(by_both, base),
            interaction=paired(by_both, additive),
        )
