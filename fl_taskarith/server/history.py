"""The results of a run, as a notebook shows them."""

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fl_taskarith.config.rule import shown
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.server.course import gain
from fl_taskarith.storage.paths import results_root
from fl_taskarith.storage.run_folder import Row, model_file

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from fl_taskarith.models.exported import ExportedModel


@dataclass(frozen=True, repr=False, eq=False)
class History:
    """The results of a run, finished or not.

    Attributes:
        folder: where they lie.
        rows: those of rounds.csv, one per round from round 0, without empty cells; accuracies are shares in [0, 1].
    """

    folder: Path
    rows: list[Row]

    @classmethod
    def load(cls, run: Path | str, results_dir: str = "") -> "History":
        """Read a run that is there.

        Args:
            run: its folder, or its name in `results_dir`, by default the results folder.

        Raises:
            CheckpointError: there is no such run, or its table cannot be read.
        """
        from fl_taskarith.figures.run_groups import read_run

        places = (Path(run), results_root(results_dir) / run)
        try:
            folder = next((place for place in places if place.is_dir()), None)
        except (OSError, ValueError):  # no name of a file: too long, or with a character that none has
            folder = None
        if folder is None:
            raise CheckpointError(
                f"There is no run {shown(str(run))}: expected a folder, or a name in {places[1].parent}."
            )
        rows = read_run(folder).rows
        return cls(folder, [{name: cell for name, cell in row.items() if cell is not None} for row in rows])

    @cached_property
    def settings(self) -> Mapping[str, object]:
        """All settings of the run, by the keys of a settings file.

        Raises:
            CheckpointError: run.json cannot be read.
        """
        from fl_taskarith.figures.run_groups import read_run

        return read_run(self.folder).settings

    def frame(self) -> "pandas.DataFrame":
        """Return the rows as a pandas frame, without the columns that are empty in all of them."""
        import pandas

        return pandas.DataFrame(self.rows).dropna(axis="columns", how="all")

    def plot(self) -> "Figure":
        """Return a figure of accuracy and losses against rounds, or of distances to the truth on regression data."""
        from matplotlib import pyplot

        from fl_taskarith.figures.plots import course_figure
        from fl_taskarith.figures.run_groups import read_run

        figure = course_figure(read_run(self.folder))
        pyplot.close(figure)  # else a notebook shows it twice
        return figure

    def model(self, *, best: bool = False) -> "ExportedModel":
        """Return (model, transform, classes) of the trained model: after the last round, or the best on validation.

        Raises:
            WeightsError: the run has not written it.
        """
        from fl_taskarith.models.exported import read_exported

        return read_exported(self.folder / model_file(best))

    @property
    def gain(self) -> float | None:
        """The test accuracy of the last round that has one minus that of round 0, in percentage points."""
        return gain(self.rows)

    def __repr__(self) -> str:
        return f"History({', '.join(self._words())})"

    def _words(self) -> list[str]:
        """Return the folder's name, the last round, and what was reached there."""
        words = [self.folder.name]
        if self.rows:
            words.append(f"round {self.rows[-1]['round']}")
        for column, name in (("test_accuracy", "test accuracy"), ("matched_distance", "distance to the truth")):
            measured = [row[column] for row in self.rows if row.get(column) is not None]
            if measured:
                words.append(f"{name} {measured[-1]:.4f}")
        if self.gain is not None:
            words.append(f"{self.gain:+.2f} points over the head before training")
        return words

    def _repr_html_(self) -> str:
        """Return the last row, the gain and the curves, which Jupyter shows for a run at the end of a cell."""
        shown = f"<p>{html.escape(', '.join(self._words()))}</p>"
        if not self.rows:
            return shown
        shown += str(self.frame().tail(1).to_html(index=False, float_format="{:.4g}".format))
        try:
            image = io.BytesIO()
            self.plot().savefig(image, format="png", dpi=110)
        except (CheckpointError, ConfigError):  # a folder without run.json still has its rows
            return shown
        return f'{shown}<img alt="curves" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'
