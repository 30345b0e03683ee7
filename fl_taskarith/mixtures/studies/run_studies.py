"""The two studies of mixtures of regressions, federated EM and BR-IFCA: run what is left, then write the report."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from fl_taskarith.figures.markdown import render_markdown
from fl_taskarith.figures.series import draw_chart, mean_and_sd, mean_difference, select
from fl_taskarith.mixtures.studies import br_ifca_cells, br_ifca_report, em_cells, em_report
from fl_taskarith.mixtures.studies.cells import MAIN, CellTables, run_cells
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.storage.record_files import read_words
from fl_taskarith.storage.run_log import RUN_LOG, recorded

FINDINGS = "findings.md"  # in a study's folder: what somebody wrote after looking at the figures


STUDIES = {"fed-em": (em_cells, em_report), "br-ifca": (br_ifca_cells, br_ifca_report)}
"""What each study computes, and what its report shows.

The first module has COLUMNS, the columns of each table beside the cell's own, `grids`, the cells of every figure for
seed 0, `seeds`, how many of them a cell has in the quick form or the whole, `compute`, the rows of one cell, and
`cost`, roughly its seconds on one core; the second `charts` of every figure's runs, or of the table of the figure's
name where there is one, `numbers`, what the template states beside charts, and `derived`, the runs with the columns
that are computed from others.
"""


def cells_of(name: str, quick: bool) -> list[Any]:
    """Return the cells of the quick form or of all, seed by seed, so that a part is fewer seeds of everything."""
    of = STUDIES[name][0]
    counted = [(cell, of.seeds(quick, figure, cell)) for figure, grid in of.grids().items() for cell in grid]
    most = max(count for _, count in counted)
    chosen = (dataclasses.replace(cell, seed=seed) for seed in range(most) for cell, n in counted if seed < n)
    return list(dict.fromkeys(chosen))


def run_mixture_study(
    name: str, root: Path, *, quick: bool = False, jobs: int = 1, budget: float | None = None, only_report: bool = False
) -> None:
    """Run what is left of the study `name` in root/name, and write its figures and tables from all that is done.

    The quick form computes some of the cells of the whole, in the same folder: the whole goes on from there.
    """
    of, _ = STUDIES[name]
    tables = CellTables(root / name, type(next(iter(of.grids().values()))[0]), of.COLUMNS)
    with recorded(root / name / RUN_LOG):
        if not only_report and not run_cells(
            tables, cells_of(name, quick), of.compute, of.cost, jobs=jobs, budget=budget
        ):
            print("The budget is spent. The same command goes on from here.", flush=True)
        print(write_report(name, tables), flush=True)


def write_report(name: str, tables: CellTables) -> Path:
    """Write the figures and README.md of the study `name` into its folder; return the README's path."""
    report, folder, grids = STUDIES[name][1], tables.folder, STUDIES[name][0].grids()
    make_folder(folder)
    runs = report.derived(tables.frames[MAIN])
    frames = {figure: rows_of(runs, tables.fields, cells) for figure, cells in grids.items()}
    charts = {
        chart.name: draw_chart(chart, tables.frames.get(figure, frames[figure]), folder)
        for figure, of_figure in report.charts().items()
        for chart in of_figure
    }
    words = render_markdown(
        shipped_file(f"mixtures/studies/{name}.md.j2"), charts=charts, frames=frames, select=select,
        mean_and_sd=mean_and_sd, mean_difference=mean_difference, findings=read_words(folder / FINDINGS),
        coverage=coverage(tables.done, grids, cells_of(name, False)), **report.numbers(frames),
    )  # fmt: skip
    write_atomically(folder / "README.md", words)
    return folder / "README.md"


def rows_of(runs: pandas.DataFrame, fields: Sequence[str], cells: Sequence[Any]) -> pandas.DataFrame:
    """Return the rows of `runs` whose cell is one of `cells`, with any seed."""
    keys = [field for field in fields if field != "seed"]
    wanted = pandas.MultiIndex.from_tuples([[getattr(cell, key) for key in keys] for cell in cells])
    return runs[pandas.MultiIndex.from_frame(runs[keys]).isin(wanted)]


def coverage(
    done: set[tuple[Any, ...]], grids: Mapping[str, Sequence[Any]], planned: Sequence[Any]
) -> list[tuple[str, int, int, int]]:
    """Return of every figure its name, its settings, the runs of them that are `planned`, and those that are done."""
    of_setting: dict[Any, list[bool]] = defaultdict(list)
    for cell in planned:
        of_setting[dataclasses.replace(cell, seed=0)].append(dataclasses.astuple(cell) in done)
    rows = []
    for figure, cells in grids.items():
        runs = [is_done for setting in set(cells) for is_done in of_setting[setting]]
        rows.append((figure, len(set(cells)), len(runs), sum(runs)))
    return rows
