"""What "auto" becomes on this machine, what it emulates, and how fast it is said to be."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import image_source, load_dataset
from fl_taskarith.server import speed
from fl_taskarith.server.speed import Speed, Work, device_line, speed_of, work_of
from fl_taskarith.storage.progress import duration
from fl_taskarith.workspace import machine
from fl_taskarith.workspace.machine import emulated, on_this_machine

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """A GPU of the compute capability under "capability", as far as settings are concerned."""
    of: dict[str, tuple[int, int]] = {"capability": (7, 5)}
    usual = machine.choose_device
    monkeypatch.setattr(machine, "choose_device", lambda name: usual("cpu") if name == "cpu" else GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return of


def test_a_cpu_computes_in_float32_and_compiles_nothing() -> None:
    here = on_this_machine(Config(device="cpu"))
    assert (here.precision, here.compile, here.device) == ("fp32", "off", "auto")
    assert here == on_this_machine(Config()), "cpu and auto are one device here, so one run"
    assert here.fingerprint() == Config(learning_rate=1.0).fingerprint(), "runs of versions without auto stay finished"


def test_an_old_gpu_gets_fp16_and_a_recent_one_bf16(gpu: dict[str, tuple[int, int]]) -> None:
    old = on_this_machine(Config())
    assert (old.precision, old.compile) == ("fp16", "off")
    gpu["capability"] = (8, 0)
    recent = on_this_machine(Config())
    assert (recent.precision, recent.compile) == ("bf16", "default")
    assert len({old.fingerprint(), recent.fingerprint(), Config().fingerprint()}) == 3, "other numbers, other runs"
    together = on_this_machine(Config(clients_at_once=10))
    assert (together.precision, together.compile) == ("bf16", "default")
    assert on_this_machine(Config(clients_at_once=10, precision="tf32")).compile == "off", "as earlier versions had it"
    assert on_this_machine(Config(device="cpu")).device == "cpu", "not the device of auto"


@pytest.mark.parametrize(("precision", "capability", "told"), [
    ("bf16", (7, 5), "emulates it"), ("tf32", (7, 5), "computes in fp32"), ("fp16", (7, 5), ""), ("bf16", (9, 0), ""),
])  # fmt: skip
def test_what_a_card_emulates_is_told(
    gpu: dict[str, tuple[int, int]], precision: str, capability: tuple[int, int], told: str
) -> None:
    gpu["capability"] = capability
    (sentence,) = emulated(Config(precision=precision, compile="off")) or [""]
    assert told in sentence and bool(told) == bool(sentence)
    assert not told or ("Tesla T4" in sentence and f'precision = "{precision}"' in sentence)


def test_a_cpu_tells_of_compilation_and_of_types_that_it_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert emulated(Config(precision="fp32", compile="off")) == []
    assert emulated(Config(precision="bf16", compile="off")) == []
    (sentence,) = emulated(Config(precision="fp16", compile="off"))
    assert 'precision = "fp16"' in sentence and "slower" in sentence
    (sentence,) = emulated(Config(precision="fp32", compile="default"))
    assert "compile" in sentence


def test_the_first_line_names_card_precision_compilation_and_speed(gpu: dict[str, tuple[int, int]]) -> None:
    monkeyed = on_this_machine(Config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "choose_device", machine.choose_device)
        assert device_line(monkeyed, Speed(590.2, 1e4)) == "device Tesla T4, fp16, compile off, 590 images/s"


def test_the_speed_is_measured_without_data_and_once_per_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_known", {})
    config = on_this_machine(Config(data_dir=str(tmp_path), weights=str(tmp_path / "missing.pth"), seed=3))
    first = speed_of(config, 0.01)
    assert first is not None and min(first.training, first.evaluation) > 0 and not first.frozen
    monkeypatch.setattr(speed, "Probe", None)  # to measure again would be an error
    assert speed_of(dataclasses.replace(config, seed=4, learning_rate=0.1), 0.01) == first
    assert speed_of(Config(dataset="linear-regression", strategy="fed-em"), 0.01) is None


def test_frozen_blocks_are_measured_apart() -> None:
    cached = Config(trainable_blocks=1, prefix_cache="float32", augmentation="none")
    measured = speed_of(on_this_machine(cached), 0.01)
    assert measured is not None and measured.frozen > 0


def test_measuring_changes_no_number(quick_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_taskarith import simulate

    plain = simulate(quick_config, run_name="plain")
    monkeypatch.setattr(speed, "_known", {})
    again = simulate(quick_config, run_name="again")
    assert [row["train_loss"] for row in plain.rows[1:]] == [row["train_loss"] for row in again.rows[1:]]


def test_the_work_of_a_run_is_its_images() -> None:
    config = Config(num_rounds=10, evaluate_every=5, ridge_refresh=5, local_steps=4, batch_size=16)
    work = work_of(config)
    train = 1437 - 180 - 100
    evaluations, heads = 1 + 2, 1 + 2
    assert work == Work(
        trained=10 * 10 * 4 * 16,
        evaluated=(180 + 360) * evaluations + (train + 180) * heads,
        scored=4 * 100,
        frozen=0,
    )
    assert work_of(dataclasses.replace(config, ridge_refresh=0, strategy="centralized")).trained == 10 * train
    assert work.seconds(Speed(training=100, evaluation=10)) == (work.trained + 400) / 100 + work.evaluated / 10
    assert work.again().scored == 0


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_sizes_that_are_known_before_loading_are_those_that_are_loaded(name: str, tmp_path: Path) -> None:
    loaded, source = load_dataset(name, tmp_path, False), image_source(name)
    assert (len(loaded.train), len(loaded.test), len(loaded.classes)) == (source.train, source.test, source.classes)


def test_durations_are_told_in_the_unit_that_fits() -> None:
    assert [duration(seconds) for seconds in (3.2, 600, 3 * 3600)] == ["3 s", "10 minutes", "3.0 hours"]
