"""A run that is interrupted and started again ends as if it had never stopped."""

from pathlib import Path

import pytest
import torch
from kill import RUNS, kill_and_compare

from fl_taskarith import simulate
from fl_taskarith.config import Config
from fl_taskarith.logbook import TIMING_COLUMNS, read_rounds
from fl_taskarith.run import Run


@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_run_resumes_to_identical_results(kind: str, tmp_path: Path) -> None:
    outcome = kill_and_compare(kind, 3, tmp_path)
    assert outcome.kills >= 1
    assert outcome.identical


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_many_kills_in_one_run_change_nothing(kind: str, tmp_path: Path) -> None:
    outcome = kill_and_compare(kind, 20, tmp_path, seed=1)
    assert outcome.kills == 20
    assert outcome.identical


class PowerCutError(RuntimeError):
    """Stands for an interruption at an exact place."""


@pytest.mark.parametrize("cut_after", [0, 1, 2])
@pytest.mark.parametrize("damage", [False, True])
def test_resuming_after_any_round_gives_the_same_bits(
    quick_config: Config, cut_after: int, damage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulate(quick_config, run_name="whole")
    finish_round = Run.finish_round

    def cut(self: Run, row: dict[str, object], weights: dict[str, torch.Tensor]) -> None:
        finish_round(self, row, weights)
        if row["round"] == cut_after:
            raise PowerCutError

    with monkeypatch.context() as patched, pytest.raises(PowerCutError):
        patched.setattr(Run, "finish_round", cut)
        simulate(quick_config, run_name="cut")
    if damage and cut_after > 0:
        newest = max((Path(quick_config.results_dir) / "cut" / "checkpoints").iterdir())
        newest.write_bytes(newest.read_bytes()[:-1])
    resumed = simulate(quick_config, run_name="cut")
    assert resumed.folder.name == "cut"

    def numbers(folder: Path) -> list[dict[str, object]]:
        return [{name: row[name] for name in row if name not in TIMING_COLUMNS} for row in read_rounds(folder)]

    assert numbers(resumed.folder) == numbers(whole.folder)
