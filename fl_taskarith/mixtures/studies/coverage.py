"""What of a study of cells is done, and said by hand: for its report."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from fl_taskarith.figures.series import markdown
from fl_taskarith.mixtures.studies.cells import CellTables

FINDINGS = "findings.md"


def chosen(runs: pandas.DataFrame, fields: Sequence[str], cells: Sequence[Any]) -> pandas.DataFrame:
    """The rows of `runs` whose cell is one of `cells` but for the seed."""
    keys = [field for field in fields if field != "seed"]
    wanted = {tuple(getattr(cell, key) for key in keys) for cell in cells}
    found = [key in wanted for key in runs[keys].itertuples(index=False, name=None)]
    return runs.loc[np.array(found, dtype=bool)]  # an empty list would choose no columns in place of no rows


def findings(folder: Path) -> str:
    """What somebody wrote after looking at the figures, `findings.md`; nothing if nobody did."""
    path = folder / FINDINGS
    return "## What it shows\n\n" + path.read_text(encoding="utf-8").strip() if path.exists() else ""


def coverage(tables: CellTables, figures: Mapping[str, Sequence[Any]], planned: Sequence[Any]) -> str:
    """A table of how much of every figure is done, of all that is `planned`."""

    def key(cell: Any) -> tuple[Any, ...]:
        return dataclasses.astuple(dataclasses.replace(cell, seed=0))

    rows = []
    for figure, cells in figures.items():
        members = {key(cell) for cell in cells}
        of_figure = [cell for cell in planned if key(cell) in members]
        done = sum(dataclasses.astuple(cell) in tables.done for cell in of_figure)
        state = "complete" if done == len(of_figure) else "not run" if not done else f"{len(of_figure) - done} not run"
        rows.append([figure, str(len(members)), str(len(of_figure)), str(done), state])
    return "## What is done\n\n" + markdown(["figure", "settings", "runs planned", "done", ""], rows)
