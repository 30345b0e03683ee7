"""What round 0 finds is found once for the runs of a search, and changes none of them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import final_weights, numbers, same_bits
from safetensors.torch import load_file, save_file

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.describe.masks import make_masks
from fl_taskarith.masking.mask import load_mask
from fl_taskarith.models.vit_glyph import VIT_GLYPH_WEIGHTS
from fl_taskarith.server import round_zero_cache as starts
from fl_taskarith.server import run
from fl_taskarith.server.round_zero_cache import SWITCH, Starts
from fl_taskarith.server.run import Run
from fl_taskarith.storage import round_zero_files as files_of_starts
from fl_taskarith.storage.round_zero_files import read_start, write_start
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.storage.verified_files import read_verified, write_verified
from fl_taskarith.workspace.workspace import Workspace, workspace

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
    original: Callable[[Run, Row], object] = Run._solve_head

    def counting(counted: Run, row: Row) -> object:
        heads.append(row["round"])
        return original(counted, row)

    monkeypatch.setattr(Run, "_solve_head", counting)
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


@pytest.mark.parametrize(
    ("change", "heads", "masks"),
    [({"seed": 1}, 2, 2), ({"shard_seed": 1}, 2, 2), ({"density": 0.2}, 1, 2), ({"strategy": "fedavgm"}, 1, 1)],
)
def test_what_a_setting_changes_is_found_anew_and_nothing_else(
    change: dict[str, object], heads: int, masks: int, quick_config: Config, solved: list[int], found: list[str]
) -> None:
    starts = Starts()
    for settings in ({}, change):
        simulate(dataclasses.replace(quick_config, num_rounds=1, **(MASKED | settings)), starts=starts)
    assert (len(solved), found.count("mask")) == (heads, masks)


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
            tensors = load_file(weights)
            save_file(tensors | {"norm.bias": tensors["norm.bias"] + 1}, weights)
        config = dataclasses.replace(quick_config, num_rounds=1, learning_rate=rate, weights=str(weights))
        simulate(config, starts=starts, run_name=f"rate-{rate}")
    assert solved == [0, 0]


@pytest.fixture
def shared_config(quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Every run of it is like one in a process of its own, with a data-dir that all share."""
    monkeypatch.delenv(SWITCH)
    return dataclasses.replace(quick_config, num_rounds=1, data_dir=str(tmp_path / "data"), **MASKED)


def start_files(config: Config) -> list[Path]:
    return sorted((Path(config.data_dir) / "round-zero").iterdir())


def facts(folder: Path) -> dict[str, object]:
    """run.json without what tells one sitting from another."""
    record = json.loads((folder / "run.json").read_text())
    del record["started"], record["starts"], record["finished"]
    return record | {"config": {key: value for key, value in record["config"].items() if key != "run-name"}}


def same_mask(first: Path, second: Path) -> bool:
    masks = [load_mask(folder / "mask.safetensors")[0] for folder in (first, second)]
    return same_bits(masks[0].tensors, masks[1].tensors)


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=[] if name == "masked" else pytest.mark.slow) for name in CHANGES]
)
def test_a_run_that_takes_its_start_from_disk_has_the_numbers_of_one_that_finds_it(
    change: str, shared_config: Config, solved: list[int], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(shared_config, **CHANGES[change])
    first, second = (simulate(config, run_name=name) for name in ("first", "second"))
    assert len(solved) == 1 and found.count("mask") == 1
    assert found.count("measured") == 2 + 2 * 2, "of round 0 once, of each round 1"
    monkeypatch.setenv(SWITCH, "off")
    alone = simulate(config, run_name="alone")
    assert len(solved) == 2
    for history in (second, alone):
        assert numbers(history.folder) == numbers(first.folder)
        assert facts(history.folder) == facts(first.folder)
        assert same_bits(final_weights(history.folder), final_weights(first.folder))
        assert same_mask(history.folder, first.folder)
    assert {path.suffix for path in start_files(config)} == {".safetensors"}, "neither locks nor temporary files"


def test_a_mask_alone_leaves_a_start_that_a_run_can_use(shared_config: Config, tmp_path: Path) -> None:
    """It looks at the validation set only, so what it measured is not all that a run measures."""
    make_masks(shared_config, tmp_path / "mask")
    history = simulate(shared_config)
    assert history.rows[0]["test_accuracy"] is not None
    assert same_mask(history.folder, tmp_path / "mask")


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "of another kind"])
def test_a_damaged_start_is_found_anew(
    damage: str, shared_config: Config, solved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = simulate(shared_config, run_name="first")
    (path,) = (path for path in start_files(shared_config) if path.name.startswith("head-"))
    content = path.read_bytes()
    if damage == "flipped bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
        write_verified(path.parent, path.name.rpartition("-")[0], b"no tensors")
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        second = simulate(shared_config, run_name="second")
    assert solved == [0, 0] and "is damaged" in caplog.text and "head-" in caplog.text
    assert numbers(second.folder) == numbers(first.folder)
    kept = [each for each in start_files(shared_config) if each.name.startswith("head-")]
    assert len(kept) == 1 and read_verified(kept[0]) not in (None, b"no tensors")


def test_a_folder_that_cannot_be_written_is_done_without(
    shared_config: Config, solved: list[int], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "round-zero").write_text("a file in its place")
    simulate(shared_config)
    assert solved == [0]


@pytest.mark.parametrize("settings", [{"engine": "flower"}, {"byzantine_fraction": 0.2}], ids=["flower", "attackers"])
def test_what_other_machines_or_attackers_answer_is_no_start_for_others(
    settings: dict[str, object], shared_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert starts._shareable(shared_config, starts.HEAD)
    assert not starts._shareable(dataclasses.replace(shared_config, **settings), starts.HEAD)
    monkeypatch.setenv(SWITCH, "off")
    assert not starts._shareable(shared_config, starts.HEAD)


def test_a_mask_that_scores_nothing_is_not_worth_a_file(shared_config: Config) -> None:
    drawn = dataclasses.replace(shared_config, mask_rule="random")
    assert starts._shareable(shared_config, starts.MASK) and not starts._shareable(drawn, starts.MASK)


def test_every_setting_decides_or_comes_later(shared_config: Config) -> None:
    known = set(Config().to_run_config())
    assert known >= starts.LATER_KEYS | starts.MASK_KEYS
    assert {"seed", "shard-seed", "sharding", "head", "precision", "threads", "compile", "engine"} <= (
        known - starts.LATER_KEYS - starts.MASK_KEYS
    )


def test_code_that_changes_is_another_start(shared_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    home = workspace(shared_config)
    before = starts._digest(home, starts.HEAD)
    monkeypatch.setattr(starts, "_surroundings", lambda: ["edited"])
    assert starts._digest(home, starts.HEAD) != before


def test_other_shards_are_another_start(shared_config: Config) -> None:
    """A benchmark puts its own in place of those that the settings describe."""
    homes = [Workspace(shared_config) for _ in range(2)]
    homes[1].shards = list(homes[1].shards)[::-1]
    assert len({starts._digest(home, starts.HEAD) for home in homes}) == 2


def test_files_that_nobody_used_for_long_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_of_starts, "MOST_FILES", 3)

    def keep(number: int) -> None:
        tensors = {"w": torch.full((4,), float(number))}
        write_start(tmp_path, f"head-{number:032x}", tensors, {"facts": {"n": number}, "counted": {}})
        for path in tmp_path.glob(f"head-{number:032x}-*"):
            os.utime(path, (1000.0 + number,) * 2)

    for number in range(3):
        keep(number)
    assert read_start(tmp_path, f"head-{0:032x}") is not None, "used now, so the newest"
    keep(3)
    assert [read_start(tmp_path, f"head-{number:032x}") is not None for number in range(4)] == [True, False, True, True]
    monkeypatch.setattr(files_of_starts, "MOST_BYTES", 1)
    keep(4)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_started_together_find_their_start_once(shared_config: Config, tmp_path: Path) -> None:
    """Three processes of the command; each says which head it solved, or that it waited."""
    words = [f"{key}={value}" for key, value in shared_config.to_run_config().items()
             if value != Config().to_run_config()[key]]  # fmt: skip
    code = (
        "import sys; from fl_taskarith import run; from fl_taskarith.cli.command import main\n"
        "solve = run.Run._solve_head\n"
        "run.Run._solve_head = lambda self, row: (print('solved'), solve(self, row))[1]\n"
        "main(sys.argv[1:])"
    )
    commands = [[sys.executable, "-c", code, "simulate", *words, f"run-name=run-{number}"] for number in range(3)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(text.count("solved") for text in printed) == 1
    folders = [Path(shared_config.results_dir) / f"run-{number}" for number in range(3)]
    for folder in folders[1:]:
        assert numbers(folder) == numbers(folders[0])
        assert same_bits(final_weights(folder), final_weights(folders[0]))
    assert {path.suffix for path in start_files(shared_config)} == {".safetensors"}


def test_a_file_of_another_start_under_this_ones_name_is_not_taken(tmp_path: Path) -> None:
    mine, other = (f"head-{number:032x}" for number in range(2))
    write_start(tmp_path, other, {"w": torch.ones(2)}, {"facts": {}, "counted": {}})
    (path,) = tmp_path.glob(f"{other}-*")
    path.rename(tmp_path / path.name.replace(other, mine))
    assert read_start(tmp_path, mine) is None and not list(tmp_path.glob(f"{mine}-*"))
