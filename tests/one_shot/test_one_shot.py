"""The one-shot benchmark: tasks, unequal training, search, cells, tables; and merging files by search."""

import csv
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import final_weights
from flwr.app import Context, Message
from matplotlib import pyplot
from matplotlib.figure import Figure

from fl_taskarith.cli.command import main
from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config, load
from fl_taskarith.engine.records import to_tensors
from fl_taskarith.errors import ConfigError, StudyError
from fl_taskarith.figures.statistics import Summary
from fl_taskarith.merging.merge_rules import SCALES, scaled_weights
from fl_taskarith.merging.rules.averaging import task_arithmetic
from fl_taskarith.one_shot import benchmark, finetune
from fl_taskarith.one_shot import benchmark_tables as one_shot_figures
from fl_taskarith.one_shot.benchmark_file import OneShot, load_one_shot
from fl_taskarith.one_shot.cell_results import OneShotResults
from fl_taskarith.one_shot.finetune import Spread, plan_training
from fl_taskarith.one_shot.scoring import TaskScore, Workbench, normalised_accuracy, search_merge
from fl_taskarith.server.launch import run_federation
from fl_taskarith.workspace.workspace import workspace

CPU = torch.device("cpu")
CONF = Path(__file__).parents[2] / "conf" / "one-shot"


# unequal training


@pytest.mark.parametrize("number", [2, 5, 8])
def test_steps_spread_without_more_work(number: int) -> None:
    config = load(overrides={"local_steps": 160, "batch_size": 32, "learning_rate": 0.01})
    plans = plan_training(config, number, Spread(steps=16, learning_rate=4, batch_size=2), seed=0)
    steps = [plan.local_steps for plan in plans]
    assert sum(steps) == pytest.approx(160 * number, abs=number)
    assert max(steps) / min(steps) == pytest.approx(16, rel=0.05)
    rates = [plan.learning_rate for plan in plans]
    assert max(rates) / min(rates) == pytest.approx(4)
    assert np.exp(np.log(rates).mean()) == pytest.approx(0.01)
    assert {plan.batch_size for plan in plans} <= set(range(22, 46))
    assert plan_training(config, number, Spread(), 0) == plan_training(config, number, Spread(), 1)


# search


def test_normalised_accuracy_is_the_mean_of_ratios() -> None:
    merged, own = ([TaskScore(accuracy, 0.0) for accuracy in each] for each in ((0.5, 0.9, 0.4), (1.0, 0.9, 0.8)))
    assert normalised_accuracy(merged, own) == pytest.approx((0.5 + 1.0 + 0.5) / 3)


@pytest.mark.parametrize(("best", "edge"), [(0.4, False), (0.65, False), (0.05, True), (2.0, True), (3.0, True)])
def test_the_search_finds_the_best_scale(best: float, edge: bool) -> None:
    vectors = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])}]

    def evaluate(weights: dict[str, torch.Tensor]) -> Sequence[TaskScore]:
        return [TaskScore(1 / (1 + abs(float(weights["w"]) - best)), 0.0)] * 2

    found = search_merge("task-arithmetic", vectors, {"w": torch.zeros(1)}, evaluate, [TaskScore(1.0, 0.0)] * 2, [], 0)
    assert found.scale == min(best, SCALES[-1])
    assert found.edge == edge
    fixed = search_merge("average", vectors, {"w": torch.zeros(1)}, evaluate, [TaskScore(0.5, 0.0)] * 2, [], 0)
    assert (fixed.scale, fixed.edge) == (1.0, False)
    assert fixed.normalised == pytest.approx(2 / (1 + abs(0.5 - best)))


def test_equal_accuracies_are_decided_by_the_loss() -> None:
    vectors = [{"w": torch.tensor([1.0, -1.0])}] * 2

    def evaluate(weights: dict[str, torch.Tensor]) -> Sequence[TaskScore]:
        return [TaskScore(0.9, abs(float(weights["w"][0]) - 0.7))] * 2

    found = search_merge("ties", vectors, {"w": torch.zeros(2)}, evaluate, [TaskScore(0.9, 0.0)] * 2, [], 0)
    assert found.scale == pytest.approx(0.7)


# a round of FedAvg


def test_a_fedavg_round_of_all_clients_is_task_arithmetic_at_one_over_t(quick_config: Config) -> None:
    """Thirteen clients with as many images each; their task vectors as they came, merged from scratch."""
    config = dataclasses.replace(
        quick_config, train_subset=299, num_clients=13, sharding="iid", participation=1.0, num_rounds=1
    )
    vectors: list[dict[str, torch.Tensor]] = []

    def recording(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if message.metadata.message_type == "train":
            tensors = to_tensors(reply.content.array_records["arrays"], CPU)
            vectors.append({name: value.clone() for name, value in tensors.items()})
        return reply

    weights = final_weights(run_federation(config, recording).folder)
    home = workspace(config)
    assert len({len(shard) for shard in home.shards}) == 1
    merged = scaled_weights(home.pretrained, task_arithmetic(vectors), 1 / 13)
    assert len(merged) > 20
    assert all(torch.allclose(weights[name], value, rtol=1e-5, atol=1e-6) for name, value in merged.items())


# the benchmark


TINY = """
name = "tiny"
seeds = [0, 1]
methods = ["task-arithmetic", "average", "fednova"]
[tasks]
family = "class-groups"
number = 2
[settings]
local-steps = 4
learning-rate = 0.003
validation-size = 20
train-subset = 100
test-subset = 40
calibration-size = 0
[[data]]
name = "low"
overlap = 1.0
[[data]]
name = "high"
overlap = 0.0
[[training]]
name = "low"
[[training]]
name = "high"
steps-spread = 4
"""


@pytest.fixture
def tiny(tmp_path: Path) -> OneShot:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return load_one_shot(path)


def test_figures_have_six_lines_a_panel_and_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [f"method {number}" for number in range(9)]
    results = SimpleNamespace(
        one_shot=SimpleNamespace(methods=methods, data=["low", "high"], training=["low"]),
        records={"cell": {"done": True}},
        summary=lambda place, method: Summary(99.5, 2.0, 3),
        fact=lambda place, name, scale: Summary(50.0, 1.0, 3),
    )
    shown: list[Figure] = []
    monkeypatch.setattr(one_shot_figures, "save_figure", lambda figure, output: shown.append(figure) or [output])
    one_shot_figures.plot_sources(cast(Any, results), tmp_path)
    panels = shown[0].axes
    assert {bars.get_label() for axes in panels for bars in axes.containers} == set(methods)
    for axes in panels:
        assert len(axes.containers) + sum(line.get_color() == "grey" for line in axes.lines) <= 6
        tops = [segment[:, 1].max() for bars in axes.containers for segment in bars.lines[2][0].get_segments()]
        assert max(tops) == 100.0
    pyplot.close("all")


@pytest.mark.slow
def test_a_benchmark_writes_its_tables_and_is_not_run_twice(
    tiny: OneShot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one-shot" / "tiny"
    folder.mkdir(parents=True)
    (folder / "FINDINGS.md").write_text("What was found.")
    benchmark.run_one_shot(tiny, tmp_path / "one-shot")
    text = (folder / "README.md").read_text()
    for words in ("What was found.", "data high, training high", "interaction", "fednova", "against-data.png", "λ"):
        assert words in text
    assert "not done" not in text
    with open(folder / "runs.csv", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 2 * 2 * 2 * 3
    equal = [row for row in runs if row["training"] == "low" and row["method"] == "fednova"]
    mean = [row for row in runs if row["training"] == "low" and row["method"] == "average"]
    assert all(float(a["val_normalised"]) >= float(b["val_normalised"]) for a, b in zip(equal, mean, strict=True)), (
        "FedNova with equal steps is the average, at the best scale"
    )
    for name in ("against-data.pdf", "against-training.png", "table.csv"):
        assert (folder / name).stat().st_size > 200

    monkeypatch.setattr(benchmark, "run_cell", lambda *_: pytest.fail("a finished cell is run again"))
    benchmark.run_one_shot(tiny, tmp_path / "one-shot")
    assert (folder / "README.md").read_text() == text
    cells = sorted((folder / "cells").iterdir())
    whole = cells[0].read_text()
    accuracy = json.loads(whole)["own_test_accuracy"]
    for damaged in (whole[:50], "[]", whole.replace(repr(accuracy), repr(accuracy / 2))):
        cells[0].write_text(damaged)
        with pytest.raises(BaseException, match="run again"):
            benchmark.run_one_shot(tiny, tmp_path / "one-shot")


def test_a_cell_is_a_function_of_its_settings(tiny: OneShot) -> None:
    torch.manual_seed(7)
    first = benchmark.run_cell(tiny, tiny.cells[3])
    torch.manual_seed(8)
    assert benchmark.run_cell(tiny, tiny.cells[3]) == first
    assert benchmark.run_cell(tiny, tiny.cells[7]) != first


def test_failures_are_told_and_the_budget_is_kept(
    tiny: OneShot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    diverging = dataclasses.replace(tiny.at_rate(1e5), seeds=(0,))
    with pytest.raises(StudyError, match="4 cells failed"):
        benchmark.run_one_shot(diverging, tmp_path)
    assert "4 of 4 cells are not done" in (tmp_path / "tiny" / "README.md").read_text()
    monkeypatch.setattr(benchmark, "run_cell", lambda *_: pytest.fail("started after the budget"))
    benchmark.run_one_shot(tiny, tmp_path, budget=0.0)
    assert "budget is spent" in capsys.readouterr().out


def test_the_rate_is_chosen_once_by_the_models_own_accuracy(
    tiny: OneShot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = {0.01: 0.7, 0.1: 0.9, 1.0: 0.9}
    searched = dataclasses.replace(tiny, rates=tuple(accuracies))
    asked = []

    def own_accuracy(one_shot: OneShot, overlap: float, spread: Spread) -> float:
        asked.append(one_shot.settings["learning-rate"])
        return accuracies[asked[-1]]

    monkeypatch.setattr(benchmark, "_own_accuracy", own_accuracy)
    for _ in range(2):
        assert benchmark.at_chosen_rate(searched, tmp_path).settings["learning-rate"] == 0.1, "the smaller of equals"
    assert asked == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0], "at both ends of data heterogeneity, once"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_benchmark_is_valid(path: Path) -> None:
    one_shot = load_one_shot(path)
    assert one_shot.name == path.stem
    assert one_shot.reference in one_shot.methods


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "tiny"', 'name = "a/b"', "plain folder name"),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ('"fednova"]', '"fedsomething"]', "fedsomething"),
        ('family = "class-groups"', 'family = "groups"', "class-groups"),
        ("number = 2", "number = 1", "number = 1 is not accepted: expected a whole number from 2"),
        ("number = 2", 'number = 2\nheads = "both"', "heads"),
        ("local-steps = 4", "local-step = 4", "local-steps"),
        ("local-steps = 4", 'mask-rule = "random"', "mask-rule"),
        ("local-steps = 4", 'local-loss = "squared"', "local-loss"),
        ("local-steps = 4", "num-clients = 5", "num-clients: the benchmark decides that itself"),
        ("local-steps = 4", 'schedule = "cosine"', "schedule: the benchmark decides that itself"),
        ("local-steps = 4", "momentum = 0.0\ndampening = 0.5", "dampening = 0.5 has no effect under momentum = 0.0"),
        ('"class-groups"\nnumber = 2', '"folders"\nfolders = ["a", "b"]', 'calibration-size, .* family = "folders"'),
        ("local-steps = 4", 'prefix-cache = "float32"', "set trainable-blocks"),
        (
            '"class-groups"\nnumber = 2\n[settings]',
            '"rotations"\nnumber = 2\n[settings]\ntrainable-blocks = 1\nprefix-cache = "float32"',
            '"rotations" have others: set it to "off"',
        ),
        ("overlap = 0.0", "overlap = 1.5", "from 0 up to 1"),
        ("steps-spread = 4", "steps-spread = 0.5", "steps-spread"),
        ("steps-spread = 4", "step-spread = 4", 'did you mean "steps-spread"'),
        ('name = "high"\noverlap', 'name = "low"\noverlap', "different one"),
        ("[settings]", "[search]\nfrom = 1e-5\nto = 1\n[settings]", "contradicts"),
    ],
)
def test_a_wrong_benchmark_file_is_named(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TINY
    path = tmp_path / "wrong.toml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError, match=expected) as caught:
        load_one_shot(path)
    assert "wrong.toml" in str(caught.value)


def task_vectors(one_shot: OneShot) -> list[dict[str, torch.Tensor]]:
    bench = Workbench(one_shot, 0.0, 0)
    return bench.fine_tune(bench.plan(Spread()))


@pytest.mark.parametrize("at_once", [0, 2])
def test_tasks_are_fine_tuned_together_as_apart(at_once: int, tiny: OneShot, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, sizes = [], []
    original = finetune.train_stacked
    monkeypatch.setattr(
        finetune, "train_stacked", lambda *given, **named: sizes.append(len(given[2])) or original(*given, **named)
    )
    for number in (1, at_once):
        one_shot = dataclasses.replace(tiny, settings=dict(tiny.settings) | {"clients-at-once": number})
        vectors.append(task_vectors(one_shot))
    assert sizes == [2]
    for alone, together in zip(*vectors, strict=True):
        for name, value in alone.items():
            assert (together[name] - value).norm() <= 1e-3 * value.norm() + 1e-6, name


@pytest.mark.parametrize("at_once", [1, 0])
def test_cached_tokens_change_nothing(at_once: int, tiny: OneShot, tmp_path: Path) -> None:
    found = []
    for cache in ("off", "float32"):
        settings = {"trainable-blocks": 2, "clients-at-once": at_once, "prefix-cache": cache, "data-dir": str(tmp_path)}
        one_shot = dataclasses.replace(tiny, settings=dict(tiny.settings) | settings)
        bench = Workbench(one_shot, 0.0, 0)
        vectors = bench.fine_tune(bench.plan(Spread()))
        found.append((vectors, bench.scores("validation", {}), bench.own_scores("test", vectors)))
    (plain, before, after), (cached, cached_before, cached_after) = found
    for one, other in zip(plain, cached, strict=True):
        assert one.keys() == other.keys() and all(name.startswith(("blocks", "norm", "fc_norm")) for name in one)
        for name, value in one.items():
            assert (other[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    for plain_scores, cached_scores in ((before, cached_before), (after, cached_after)):
        assert [each.accuracy for each in plain_scores] == [each.accuracy for each in cached_scores]
        assert [each.loss for each in plain_scores] == pytest.approx([each.loss for each in cached_scores], rel=1e-4)


def test_tasks_that_cannot_be_fine_tuned_together_are_one_by_one(
    tiny: OneShot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(finetune, "train_stacked", out_of_memory)
    monkeypatch.setattr(logging.getLogger("fl_taskarith"), "propagate", True)
    found = []
    for number in (1, 2):
        one_shot = dataclasses.replace(tiny, settings=dict(tiny.settings) | {"clients-at-once": number})
        found.append(task_vectors(one_shot))
    assert "one by one: RuntimeError: not enough memory" in caplog.text
    for alone, fallen_back in zip(*found, strict=True):
        assert all(torch.equal(fallen_back[name], value) for name, value in alone.items())


# files, by search


def test_files_are_merged_at_what_validation_chooses(
    tiny: OneShot, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bench = Workbench(tiny, 0.0, 0)
    home, tasks, heads = bench.home, bench.tasks, bench.heads
    plan = bench.plan(Spread())[0]
    base = {name: value.detach().clone() for name, value in home.model.state_dict().items()}
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "first", "second")]
    safetensors.torch.save_file(base, paths[0])
    both = bench.fine_tune([plan, plan])
    for index, (tuned, path) in enumerate(zip(both, paths[1:], strict=True)):
        model = base | scaled_weights(home.pretrained, tuned, 1.0)
        head = {"head.weight": heads[index].weight, "head.bias": heads[index].bias}
        safetensors.torch.save_file({name: value.contiguous() for name, value in (model | head).items()}, path)
    output, words = tmp_path / "merged.safetensors", ["merge", "--base", str(paths[0]), *map(str, paths[1:])]
    words += ["--output", str(output), "--search", str(tmp_path / "tiny.toml"), "--data", "high"]
    assert main([*words, "--method", "ties"]) == 0
    printed = capsys.readouterr().out
    assert "λ = " in printed
    assert "keep = " in printed
    assert all(task.name in printed for task in tasks)
    merged = safetensors.torch.load_file(output)
    assert not torch.equal(merged["blocks.0.mlp.fc1.weight"], base["blocks.0.mlp.fc1.weight"])

    parts = [{name: both[at][name] for name in both[at] if "attn" in name} for at in (0, 1)]
    for part, path in zip(parts, paths[1:], strict=True):
        safetensors.torch.save_file({name: value.contiguous() for name, value in part.items()}, path)
    assert main([*words, "--overwrite", "--task-vectors"]) == 0, "task vectors of some tensors, by task arithmetic"
    merged = safetensors.torch.load_file(output)
    moved = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert moved == parts[0].keys()

    for extra, expected in ((["--scale", "0.5"], "leave them out"), (["--data", "none"], "expected one of low, high"),
                            (["--method", "fednova"], "needs the local steps of each of 2")):  # fmt: skip
        assert main([*words, *extra]) == 1
        assert expected in capsys.readouterr().err


def test_a_model_that_gets_nothing_right_on_test_is_named(tiny: OneShot, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Workbench.own_scores

    def own_scores(self: Workbench, split: str, vectors: Sequence[dict[str, torch.Tensor]]) -> list[TaskScore]:
        return [TaskScore(0.0, 9.0) if split == "test" else score for score in scores(self, split, vectors)]

    monkeypatch.setattr(Workbench, "own_scores", own_scores)
    with pytest.raises(ConfigError, match="get nothing right on the test images of their own task"):
        benchmark.run_cell(tiny, tiny.cells[0])


def test_losses_are_attributed_by_hand() -> None:
    results = OneShotResults.__new__(OneShotResults)
    accuracy = {("low", "few"): 0.9, ("mid", "few"): 0.1, ("high", "few"): 0.7,
                ("low", "many"): 0.85, ("mid", "many"): 0.2, ("high", "many"): 0.55}  # fmt: skip
    records = {
        place: {seed: {"methods": {"m": {"test_accuracy": value + 0.01 * seed}}} for seed in range(3)}
        for place, value in accuracy.items()
    }
    levels = SimpleNamespace(data={"low": 0, "mid": 0, "high": 0}, training={"few": 0, "many": 0})
    vars(results).update(one_shot=levels, records=records)
    means = {source: each.mean for source, each in results.attribution("m").items()}
    assert means == pytest.approx(
        {"data heterogeneity": -20.0, "training heterogeneity": -5.0, "both": -35.0, "interaction": -10.0}
    )
