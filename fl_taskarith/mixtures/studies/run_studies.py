"""The two studies of mixtures of regressions, federated EM and BR-IFCA: run what is left, then write the report."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas

from fl_taskarith.figures.series import Chart, draw_chart, mean_and_sd, mean_difference, select
from fl_taskarith.mixtures.studies import br_ifca_cells, br_ifca_report, em_cells, em_report
from fl_taskarith.mixtures.studies.cells import MAIN, CellTables, Rows, run_cells
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.storage.record_files import read_words
from fl_taskarith.storage.run_log import RUN_LOG, recorded

FINDINGS = "findings.md"  # in a study's folder: what somebody wrote after looking at the figures


@dataclass(frozen=True)
class MixtureStudy:
    """A study: its cells, what computes one, its tables, and its report.

    Attributes:
        columns: of each table beside the cell's own; the first table is `cells.MAIN`.
        grids: the cells of every figure, for seed 0.
        seeds: how many seeds a cell of a figure has, in the quick form or the whole.
        compute: returns the rows of one cell.
        cost: roughly the seconds that a cell takes on one core.
        charts: of every figure's runs, or of the table of the figure's name where there is one.
        numbers: what the template states beside charts.
        derive: adds columns to the runs that are computed from others.
    """

    columns: Mapping[str, Sequence[str]]
    grids: Callable[[], Mapping[str, Sequence[Any]]]
    seeds: Callable[[bool, str, Any], int]
    compute: Callable[[Any], Rows]
    cost: Callable[[Any], float]
    charts: Callable[[], Mapping[str, Sequence[Chart]]]
    numbers: Callable[[Mapping[str, pandas.DataFrame]], Mapping[str, object]]
    derive: Callable[[pandas.DataFrame], pandas.DataFrame] = lambda runs: runs

    def cells(self, quick: bool) -> list[Any]:
        """Return the cells of the quick form or of all, seed by seed, so that a part is fewer seeds of everything."""
        counted = [(cell, self.seeds(quick, figure, cell)) for figure, grid in self.grids().items() for cell in grid]
        most = max(count for _, count in counted)
        chosen = (dataclasses.replace(cell, seed=seed) for seed in range(most) for cell, n in counted if seed < n)
        return list(dict.fromkeys(chosen))

    def tables(self, folder: Path) -> CellTables:
        """Read the tables in a folder."""
        cell_type = type(next(iter(self.grids().values()))[0])
        return CellTables(folder, cell_type, self.columns)


STUDIES = {
    "fed-em": MixtureStudy(
        em_cells.COLUMNS, em_cells.grids, em_cells.seeds, em_cells.compute, em_cells.cost,
        em_report.charts, em_report.numbers, em_report.derived,
    ),
    "br-ifca": MixtureStudy(
        br_ifca_cells.COLUMNS, br_ifca_cells.grids, br_ifca_cells.seeds, br_ifca_cells.compute, br_ifca_cells.cost,
        br_ifca_report.charts, br_ifca_report.numbers,
    ),
}  # fmt: skip


def run_mixture_study(
    name: str, root: Path, *, quick: bool = False, jobs: int = 1, budget: float | None = None, only_report: bool = False
) -> None:
    """Run what is left of the study `name` in root/name, and write its figures and tables from all that is done.

    The quick form computes some of the cells of the whole, in the same folder: the whole goes on from there.
    """
    study = STUDIES[name]
    tables = study.tables(root / name)
    with recorded(root / name / RUN_LOG):
        if not only_report and not run_cells(
            tables, study.cells(quick), study.compute, study.cost, jobs=jobs, budget=budget
        ):
            print("The budget is spent. The same command goes on from here.", flush=True)
        print(write_report(name, tables), flush=True)


def write_report(name: str, tables: CellTables) -> Path:
    """Write the figures and README.md of the study `name` into its folder; return the README's path."""
    study, folder, grids = STUDIES[name], tables.folder, STUDIES[name].grids()
    make_folder(folder)
    runs = study.derive(tables.frames[MAIN])
    frames = {figure: rows_of(runs, tables.fields, cells) for figure, cells in grids.items()}
    charts = {
        chart.name: draw_chart(chart, tables.frames.get(figure, frames[figure]), folder)
        for figure, of_figure in study.charts().items()
        for chart in of_figure
    }
    findings = folder / FINDINGS
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped_file("mixtures/studies/coverage.md.j2").parent),
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    words = templates.get_template(f"{name}.md.j2").render(
        charts=charts, frames=frames, select=select, mean_and_sd=mean_and_sd, mean_difference=mean_difference,
        findings=read_words(findings),
        coverage=coverage(tables.done, grids, study.cells(False)), **study.numbers(frames),
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
