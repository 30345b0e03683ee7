"""A run that is interrupted and started again ends as if it had never stopped."""

from pathlib import Path

import pytest
from conftest import final_weights, numbers, power_cut, same_bits
from kill import SHORT, kill_and_compare

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.masking.mask import load_mask


@pytest.mark.slow
@pytest.mark.parametrize("case", SHORT)
def test_several_kills_in_one_run_change_nothing(case: str, tmp_path: Path) -> None:
    outcome = kill_and_compare(case, 4, tmp_path, seed=1)
    assert outcome.kills >= 2
    assert outcome.differences == []


CUTS = {  # settings, and the round after which the power goes
    "before its checkpoint": ({}, 1),
    "between checkpoints": ({"checkpoint_every": 2}, 1),
    "after the head rounds": ({"head": "linear", "head_rounds": 2, "trainable": "all"}, 2),
    "another head": ({"head": "lda", "ridge_refresh": 1}, 1),
    "centralized": ({"strategy": "centralized", "schedule": "plateau", "warmup_rounds": 1, "train_subset": 160}, 1),
    "after round 0": ({}, 0),
    "masked": ({"mask_rule": "least-sensitive", "calibration_size": 20}, 1),
    "masked after the head rounds": ({"mask_rule": "random", "head": "linear", "head_rounds": 1}, 1),
    "masked and centralized": ({"mask_rule": "random", "strategy": "centralized", "train_subset": 160}, 1),
}


QUICK_CUTS = ("between checkpoints", "centralized", "masked after the head rounds")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK_CUTS else pytest.mark.slow) for case in CUTS]
)
def test_resuming_after_a_cut_gives_the_same_bits(quick_config: Config, case: str) -> None:
    settings, cut_after = CUTS[case]
    whole = simulate(quick_config, run_name="whole", **settings)
    with power_cut(cut_after, before_checkpoint=case == "before its checkpoint"):
        simulate(quick_config, run_name="cut", **settings)
    resumed = simulate(quick_config, run_name="cut", **settings)
    assert resumed.folder.name == "cut"
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))
    masks = [folder / "mask.safetensors" for folder in (whole.folder, resumed.folder)]
    assert masks[0].exists() == ("masked" in case)
    if masks[0].exists():
        assert load_mask(masks[0])[0].jaccard(load_mask(masks[1])[0]) == 1.0


def test_a_damaged_checkpoint_costs_a_round_and_changes_nothing(quick_config: Config) -> None:
    whole = simulate(quick_config, run_name="whole")
    with power_cut(2):
        simulate(quick_config, run_name="cut")
    newest = max((Path(quick_config.results_dir) / "cut" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = simulate(quick_config, run_name="cut")
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))


@pytest.mark.slow
def test_ray_continues_what_the_sequential_engine_began(quick_config: Config) -> None:
    whole = simulate(quick_config, run_name="whole")
    with power_cut(1):
        simulate(quick_config, run_name="cut")
    resumed = simulate(quick_config, run_name="cut", engine="flower")
    assert resumed.folder.name == "cut"
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))
