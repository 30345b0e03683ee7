"""A data set that the package does not know is one file of the user's: nothing of the package is edited."""

import pickle
from pathlib import Path

import numpy as np
import own_dataset
import pytest
import torch

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.datasets import ImageSet, ImageSource, dataset_words, load_dataset
from fl_taskarith.errors import ConfigError, DataError


@pytest.fixture
def cifar10_folder(tmp_path: Path) -> Path:
    """A data-dir with a small CIFAR-10: noise around one colour per class, in the format of the published files."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    colours = generator.integers(40, 216, size=(10, 3, 1))
    for name in (*own_dataset.FILES["train"], *own_dataset.FILES["test"]):
        labels = np.repeat(np.arange(10), 12)
        pixels = (colours[labels] + generator.integers(-40, 40, size=(120, 3, 1024))).astype(np.uint8).reshape(120, -1)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [f"class {k}".encode() for k in range(10)]}))
    return folder.parent


def settings(data_dir: Path, name: str = "own_dataset:CIFAR10") -> Config:
    return load(
        overrides={
            "dataset": name, "data-dir": str(data_dir), "validation-size": 60, "calibration-size": 20,
            "num-clients": 5, "participation": 0.4, "num-rounds": 2, "local-steps": 1, "learning-rate": 0.01,
            "results-dir": str(data_dir / "results"), "draw-curves": False,
        }
    )  # fmt: skip


def test_a_data_set_of_ones_own_is_trained_on(cifar10_folder: Path) -> None:
    history = simulate(settings(cifar10_folder))
    assert history.folder.name.startswith("cifar10-fedavg-nc2-j1")
    assert history.rows[-1]["test_accuracy"] > 0.5, "ten colours are told apart"


def test_images_come_out_as_the_files_hold_them(cifar10_folder: Path) -> None:
    data = load_dataset("own_dataset:CIFAR10", cifar10_folder, False)
    first = pickle.loads((cifar10_folder / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert np.array_equal(data.train.images[7].numpy(), first[b"data"][7].reshape(3, 32, 32))
    assert (len(data.train), len(data.test), data.classes[3]) == (600, 120, "class 3")
    assert (data.augmentation, dataset_words("own_dataset:CIFAR10")) == ("crop-flip", "CIFAR-10")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("cifar10", "own"), ("own_dataset:Missing", "has no attribute"), ("no_such_module:A", "No module named"),
     ("own_dataset:load", "no data set"), ("own_dataset:", "own")],
)  # fmt: skip
def test_a_data_set_that_is_none_is_named(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        simulate(settings(tmp_path, name))


@pytest.mark.parametrize(
    ("images", "labels"),
    [(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), [0, 1, 0, 1]), (torch.zeros(4, 3, 32, 32), [0, 1, 0, 1]),
     (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), [0, 1, 0, 2]),
     (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), [0, 1, 0])],
)  # fmt: skip
def test_images_and_labels_of_another_kind_are_refused(
    images: torch.Tensor, labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ImageSet(images, torch.tensor(labels))
    source = ImageSource("two", "", 4, 4, 2, "none", 1, lambda *_: (part, part, ("a", "b")))
    monkeypatch.setattr(own_dataset, "TWO", source, raising=False)
    with pytest.raises(DataError, match="own_dataset:TWO"):
        load_dataset("own_dataset:TWO", Path(), False)
