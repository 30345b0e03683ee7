"""The benchmarks run, compare equal work, and leave their record. Their times are never tested."""

import json
from pathlib import Path

import pytest

from fl_taskarith.bench import fisher
from fl_taskarith.cli import main


def test_the_fisher_bench_compares_two_ways_to_the_same_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "_extra_memory", lambda name, task: 2**20)  # else two processes that import torch
    words = ["--model", "vit_glyph", "--input-size", "16", "--examples", "6", "--repeats", "1"]
    assert main(["bench", "fisher", *words, "--results-dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench" / "fisher.json").read_text())
    per_example = record["seconds_per_example"]
    assert record["ratio"] == pytest.approx(per_example["loop"] / per_example["ours"])
    assert record["relative_error"] < 1e-5
    assert record["machine"]["cores"] >= 1
    assert capsys.readouterr().out.splitlines()[-1] == f"ratio: {record['ratio']:.2f}"


def test_the_fisher_bench_refuses_to_compare_different_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = fisher._Task.loop
    monkeypatch.setattr(fisher._Task, "loop", lambda task: {name: 1.01 * value for name, value in loop(task).items()})
    with pytest.raises(RuntimeError, match="differ by a share"):
        fisher.bench_fisher("vit_glyph", 16, examples=2, repeats=1)
