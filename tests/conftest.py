"""Shared fixtures. The real data are used where FL_TASKARITH_TEST_DATA names a folder that holds them."""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_taskarith.config.settings import Config, load  # isort: skip  (before torch: the package sets how OpenMP waits)

import numpy as np
import pytest
import safetensors.torch
import torch
from small_studies import FakeTraining

from fl_taskarith.data.batches import Preprocessing, draw_augmentations
from fl_taskarith.models.heads import RidgeSolver, RidgeStatistics
from fl_taskarith.storage.run_folder import TIMING_COLUMNS, Logbook, Row, read_rounds
from fl_taskarith.training.local import extract_features
from fl_taskarith.workspace.workspace import Workspace

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A head taken from an earlier test, or from the user's own cache, would make a test of how one is found prove nothing.
os.environ["FL_TASKARITH_SHARED_STARTS"] = "off"
# Waiting for the disk is for power cuts, of which no test makes a real one; a run of a test would spend a tenth on it.
os.fsync = lambda descriptor: None

CIFAR_FILES = {"train": 14, "test": 1}  # generated images per class


def real_data_folder() -> Path | None:
    """The folder with the real CIFAR-100 and ViT-S/14, if this machine has them."""
    named = os.environ.get("FL_TASKARITH_TEST_DATA")
    return Path(named) if named else None


def write_generated_cifar100(folder: Path) -> dict[str, str]:
    """A tiny data set in CIFAR-100's own format: noise around one colour per class. Returns each file's MD5."""
    generator = np.random.default_rng(0)
    target = folder / "cifar-100-python"
    target.mkdir(parents=True)
    colours = generator.integers(40, 216, size=(100, 3, 1))
    sums = {}
    for name, per_class in CIFAR_FILES.items():
        labels = np.repeat(np.arange(100), per_class)
        noise = generator.integers(-40, 40, size=(len(labels), 3, 1024))
        pixels = (colours[labels] + noise).clip(0, 255).astype(np.uint8).reshape(len(labels), 3072)
        content = pickle.dumps({"data": pixels, "fine_labels": labels.tolist()})
        (target / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"fine_label_names": [f"class {label}" for label in range(100)]})
    (target / "meta").write_bytes(content)
    return sums | {"meta": hashlib.md5(content).hexdigest()}


def augmented(preprocessing: Preprocessing, images: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Training inputs of one batch, drawn from `generator` as a local step draws them."""
    (drawn,) = draw_augmentations(1, len(images), preprocessing.crop_padding, generator, images.device)
    return preprocessing.training_inputs(images, drawn)


@pytest.fixture
def cifar100_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data-dir with CIFAR-100: the real one where it is at hand, else a generated stand-in torchvision accepts."""
    real = real_data_folder()
    if real is not None:
        return real
    from torchvision.datasets import CIFAR100

    sums = write_generated_cifar100(tmp_path / "data")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured for a moment in place of 20 s."""
    monkeypatch.setattr("fl_taskarith.study.listing.GLANCE", 0.02)
    monkeypatch.setattr("fl_taskarith.study.listing.MEASUREMENT", 0.02)
    monkeypatch.setattr("fl_taskarith.study.monitor.GLANCE", 0.02)
    monkeypatch.setattr("fl_taskarith.server.launch.GLANCE", 0.02)
    monkeypatch.setattr("fl_taskarith.server.launch.MEASUREMENT", 0.02)


@pytest.fixture
def quick_config(tmp_path: Path) -> Config:
    """A federation on a few hundred digits that takes less than a second."""
    return load(
        overrides={
            "train_subset": 300,
            "validation_size": 60,
            "test_subset": 120,
            "num_clients": 10,
            "num_rounds": 3,
            "local_steps": 2,
            "learning_rate": 0.01,
            "mask_rule": "none",
            "schedule": "constant",
            "precision": "fp32",
            "compile": "off",
            "evaluate_every": 1,
            "results_dir": str(tmp_path / "results"),
            "threads": 1,
            "checkpoint_every": 1,
        }
    )


class PowerCutError(RuntimeError):
    """Stands for an interruption at an exact place."""


@contextmanager
def power_cut(after_round: int, before_checkpoint: bool = False) -> Iterator[None]:
    """Interrupt whatever runs inside after a round was logged, or just before its checkpoint is written."""
    from fl_taskarith.server.run import Run

    finish_round, write_round = Run.finish_round, Logbook.write_round

    def cut_later(self: Run, row: Row, weights: dict[str, torch.Tensor]) -> bool:
        stopped = finish_round(self, row, weights)
        if row["round"] == after_round:
            raise PowerCutError
        return stopped

    def cut_earlier(self: Logbook, row: Row) -> None:
        write_round(self, row)
        if row["round"] == after_round:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCutError):
        if before_checkpoint:
            patched.setattr(Logbook, "write_round", cut_earlier)
        else:
            patched.setattr(Run, "finish_round", cut_later)
        yield


def numbers(folder: Path) -> list[Row]:
    """The rows of a run without their timing columns, as read back from the file."""
    return [{name: row[name] for name in row if name not in TIMING_COLUMNS} for row in read_rounds(folder)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported model."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def take_ridge_head(home: Workspace, folder: Path) -> None:
    """Give the model of `home` the head that the run in `folder` solved: the sum of what all shards say, on digits."""
    statistics = [
        RidgeStatistics.of(
            extract_features(home.model, shard, home.preprocessing, batch_size=256, precision="fp32"), shard.labels, 10
        )
        for shard in (home.data.train.take(positions) for positions in home.shards)
    ]
    total = statistics[0]
    for each in statistics[1:]:
        total = total + each
    noted = json.loads((folder / "run.json").read_text())["head"]
    head = RidgeSolver(total).solve(noted["ridge_lambda"]).scaled(noted["logit_scale"])
    with torch.no_grad():
        home.model.head.weight.copy_(head.weight)
        home.model.head.bias.copy_(head.bias)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def _no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as a small run: only tests marked `figures` draw."""
    if "figures" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.server.launch.draw_curves", lambda folder: None)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """Accuracy 0.9, less a point for each decade between the learning rate and 0.1, plus a tenth of it per seed."""
    fake = FakeTraining(lambda run: 0.9 - 0.01 * abs(math.log10(run.learning_rate) + 1) + 0.001 * run.seed)
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", fake)
    return fake


@pytest.fixture
def no_table_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without their figures, but in tests marked `figures`."""
    if "figures" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.study.tables.plot_arms", lambda rows, title, output: [])
        monkeypatch.setattr("fl_taskarith.study.tables.plot_groups", lambda rows, output: [])
        monkeypatch.setattr("fl_taskarith.study.tables._figures", lambda *_: [])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Of each of the two processes that share the two cores; of what is this small, two would mostly wait."""
    torch.set_num_threads(1)


@pytest.fixture
def no_tex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typesetting takes seconds: only tests marked `slow` do it."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.report.document.find_tex", lambda: None)
