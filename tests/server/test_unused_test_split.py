"""The test split decides nothing: with other test images and labels, all but the test figures keep their bits."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import final_weights
from safetensors.torch import load_file, save_file

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.fields import SENSITIVITY_RULES
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import Dataset, ImageSet
from fl_taskarith.one_shot import benchmark
from fl_taskarith.one_shot.benchmark_file import OneShot, load_one_shot
from fl_taskarith.one_shot.finetune import Spread
from fl_taskarith.one_shot.scoring import Workbench
from fl_taskarith.storage.run_folder import TIMING_COLUMNS, read_rounds
from fl_taskarith.study.one_search import search_rate
from fl_taskarith.study.search import Search
from fl_taskarith.workspace import workspace as home

Outcome = dict[str, Any]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str], Outcome]], tuple[Outcome, Outcome]]]:
    """Calls a function with the real test split, and then with noise and random labels in its place."""
    load_dataset = home.load_dataset

    def scrambled(*given: Any) -> Dataset:
        dataset = load_dataset(*given)
        images, labels = dataset.test.images, dataset.test.labels
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)
        return dataclasses.replace(
            dataset, test=ImageSet(noise, labels[torch.randperm(len(labels), generator=generator)])
        )

    def clear() -> None:
        home.load_data.cache_clear()
        home._workspace.cache_clear()

    def run(attempt: Callable[[str], Outcome]) -> tuple[Outcome, Outcome]:
        clear()
        real = attempt("real")
        monkeypatch.setattr(home, "load_dataset", scrambled)
        clear()
        return real, attempt("scrambled")

    yield run
    clear()


def deciding(folder: Path) -> Outcome:
    """What a run wrote, but its times and what it says of the test split."""
    rows = [{name: value for name, value in row.items() if name not in TIMING_COLUMNS and not name.startswith("test")}
            for row in read_rounds(folder)]  # fmt: skip
    mask = folder / "mask.safetensors"
    return {
        "rows": rows,
        "model": final_weights(folder),
        "mask": load_file(mask) if mask.exists() else {},
        "head": json.loads((folder / "run.json").read_text()).get("head"),
    }


def same(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            same(*pair)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second or (first != first and second != second)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_rule": SENSITIVITY_RULES[0], "calibration_rounds": 2},
        *(
            pytest.param({"mask_rule": rule, "calibration_rounds": 2}, marks=pytest.mark.slow)
            for rule in SENSITIVITY_RULES[1:]
        ),
        {"strategy": "centralized", "schedule": "plateau"},
        {
            "mask_rule": SENSITIVITY_RULES[0],
            "mask_source": "clients",
            "calibration_per_client": 4,
            "calibration_size": 0,
        },
        {"local_loss": "squared", "strategy": "scaffold"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_run_does_not_look_at_the_test_split(
    settings: dict[str, Any], both: Callable[..., tuple[Outcome, Outcome]], quick_config: Config
) -> None:
    tested = []

    def run(name: str) -> Outcome:
        folder = simulate(dataclasses.replace(quick_config, run_name=name, num_rounds=2, **settings)).folder
        tested.append([row["test_accuracy"] for row in read_rounds(folder)])
        return deciding(folder)

    same(*both(run))
    assert tested[0] != tested[1], "else nothing was scrambled"


def test_a_search_does_not_look_at_the_test_split(
    both: Callable[..., tuple[Outcome, Outcome]], quick_config: Config, tmp_path: Path
) -> None:
    def run(name: str) -> Outcome:
        path, choice = search_rate(quick_config, Search(1e-4, 1.0, 1, (1, 2), 2, (0,)), tmp_path / name)
        with open(path, encoding="utf-8", newline="") as file:
            trials = [{key: value for key, value in row.items() if "test" not in key} for row in csv.DictReader(file)]
        return {"choice": choice, "trials": trials}

    same(*both(run))


ONE_SHOT = """
name = "tiny"
seeds = [0]
methods = ["task-arithmetic", "fednova"]
[tasks]
family = "class-groups"
number = 2
[search]
from = 1e-4
to = 1.0
per-decade = 1
[settings]
local-steps = 4
validation-size = 20
train-subset = 100
test-subset = 200
calibration-size = 0
[[data]]
name = "high"
overlap = 0.0
[[training]]
name = "low"
"""


@pytest.mark.slow
def test_merging_does_not_look_at_the_test_split(both: Callable[..., tuple[Outcome, Outcome]], tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(ONE_SHOT)
    tested = []

    def run(name: str) -> Outcome:
        chosen = benchmark.at_chosen_rate(load_one_shot(path), tmp_path / name)
        cell = benchmark.run_cell(chosen, chosen.cells[0])
        tested.append(cell)
        merged = merged_files(load_one_shot(path).at_rate(1e-3), path, tmp_path / name)
        return {"rate": chosen.settings["learning-rate"], "cell": without_test(cell), "merged": merged}

    same(*both(run))
    assert tested[0] != tested[1], "else nothing was scrambled"


def merged_files(one_shot: OneShot, search: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What `merge --search` makes of two models in files."""
    bench = Workbench(one_shot, 0.0, 0)
    base = {name: value.detach().clone() for name, value in bench.home.model.state_dict().items()}
    files = [folder / name for name in ("base.safetensors", "0.safetensors", "1.safetensors", "merged.safetensors")]
    save_file(base, files[0])
    for path, tuned, head in zip(files[1:3], bench.fine_tune(bench.plan(Spread())), bench.heads, strict=True):
        model = base | {name: base[name] + value for name, value in tuned.items()}
        save_file(model | {"head.weight": head.weight.contiguous(), "head.bias": head.bias}, path)
    words = ["merge", "--base", *map(str, files[:3]), "--output", str(files[3]), "--search", str(search)]
    assert main([*words, "--method", "task-arithmetic"]) == 0
    return load_file(files[3])


def without_test(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: without_test(value) for key, value in record.items() if "test" not in key}
    return [without_test(value) for value in record] if isinstance(record, list) else record
