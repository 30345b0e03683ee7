"""The two studies of mixtures of regressions, federated EM and BR-IFCA: run what is left, then write the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.mixtures.studies import br_ifca_cells, br_ifca_report, em_cells, em_report
from fl_taskarith.mixtures.studies.cells import CellTables, Found, run_cells
from fl_taskarith.storage.run_log import RUN_LOG, recorded


@dataclass(frozen=True)
class MixtureStudy:
    """Its cells (of the quick form, or all), what computes one, what it costs, its tables, and its report."""

    cell_type: type
    columns: Mapping[str, Sequence[str]]
    cells: Callable[[bool], Sequence[Any]]
    compute: Callable[[Any], Found]
    cost: Callable[[Any], float]
    report: Callable[[CellTables, Sequence[Any]], Path]


STUDIES = {
    "fed-em": MixtureStudy(
        em_cells.EMCell, em_cells.COLUMNS, em_cells.cells, em_cells.compute, em_cells.cost, em_report.write_report
    ),
    "br-ifca": MixtureStudy(
        br_ifca_cells.BRIFCACell,
        br_ifca_cells.COLUMNS,
        br_ifca_cells.cells,
        br_ifca_cells.compute,
        br_ifca_cells.cost,
        br_ifca_report.write_report,
    ),
}


def run_mixture_study(
    name: str, root: Path, *, quick: bool = False, jobs: int = 1, budget: float | None = None, only_report: bool = False
) -> None:
    """Run what is left of the study `name` in root/name, and write its figures and tables from all that is done.

    The quick form computes some of the cells of the whole, in the same folder: the whole goes on from there.
    """
    study = STUDIES[name]
    tables = CellTables(root / name, study.cell_type, study.columns)
    with recorded(root / name / RUN_LOG):
        if not only_report and not run_cells(
            tables, study.cells(quick), study.compute, study.cost, jobs=jobs, budget=budget
        ):
            print("The budget is spent. The same command goes on from here.", flush=True)
        print(study.report(tables, study.cells(False)), flush=True)
