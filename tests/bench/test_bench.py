"""The benchmarks run, compare equal work, and leave their record. Their times are never tested."""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fl_taskarith.config.settings import Config  # isort: skip  (before torch: the package sets how OpenMP waits)

import numpy as np
import pytest
import torch

from fl_taskarith.bench import BENCHMARKS, engine, fisher, long_run, run_process, scale, simulators, throughput
from fl_taskarith.bench import round as bench_round
from fl_taskarith.bench.harness import peak_bytes
from fl_taskarith.cli.command import main
from fl_taskarith.data.sets import synthetic
from fl_taskarith.engine.records import to_tensors
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.training.sparse_sgdm import SparseSGDM
from fl_taskarith.workspace.workspace import workspace


def test_the_fisher_bench_compares_two_ways_to_the_same_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "in_new_process", lambda *_: 2**20)  # else two processes that import torch
    words = ["--model", "vit_glyph", "--input-size", "16", "--examples", "6", "--repeats", "1"]
    assert main(["bench", "fisher", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "fisher.json").read_text())
    per_example = record["seconds_per_example"]
    assert record["ratio"] == pytest.approx(per_example["loop"] / per_example["ours"])
    assert record["relative_error"] < 1e-5
    assert record["machine"]["cores"] >= 1
    assert capsys.readouterr().out.splitlines()[-1] == f"ratio: {record['ratio']:.2f}"


def test_the_fisher_bench_refuses_to_compare_different_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = fisher.Scorer.loop
    monkeypatch.setattr(fisher.Scorer, "loop", lambda each: {name: 1.01 * value for name, value in loop(each).items()})
    with pytest.raises(RuntimeError, match="differ by a share"):
        fisher.bench_fisher(BENCHMARKS["fisher"].with_options(model="vit_glyph", input_size=16, examples=2, repeats=1))


@pytest.mark.slow
def test_a_process_does_not_count_its_parents_memory_as_its_own_peak() -> None:
    ballast = np.ones(2**26)  # 512 MiB, held while the child starts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_bytes, (torch.device("cpu"),))
    assert 0 < peak < peak_bytes(torch.device("cpu")) - ballast.nbytes // 2


def test_the_engine_benchs_clients_send_the_weights_back(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, num_clients=3, participation=1.0, sharding="iid")
    weights = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    federation = bench_round.Federation(SequentialGrid(engine.app, 3), config, weights, engine.ROUNDS)
    federation()
    result = to_tensors(federation.arrays, torch.device("cpu"))
    assert result.keys() == weights.keys()
    assert all(torch.allclose(result[name], 2**engine.ROUNDS * value) for name, value in weights.items())


@pytest.mark.slow
def test_the_engine_bench_compares_with_ray(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "vit_glyph", "--input-size", "16", "--clients", "2", "--actors", "1", "--repeats", "1"]
    assert main(["bench", "engine", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "engine.json").read_text())
    per_round = record["seconds_per_round"]
    assert record["ratio"] == pytest.approx(per_round["ray"] / per_round["ours"])
    installed = {name for name in simulators.SIMULATORS if find_spec(name)}
    assert {name: len(seconds) for name, seconds in record["seconds"].items()} == dict.fromkeys(
        {"ours", "ray", "floor"} | installed, 1
    )
    assert capfd.readouterr().out.splitlines()[-1] == f"ratio: {record['ratio']:.2f}"


def test_the_engine_bench_has_a_floor_and_the_simulators_that_are_installed(tmp_path: Path) -> None:
    words = ["--model", "vit_glyph", "--input-size", "16", "--clients", "2", "--repeats", "1", "--without-ray"]
    assert main(["bench", "engine", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "engine-simulators.json").read_text())
    installed = {name for name in simulators.SIMULATORS if find_spec(name)}
    assert record["seconds_per_round"].keys() == {"ours", "floor"} | installed
    assert record.get("training", {}).get("differences", {}).keys() == installed
    assert (record["ratio"] is None) == (not installed)


@pytest.mark.parametrize("density", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_the_round_bench_counts_the_same_steps_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, density: float
) -> None:
    monkeypatch.setattr(synthetic, "TRAIN", 600)
    monkeypatch.setattr(synthetic, "TEST", 100)
    steps = {"federated": 0, "bare": 0}
    theirs, ours = torch.optim.SGD.step, SparseSGDM.step

    def count(name: str, step: Callable[..., object]) -> Callable[..., object]:
        def counted(self: torch.optim.SGD) -> object:
            steps[name] += 1
            return step(self)

        return counted

    monkeypatch.setattr(torch.optim.SGD, "step", count("bare", theirs))
    monkeypatch.setattr(SparseSGDM, "step", count("federated", ours))
    words = ["--model", "vit_glyph", "--input-size", "16", "--batch-size", "2", "--density", str(density)]
    assert main(["bench", "round", *words, "--repeats", "1", "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "round.json").read_text())
    assert record["ratio"] == record["seconds_per_round"]["federated"] / record["seconds_per_round"]["bare"]
    assert steps == {"federated": 80, "bare": 80}, "40 of each, once uncounted and once counted"


def test_the_round_benchs_loop_trains_its_own_model(quick_config: Config) -> None:
    home = workspace(quick_config)
    head = {name: torch.randn_like(home.pretrained[name]) for name in HEAD_PARAMETERS}
    bare = bench_round.Bare(home, head)
    before = {name: value.detach().clone() for name, value in bare.model.named_parameters()}
    bare()
    after = dict(bare.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(home.trained_names(1)) and "head.weight" not in changed


@pytest.mark.slow
def test_the_scale_bench_runs_more_clients_than_images(tmp_path: Path) -> None:
    words = ["--clients", "20", "20000", "--repeats", "1", "--results-dir", str(tmp_path)]
    assert main(["bench", "scale", *words]) == 0
    record = json.loads((tmp_path / "bench" / "scale.json").read_text())
    assert record["ratio"] == record["seconds_per_round"]["20000"] / record["seconds_per_round"]["20"]
    assert record["memory_ratio"] >= 1
    assert "ridge head" in record["round_zero_seconds"]["20"]


def test_drawn_shards_are_a_function_of_the_client() -> None:
    shards = scale.DrawnShards(10**6, 500, torch.device("cpu"))
    assert len(shards) == 10**6
    assert torch.equal(shards[999_999], shards[999_999])
    assert not torch.equal(shards[0], shards[1])
    assert len(shards[5].unique()) == scale.SHARD_SIZE
    assert set(shards[5].tolist()) <= set(range(500))
    with pytest.raises(IndexError):
        shards[10**6]


def test_a_round_of_the_scale_bench_is_one_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "TRAIN", 600)
    monkeypatch.setattr(synthetic, "TEST", 100)
    options = BENCHMARKS["scale"].with_options(device="cpu")
    parts = [run_process.start(dataclasses.replace(scale.run_start(options, clients, tmp_path), ridge=asked))
             for clients, asked in ((20, True), (700, False))]  # fmt: skip
    assert [sorted(each) for each in parts] == [["frozen head", "ridge head"], ["frozen head"]]
    assert run_process.train_round() > 0
    memory, row = run_process.end()
    assert row["clients"] == scale.SAMPLED
    assert memory > 0


def test_the_class_token_bench_takes_the_same_steps_with_and_without_the_other_tokens(tmp_path: Path) -> None:
    words = ["--model", "vit_glyph", "--input-size", "16", "--batch-size", "4", "--repeats", "1"]
    assert main(["bench", "class-token", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "class-token.json").read_text())
    losses = list(record["loss"].values())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[2] == pytest.approx(losses[3], rel=1e-4)
    assert losses[0] != losses[2]
    assert record["ratio"] > 0


@pytest.mark.slow
def test_the_together_bench_takes_the_same_rounds_with_any_number_at_once(tmp_path: Path) -> None:
    words = ["--batch-size", "4", "--clients", "3", "10", "--repeats", "1", "--results-dir", str(tmp_path)]
    assert main(["bench", "together", *words]) == 0
    record = json.loads((tmp_path / "bench" / "together.json").read_text())
    assert list(record["seconds_per_round"]) == ["1 at once", "3 at once", "10 at once"]
    seconds = list(record["seconds_per_round"].values())
    assert record["ratio"] == seconds[0] / min(seconds[1:])


@pytest.mark.slow
def test_the_prefix_bench_trains_the_same_blocks_with_and_without_the_cache(tmp_path: Path) -> None:
    words = ["--model", "vit_glyph", "--input-size", "16", "--trainable-blocks", "1", "--batch-size", "4"]
    assert main(["bench", "prefix", *words, "--repeats", "1", "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "prefix.json").read_text())
    assert record["train_loss"]["cached"] == pytest.approx(record["train_loss"]["last blocks"], rel=1e-2)
    assert record["train_loss"]["all blocks"] != record["train_loss"]["last blocks"]
    assert record["ratio"] == record["seconds_per_round"]["all blocks"] / record["seconds_per_round"]["cached"]


@pytest.mark.slow
def test_the_memory_bench_sees_a_round_that_holds_every_reply(tmp_path: Path) -> None:
    words = ["--model", "vit_glyph", "--input-size", "16", "--batch-size", "4", "--clients", "1", "3"]
    assert main(["bench", "memory", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "memory.json").read_text())
    assert record["ratio"] == max(record["peak_bytes_by_clients"].values()) / record["peak_bytes_bare"]
    assert record["peak_bytes_bare"] > 3 * 4 * 300_000  # weights, gradients and momentum of vit_glyph at the least


def test_the_long_run_bench_compares_its_last_rounds_with_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_run, "in_new_process", lambda work, config: run(config))
    words = ["bench", "long-run", "--results-dir", str(tmp_path)]
    assert main([*words, "--rounds", "299"]) == 1
    assert "--rounds 299 is too few" in capsys.readouterr().err

    def run(config: Config) -> tuple[list[float], list[int]]:
        return [1.0 if number < 200 else 2.0 for number in range(config.num_rounds)], [2**20] * config.num_rounds

    assert main([*words, "--rounds", "400"]) == 0
    record = json.loads((tmp_path / "bench" / "long-run.json").read_text())
    assert (record["ratio"], record["memory_ratio"]) == (2.0, 1.0)
    assert record["seconds_by_round"] == [1.0] * 10 + [2.0] * 10
    assert capsys.readouterr().out.splitlines()[-1] == "ratio: 2.00"
    assert {path.name for path in (tmp_path / "bench").glob("*.p*")} == {"long-run.png", "long-run.pdf"}


def test_a_long_run_is_timed_round_by_round(tmp_path: Path) -> None:
    seconds, memory = long_run.times_and_memory(
        long_run.digits_settings(BENCHMARKS["long-run"].with_options(rounds=3, device="cpu"), tmp_path)
    )
    assert len(seconds) == len(memory) == 3
    assert min(seconds) > 0 < min(memory)


@pytest.mark.slow
def test_the_throughput_bench_measures_both_sides_and_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "TRAIN", 600)
    monkeypatch.setattr(synthetic, "TEST", 100)
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(throughput, "EVALUATION_BATCHES", 1)
    words = ["--model", "vit_glyph", "--input-size", "16", "--batch-size", "2", "--compile", "off", "--repeats", "1"]
    assert main(["bench", "throughput", *words, "--precision", "fp32", "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "throughput.json").read_text())
    speed, operations = record["images_per_second"], record["flop_per_image"]
    assert record["ratio"] == speed["training, federated"] / speed["training, bare loop"]
    expected = speed["evaluation, ours"] * operations["evaluation"] / record["peak_flop_per_second"]
    assert record["share_of_peak"]["evaluation, ours"] == pytest.approx(expected)
    assert (
        2.5 < operations["training"] / operations["evaluation"] < 3.1
    )  # the backward pass of fused attention computes it anew
    assert capsys.readouterr().out.splitlines()[-1] == f"ratio: {record['ratio']:.2f}"
