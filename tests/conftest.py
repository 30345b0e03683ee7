"""Shared fixtures. The real data are used where FL_TASKARITH_TEST_DATA names a folder that holds them."""

import hashlib
import os
import pickle
from pathlib import Path

from fl_taskarith.config import Config, load  # isort: skip  (before torch: the package sets how OpenMP waits)

import numpy as np
import pytest
import torch

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

CIFAR_FILES = {"train": 3, "test": 1}  # generated images per class


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


@pytest.fixture
def quick_config(tmp_path: Path) -> Config:
    """A federation on digits that takes about a second."""
    return load(
        overrides={
            "num_clients": 10,
            "num_rounds": 3,
            "local_steps": 2,
            "learning_rate": 0.01,
            "schedule": "constant",
            "evaluate_every": 1,
            "results_dir": str(tmp_path / "results"),
            "threads": 2,
            "checkpoint_every": 1,
        }
    )


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
