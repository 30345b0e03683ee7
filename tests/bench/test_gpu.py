"""`bench gpu` in miniature, on a CPU: all of it runs before there is a card, and what fails is a row."""

import json
import logging
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fl_taskarith.config.settings import Config  # isort: skip  # noqa: F401  (before torch)

import pytest

from fl_taskarith.bench import BENCHMARKS, gpu, run_process
from fl_taskarith.bench.gpu_table import table
from fl_taskarith.cli.command import main
from fl_taskarith.data.sets import synthetic

PRODUCTS, COMPARISON, FURTHER = 4, 7, 6  # rows: once; of each size and precision; of the first ones in detail


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "TRAIN", 600)
    monkeypatch.setattr(synthetic, "TEST", 100)


def dry_run(folder: Path, *words: str) -> dict[str, Any]:
    assert main(["bench", "gpu", "--dry-run", *words, "--results-dir", str(folder)]) == 0
    record: dict[str, Any] = json.loads((folder / "bench" / "gpu-dry-run.json").read_text())
    return record


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['input_size']} {row['precision']} {row['what']}": row for row in record["rows"]}


@pytest.mark.slow
def test_a_dry_run_measures_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.MINIATURE, "input_sizes", [16])
    record = dry_run(tmp_path, "--compile", "off")
    rows, printed = by_name(record), capsys.readouterr().out.splitlines()
    assert len(rows) == PRODUCTS + 2 * COMPARISON + FURTHER
    assert not [row for row in rows.values() if "failed" in row]
    assert printed[-1] == f"ratio: {record['ratio']:.2f}"
    assert record["ratio"] == rows["16 bf16 training, ours, 1 at once"]["against_bare"]
    alone, together = (rows[f"16 bf16 training, ours, {number} at once"] for number in (1, 2))
    assert alone["first_loss"] == pytest.approx(together["first_loss"], rel=2e-2)
    assert alone["rounds_per_second"] * 4 == pytest.approx(alone["images_per_second"])
    assert rows["16 bf16 parity of 20 steps"]["largest_difference"] < 2e-2
    assert len(set(rows["16 bf16 parity of 20 steps"]["losses"]["ours"])) > 10
    peak = next(row["flop_per_second"] for row in record["rows"] if row["precision"] == "bf16")
    evaluation = rows["16 bf16 evaluation, ours"]
    assert 0 < evaluation["share_of_measured_peak"] * peak / evaluation["images_per_second"] < 1e9
    assert record["seconds"] > 0 and record["dry_run"]


@pytest.mark.slow
def test_what_is_compiled_on_a_card_can_be_traced(tmp_path: Path) -> None:
    rows = by_name(dry_run(tmp_path))
    assert len(rows) == PRODUCTS + 4 * COMPARISON + FURTHER
    assert not [row for row in rows.values() if "failed" in row or "warnings" in row]


def test_a_measurement_that_fails_is_a_row_with_its_reason_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory() -> float:
        logging.getLogger("fl_taskarith").warning("a warning")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run_process, "train_round", no_memory)
    monkeypatch.setattr(gpu.Card, "plan", lambda card: list(card._comparison(16, "bf16"))[1:4])
    rows = by_name(dry_run(tmp_path, "--compile", "off"))
    failed = rows.pop("16 bf16 training, ours, 1 at once")
    assert failed["failed"] == "RuntimeError: out of memory" and failed["warnings"] == ["a warning"]
    assert rows.pop("16 bf16 training, ours, 2 at once")["failed"]
    (bare,) = rows.values()
    assert bare["images_per_second"] > 0 and "payback" not in bare, "no eager loop to compare with"


def test_the_clock_is_looked_at_before_each_measurement_and_cuts_the_one_under_way(tmp_path: Path) -> None:
    given = BENCHMARKS["gpu"].with_options(dry_run=False, compile="off")
    options = Namespace(**vars(given) | gpu.FULL | gpu.MINIATURE)
    card = gpu.Card(options, tmp_path, time.monotonic() + 20)
    card.take(gpu.Measurement(16, "bf16", "too long", 30, dict))
    handler, card.deadline = signal.getsignal(signal.SIGALRM), time.monotonic() + 0.3
    card.take(gpu.Measurement(16, "bf16", "slow", 0, lambda: time.sleep(20) or {}))
    assert [row["failed"].split(":")[0] for row in card.rows] == ["TimeoutError", "TimeoutError"]
    assert "it takes 30 s or more" in card.rows[0]["failed"] and "cut at the end" in card.rows[1]["failed"]
    assert signal.getsignal(signal.SIGALRM) is handler
    assert "it takes 30 s" in "\n".join(table(card.rows))
    assert card.result(1.0).ratio is None


def test_the_bare_loop_takes_a_rounds_steps_before_and_after_the_parity(tmp_path: Path) -> None:
    given = BENCHMARKS["gpu"].with_options(dry_run=True, compile="off")
    card = gpu.Card(Namespace(**vars(given) | gpu.FULL | gpu.MINIATURE), tmp_path, time.monotonic() + 600)
    batches = card.loops(16, "bf16").training[gpu.COMPILED].batches
    assert len(card.parity(16, "bf16")["losses"]["bare"]) == gpu.PARITY_STEPS
    assert card.loops(16, "bf16").training[gpu.COMPILED].batches is batches
    assert len(batches) == card.steps == 2


def test_without_a_card_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", "--device", "cpu", "--results-dir", str(tmp_path)]) == 1
    assert "give --dry-run" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L40S", None), ("Tesla T4", None)],
)
def test_the_nominal_peak_is_the_cards_own(name: str, peak: float | None) -> None:
    assert gpu.nominal_peaks(name).get("bf16") == peak
