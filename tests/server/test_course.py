"""What is said of a run's course, and of its end."""

import sys
import warnings
from pathlib import Path

import pytest

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.course import remarks, verdict
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.storage.run_log import recorded

CONFIG = Config(learning_rate=0.1)


def rows_of(*, train: list[float] = (), val: list[float | None] = (), test: list[float] = ()) -> list[Row]:  # type: ignore[assignment]
    number = max(len(train) + 1, len(val), len(test))
    rows: list[Row] = [{"round": index} for index in range(number)]
    for name, values, first in (("train_loss", train, 1), ("val_accuracy", val, 0), ("test_accuracy", test, 0)):
        for index, value in enumerate(values, start=first):
            rows[index][name] = value
    return rows


def said(rows: list[Row]) -> list[tuple[int, str]]:
    """(round, remark) of a whole run."""
    return [(rows[n - 1]["round"], remark) for n in range(1, len(rows) + 1) for remark in remarks(rows[:n], CONFIG)]


def test_a_good_run_is_not_remarked_on() -> None:
    noisy = [2.0, 1.5, 1.6, 1.55, 1.58, 1.6, 1.2, 1.3]  # three rises in a row, by little
    assert said(rows_of(train=noisy, val=[0.5, 0.55, 0.54, 0.5, 0.6])) == []


def test_a_training_loss_that_rises_for_three_rounds_is_told_in_the_third() -> None:
    ((when, remark),) = said(rows_of(train=[1.0, 1.5, 2.0, 4.0, 3.9]))
    assert when == 4
    assert "risen for 3 rounds on end, from 1 to 4" in remark and "learning-rate = 0.1" in remark
    again = said(rows_of(train=[1.0, *(1.0 + 0.5 * n for n in range(1, 7))]))
    assert [when for when, _ in again] == [4, 7], "again after three more"


def test_a_validation_accuracy_below_round_zero_is_told_once_and_again_when_twice_as_bad() -> None:
    told = said(rows_of(val=[0.5, 0.48, 0.47, None, 0.45, 0.44, 0.1]))
    assert [when for when, _ in told] == [1, 4, 6]
    assert "48.0 %, is 2.0 points below round 0's 50.0 %: no more than 180 images leave to chance." in told[0][1]
    assert "learning-rate = 0.1 is probably too large" in told[-1][1]


def test_the_end_is_measured_against_the_ridge_head() -> None:
    rows = rows_of(test=[0.562, 0.612])
    assert verdict(rows, CONFIG, Path("run")) == ["test 61.2 %: 5.0 points above the ridge head"]
    lda = Config(learning_rate=0.1, head="lda")
    assert verdict(rows, lda, Path("run")) == ["test 61.2 %: 5.0 points above the LDA head"]


@pytest.mark.parametrize(
    ("val", "cause", "grid"),
    [
        ([0.41, 0.066, 0.01], "collapsed: learning-rate = 0.1 is far too large", "--from 1e-06 --to 0.01"),
        ([0.41, 0.45, 0.39], "4.0 points above the ridge head on val after round 1", "--from 1e-05 --to 0.1"),
        ([0.41, 0.3, 0.4], "too large at first", "--from 1e-05 --to 0.1"),
        ([0.41, 0.41, 0.41], "too small", "--from 0.001 --to 10"),
        ([0.41, 0.39, 0.38], "too large", "--from 1e-05 --to 0.1"),
    ],
)
def test_an_end_below_the_ridge_head_names_the_likely_cause_and_the_search(
    val: list[float], cause: str, grid: str
) -> None:
    rows = rows_of(val=val, test=val)
    lines = verdict(rows, CONFIG, Path("results/RUN"))
    assert len(lines) == 3 and cause in lines[1]
    assert lines[2] == f"What to do: fl-taskarith search results/RUN {grid}"
    assert ("no better than" if val[-1] == val[0] else "points below") in lines[0]


def test_attackers_are_a_cause_of_their_own() -> None:
    config = Config(learning_rate=0.1, byzantine_fraction=0.2)
    assert "20 % of the clients attack" in verdict(rows_of(test=[0.9, 0.1]), config, Path("x"))[1]


def test_a_head_that_starts_at_zero_has_no_ridge_head_beside_it() -> None:
    config = Config(learning_rate=0.1, head="linear", trainable="head", mask_rule="none")
    (line,) = verdict(rows_of(test=[0.1, 0.6]), config, Path("x"))
    assert line.startswith("test 60.0 %") and "ridge head" in line
    assert verdict(rows_of(test=[0.5]), CONFIG, Path("x")) == [], "a run that ends with round 0"


def test_a_run_that_collapses_says_so_while_it_does_and_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = simulate(learning_rate=1.0, mask_rule="none", num_rounds=2, evaluate_every=1, results_dir=str(tmp_path),
                       draw_curves=False)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    first, second = (next(n for n, line in enumerate(lines) if line.startswith(f"round   {r}/")) for r in (1, 2))
    assert any("points below round 0's" in line for line in lines[first:second])
    assert "points below the ridge head" in lines[-3]
    assert lines[-1].startswith(f"What to do: fl-taskarith search {history.folder} --from ")
    assert (history.folder / "run.log").read_text().splitlines() == lines


def test_what_a_command_prints_is_recorded_and_still_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(tmp_path / "new" / "run.log"):
        print("a line")
        print("\r 50 %", end="")
        print("a warning", file=sys.stderr)
    assert (tmp_path / "new" / "run.log").read_text() == "a line\na warning\n", "no progress bars"
    printed = capsys.readouterr()
    assert printed.out == "a line\n\r 50 %" and printed.err == "a warning\n"


def test_warnings_and_the_error_that_ends_a_run_are_in_its_log(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object) -> None:
        warnings.warn("look here", stacklevel=1)
        raise ConfigError("and stop")

    monkeypatch.setattr("fl_taskarith.server.federated.FederatedRun.ridge_statistics", warn)
    with pytest.raises(ConfigError), pytest.warns(UserWarning):
        simulate(quick_config, run_name="told")
    text = (Path(quick_config.results_dir) / "told" / "run.log").read_text()
    assert "UserWarning: look here" in text and text.endswith("ConfigError: and stop\n")
    assert text.startswith("device cpu")
