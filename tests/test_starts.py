"""What round 0 finds is found once for the runs of a search, and changes none of them."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import numbers

from fl_taskarith import run, simulate
from fl_taskarith.config import Config
from fl_taskarith.logbook import Row
from fl_taskarith.models.vit_glyph import VIT_GLYPH_WEIGHTS
from fl_taskarith.run import Run
from fl_taskarith.starts import Starts

MASKED = {"mask_rule": "least-sensitive", "calibration_rounds": 2, "calibration_size": 20}
CHANGES = {
    "masked": MASKED,
    "scores of clients": MASKED | {"mask_source": "clients", "calibration_per_client": 4},
    "centralized": {"strategy": "centralized", "batch_size": 256},
}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets a word for every mask that is made and every split that is measured."""
    words: list[str] = []
    mask, measured = run.make_mask, Run._measured
    monkeypatch.setattr(run, "make_mask", lambda *given: words.append("mask") or mask(*given))
    monkeypatch.setattr(Run, "_measured", lambda *given: words.append("measured") or measured(*given))
    return words


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a number for every ridge head that is solved."""
    heads: list[int] = []
    original: Callable[[Run, Row], object] = Run._solve_ridge_head

    def counting(counted: Run, row: Row) -> object:
        heads.append(row["round"])
        return original(counted, row)

    monkeypatch.setattr(Run, "_solve_ridge_head", counting)
    return heads


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[] if name == "masked" else pytest.mark.slow) for name in CHANGES]
)
def test_runs_at_other_rates_have_the_numbers_of_runs_by_themselves(
    change: str, quick_config: Config, solved: list[int], found: list[str]
) -> None:
    config = dataclasses.replace(quick_config, **CHANGES[change])
    starts = Starts()
    folders: list[tuple[Path, Path]] = []
    for rate, rounds in ((0.1, 1), (0.01, 2)):
        other = dataclasses.replace(config, learning_rate=rate, num_rounds=rounds)
        shared = simulate(other, starts=starts, run_name=f"shared-{rate}")
        alone = simulate(other, run_name=f"alone-{rate}")
        folders.append((shared.folder, alone.folder))
    assert len(solved) == 3, "once for both that share, once for each by itself"
    assert found.count("mask") == 3 * ("mask_rule" in CHANGES[change])
    # Two splits of round 0 as often, and of each run's one or two later rounds.
    assert found.count("measured") == 2 * 3 + 2 * 2 * (1 + 2)
    for shared_folder, alone_folder in folders:
        assert numbers(shared_folder) == numbers(alone_folder)
        records = [json.loads((folder / "run.json").read_text()) for folder in (shared_folder, alone_folder)]
        assert records[0].get("head") == records[1].get("head") is not None
        assert records[0].get("mask") == records[1].get("mask")
        assert ("mask" in records[0]) == ("mask_rule" in CHANGES[change])


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_seed": 1}, {"density": 0.2}])
def test_anything_but_rate_and_rounds_is_another_start(
    change: dict[str, object], quick_config: Config, solved: list[int]
) -> None:
    starts = Starts()
    for settings in ({}, change):
        simulate(dataclasses.replace(quick_config, num_rounds=1, **(MASKED | settings)), starts=starts)
    assert len(solved) == 2


def test_two_arms_in_turn_keep_a_start_each_and_a_third_takes_the_place_of_the_elder(
    quick_config: Config, solved: list[int]
) -> None:
    starts = Starts()
    solved_by_then = []
    for turn, seed in enumerate((0, 1, 0, 2, 0, 1)):
        simulate(dataclasses.replace(quick_config, num_rounds=1, seed=seed), starts=starts, run_name=f"turn-{turn}")
        solved_by_then.append(len(solved))
    assert solved_by_then == [1, 2, 2, 3, 3, 4]


def test_a_head_that_is_refreshed_is_solved_anew(quick_config: Config, solved: list[int]) -> None:
    starts = Starts()
    for rate in (0.1, 0.01):
        simulate(
            dataclasses.replace(quick_config, num_rounds=1, ridge_refresh=1, learning_rate=rate),
            starts=starts,
            run_name=f"rate-{rate}",
        )
    assert solved == [0, 1, 1]


def test_weights_that_are_replaced_are_another_start(quick_config: Config, solved: list[int], tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copyfile(VIT_GLYPH_WEIGHTS, weights)
    starts = Starts()
    for rate in (0.1, 0.01, 0.001):
        if rate == 0.001:
            os.utime(weights, ns=(1, 1))
        config = dataclasses.replace(quick_config, num_rounds=1, learning_rate=rate, weights=str(weights))
        simulate(config, starts=starts, run_name=f"rate-{rate}")
    assert solved == [0, 0]
