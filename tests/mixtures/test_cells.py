"""The resumable tables of many small computations, and what reports compute from them."""

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest

from fl_taskarith.errors import CheckpointError
from fl_taskarith.figures.series import summary_by
from fl_taskarith.mixtures.studies import br_ifca_cells, em_cells, run_studies
from fl_taskarith.mixtures.studies.br_ifca_report import largest_survived, rate_of
from fl_taskarith.mixtures.studies.cells import CellTables, Rows, run_cells
from fl_taskarith.mixtures.studies.em_report import derived, knees, rate_points, with_success
from fl_taskarith.mixtures.studies.run_studies import STUDIES, cells_of, coverage, rows_of, run_mixture_study

RESULTS = Path(__file__).parents[2] / "results"


@dataclass(frozen=True)
class Square:
    number: int
    scale: float = 0.5
    seed: int = 0


COLUMNS = {"runs": ("square",), "steps": ("step",)}
CELLS = [Square(number, seed=seed) for seed in range(2) for number in range(6)]


def compute(cell: Square) -> Rows:
    return {
        "runs": [{"square": cell.scale * cell.number**2 + cell.seed}],
        "steps": [{"step": step} for step in range(cell.number)],
    }


def one(_: Square) -> float:
    return 1.0


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_cells_are_done_once_whoever_does_them(tmp_path: Path, jobs: int) -> None:
    tables = CellTables(tmp_path, Square, COLUMNS)
    assert run_cells(tables, [*CELLS, *CELLS], compute, one, jobs=jobs)
    again = CellTables(tmp_path, Square, COLUMNS)
    assert len(again.frames["runs"]) == 12
    assert len(again.frames["steps"]) == 2 * 15
    found = again.frames["runs"].set_index(["number", "seed"])["square"]
    assert found[(5, 1)] == 13.5

    def fails(cell: Square) -> Rows:
        raise AssertionError(cell)

    assert run_cells(again, CELLS, fails, one), "nothing is left to do"


def test_an_interruption_keeps_what_is_done(tmp_path: Path) -> None:
    def interrupted(cell: Square) -> Rows:
        if cell == CELLS[4]:
            raise KeyboardInterrupt
        return compute(cell)

    with pytest.raises(KeyboardInterrupt):
        run_cells(CellTables(tmp_path, Square, COLUMNS), CELLS, interrupted, one)
    tables = CellTables(tmp_path, Square, COLUMNS)
    assert tables.done == {dataclasses.astuple(cell) for cell in CELLS[:4]}
    assert run_cells(tables, CELLS, compute, one)
    assert len(CellTables(tmp_path, Square, COLUMNS).frames["steps"]) == 2 * 15


def test_no_cell_begins_after_the_budget(tmp_path: Path) -> None:
    assert not run_cells(CellTables(tmp_path, Square, COLUMNS), CELLS, compute, one, budget=0.0)
    assert not CellTables(tmp_path, Square, COLUMNS).done


def test_rows_of_a_cell_that_was_cut_off_do_not_count(tmp_path: Path) -> None:
    run_cells(CellTables(tmp_path, Square, COLUMNS), CELLS[:3], compute, one)
    runs = pandas.read_csv(tmp_path / "runs.csv")
    runs[runs["number"] != 2].to_csv(tmp_path / "runs.csv", index=False)
    tables = CellTables(tmp_path, Square, COLUMNS)
    assert set(tables.frames["steps"]["number"]) == {1}
    run_cells(tables, CELLS[:3], compute, one)
    assert len(CellTables(tmp_path, Square, COLUMNS).frames["steps"]) == 0 + 1 + 2


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match=r"runs\.csv"):
        CellTables(tmp_path, Square, COLUMNS)


def test_a_table_of_cells_with_fewer_fields_has_their_defaults(tmp_path: Path) -> None:
    run_cells(CellTables(tmp_path, Square, COLUMNS), CELLS[:4], compute, one)
    for table in COLUMNS:
        frame = pandas.read_csv(tmp_path / f"{table}.csv")
        frame.drop(columns="scale").to_csv(tmp_path / f"{table}.csv", index=False)
    tables = CellTables(tmp_path, Square, COLUMNS)
    assert tables.done == {dataclasses.astuple(cell) for cell in CELLS[:4]}
    run_cells(tables, CELLS, compute, one)
    assert set(pandas.read_csv(tmp_path / "runs.csv")["scale"]) == {0.5}


def test_coverage_counts_what_is_not_run(tmp_path: Path) -> None:
    tables = CellTables(tmp_path, Square, COLUMNS)
    run_cells(tables, CELLS[:8], compute, one)
    figures = {"small": CELLS[:2], "large": CELLS[2:6], "never": [Square(99)]}
    counted = coverage(tables.done, figures, [*CELLS, Square(99)])
    assert counted == [("small", 2, 4, 4), ("large", 4, 8, 4), ("never", 1, 1, 0)]
    assert set(rows_of(tables.frames["runs"], tables.fields, CELLS[:2])["number"]) == {0, 1}


# what the two studies compute


@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_form_is_a_part_of_the_whole(name: str) -> None:
    quick, whole = cells_of(name, True), cells_of(name, False)
    assert set(quick) < set(whole)
    assert len(set(whole)) == len(whole)
    assert all(STUDIES[name][0].cost(cell) > 0 for cell in whole)
    seeds = [cell.seed for cell in whole]
    assert seeds == sorted(seeds), "seed by seed, so that a part is fewer seeds of everything"
    for cell in whole:
        written = [float(f"{value:.6g}") for value in dataclasses.astuple(cell) if isinstance(value, float)]
        assert written == [value for value in dataclasses.astuple(cell) if isinstance(value, float)]


def test_the_published_grid_of_br_ifca_is_covered() -> None:
    cells = cells_of("br-ifca", False)
    seeds: dict[tuple[int, int, float], int] = {}
    for cell in cells:
        if (cell.attack, cell.placement, cell.start, cell.servers) == ("scaled-model", "spread", "ball", "rules"):
            key = (cell.clusters, cell.dimension, cell.alpha)
            seeds[key] = seeds.get(key, 0) + 1
    for clusters in (2, 5, 10, 15):
        for dimension in (20, 50, 100, 200, 500):
            for alpha in (0.05, 0.10):
                assert seeds[(clusters, dimension, alpha)] >= (10 if dimension >= 200 else 50)


def test_a_cell_of_each_study_yields_its_columns() -> None:
    em = em_cells.compute(em_cells.EMCell(40, 8, 4, 2, 2.0, trace=True))
    assert len(em["trajectories"]) == em["runs"][0]["iterations"] + 1
    assert set(em["runs"][0]) == set(em_cells.COLUMNS["runs"])
    assert em["runs"][0]["error"] < 0.5


def test_a_cell_of_br_ifca_runs_every_method_on_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(br_ifca_cells, "ROUNDS", 20)
    rows = br_ifca_cells.compute(br_ifca_cells.BRIFCACell(2, 20, 0.1))["runs"]
    assert [row["method"] for row in rows] == [
        "mean",
        "median",
        "trimmed-mean",
        "geometric-median",
        "krum",
        "two-stage",
    ]
    assert len({row["start_distance"] for row in rows[:5]}) == 1
    assert all(set(row) == set(br_ifca_cells.COLUMNS["runs"]) for row in rows)
    betas = br_ifca_cells.compute(br_ifca_cells.BRIFCACell(2, 20, 0.1, servers="betas"))["runs"]
    assert [row["beta"] for row in betas] == list(br_ifca_cells.BETAS)


# what reports compute


def em_runs(**columns: object) -> pandas.DataFrame:
    return pandas.DataFrame({"known_clusters_error": 0.1, **columns})


def test_the_knee_is_where_half_of_the_runs_succeed() -> None:
    runs = em_runs(clusters=2, snr=[0.5, 0.5, 1.0, 1.0, 2.0, 2.0], error=[0.3, 0.3, 0.1, 0.3, 0.1, 0.1])
    assert with_success(runs)["success"].tolist() == [0, 0, 1, 0, 1, 1]
    found = knees(with_success(runs))
    assert found[2] == pytest.approx(1.0)
    assert math.isnan(found[3])


def test_success_needs_half_the_separation_too() -> None:
    runs = em_runs(clusters=2, snr=[0.5], error=[0.6]).assign(known_clusters_error=0.55)
    assert with_success(runs)["success"].tolist() == [0]


def test_the_rate_is_the_formula() -> None:
    runs = pandas.DataFrame(
        {"clients": [100] * 3, "examples": 4, "dimension": 9, "clusters": 4, "snr": 2.0, "error": [0.2, 0.4, 0.3]}
    )
    (point,) = rate_points(runs).to_dict("records")
    assert point["rate"] == pytest.approx(0.5 * math.sqrt(36 / 400))
    assert (point["mean"], point["count"]) == (pytest.approx(0.3), 3)
    half = summary_by(runs, "clusters", "error")["half"].iloc[0]
    assert half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-3)


def test_the_powers_of_points_and_clients_come_back() -> None:
    grid = [(n, m) for n in (25, 100, 400) for m in (10, 40, 160)]
    runs = pandas.DataFrame(
        {"examples": [n for n, _ in grid], "per_cluster": [m for _, m in grid],
         "matched_distance": [3 * n**-0.5 * m**-0.25 for n, m in grid]}
    )  # fmt: skip
    found = rate_of(runs)
    assert (found["n"], found["m"]) == (pytest.approx(-0.5), pytest.approx(-0.25))
    assert found["n_half"] == pytest.approx(0, abs=1e-9)
    assert rate_of(runs[:0]) == {}


def test_points_that_follow_the_logarithm_of_the_clients_are_named_so() -> None:
    runs = em_runs(clients=[1000, 1000, 1000], examples=[7, 14, 8], error=0.1)
    assert derived(runs)["growth"].tolist() == ["ln m", "2 ln m", ""]


def test_breakdown_is_the_last_share_before_the_first_failure() -> None:
    shares = [0.0, 0.05, 0.10, 0.15]
    for distances, expected in (([1, 1.5, 1.9, 2.5], "0.10"), ([1, 3, 1, 1], "none"), ([1, 1, 1, 1], "0.15 (never)")):
        assert largest_survived(pandas.DataFrame({"alpha": shares, "matched_distance": distances})) == expected
    assert largest_survived(pandas.DataFrame({"alpha": [], "matched_distance": []})) == "not run"


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_report_is_that_of_the_committed_tables(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "*.pdf", "README.md"))
    monkeypatch.setattr(run_studies, "draw_chart", lambda chart, *_: f"![{chart.name}]({chart.name}.png)")
    run_mixture_study(name, tmp_path, only_report=True)
    assert (tmp_path / name / "README.md").read_text() == (RESULTS / name / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_report_is_written_before_anything_has_run(name: str, tmp_path: Path) -> None:
    run_mixture_study(name, tmp_path, only_report=True)
    words = (tmp_path / name / "README.md").read_text()
    assert words.count("not run") >= 5
    assert all((tmp_path / name / line.split("(")[1].rstrip(")")).exists()
               for line in words.splitlines() if line.startswith("!["))  # fmt: skip
