"""A data set that the package does not know is one file of the user's: nothing of the package is edited."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_dataset
import pytest
import torch

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data import datasets
from fl_taskarith.data.datasets import Dataset, ImageSet, ImageSource, dataset_words, load_dataset
from fl_taskarith.errors import ConfigError, DataError
from fl_taskarith.workspace.workspace import Workspace


@pytest.fixture
def cifar10_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data-dir with a small CIFAR-10: noise around one colour per class, in the format of the published files."""
    monkeypatch.setattr(own_dataset, "CIFAR10", replace(own_dataset.CIFAR10, train=600, test=120))
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


IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
PART = ImageSet(IMAGES, LABELS)
TWO = ImageSource("two", "", 4, 4, 2, "none", 1, lambda *_: (PART, PART, ("a", "b")))


def load_two(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Dataset:
    monkeypatch.setattr(own_dataset, "TWO", replace(TWO, **changed), raising=False)
    return load_dataset("own_dataset:TWO", Path("nowhere"), False)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("part", "problem"),
    [(ImageSet(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), LABELS), r"images Tensor torch.uint8 \[4, 8, 8, 3\]"),
     (ImageSet(IMAGES.float(), LABELS), "images Tensor torch.float32"),
     (ImageSet(IMAGES.numpy(), LABELS), "images ndarray uint8"),  # type: ignore[arg-type]
     (ImageSet(IMAGES[:0], LABELS[:0]), r"no {split} images \(\[0, 3, 8, 8\]\)"),
     (ImageSet(IMAGES, torch.tensor([0, 1, 0, 2])), "labels from 0 to 2: expected 0 to 1"),
     (ImageSet(IMAGES, LABELS[:3]), r"labels Tensor torch.int64 \[3\]: expected torch.int64 \[4\]"),
     (ImageSet(IMAGES, LABELS.int()), "labels Tensor torch.int32"),
     (ImageSet(IMAGES, LABELS.byte()), "labels Tensor torch.uint8"),
     (ImageSet(IMAGES, LABELS.float()), "labels Tensor torch.float32"),
     ((IMAGES, LABELS), "{split} set as tuple: expected an ImageSet"),
     (ImageSet(IMAGES[:3], LABELS[:3]), "declares {split} = 4 and loads 3 of these images: declare {split} = 3")],
)  # fmt: skip
def test_images_and_labels_of_another_kind_are_refused(
    part: Any, problem: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = (part, PART, ("a", "b")) if split == "train" else (PART, part, ("a", "b"))
    with pytest.raises(DataError, match='dataset = "own_dataset:TWO" .*' + problem.replace("{split}", split)):
        load_two(monkeypatch, load=lambda *_: loaded)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [({"augmentation": "rotate"}, 'augmentation = "rotate": expected one of none, flip, crop, crop-flip'),
     ({"augmentation": "crop", "crop_padding": 0}, "crop_padding = 0"),
     ({"crop_padding": -1}, "crop_padding = -1"),
     ({"classes": 3}, "declares 3 classes and loads 2 class names"),
     ({"load": lambda *_: (PART, PART)}, "loads 2 values: expected a training set, a test set and the class names"),
     ({"load": lambda *_: None}, "loads NoneType: expected"),
     ({"load": lambda *_: (PART, PART, None)}, "class names None: expected a tuple of strings"),
     ({"load": lambda *_: (PART, PART, "ab")}, 'class names "ab"'),
     ({"load": lambda *_: (PART, PART, (3, None))}, r"class names \(3, None\)")],
)  # fmt: skip
def test_what_is_loaded_is_compared_with_what_is_declared(
    changed: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=f'dataset = "own_dataset:TWO" .*{problem}'):
        load_two(monkeypatch, **changed)


@pytest.mark.parametrize(
    ("load", "problem"),
    [(lambda folder, download: (folder / "train.npz").open(), "FileNotFoundError: .*nowhere/train.npz"),
     (lambda folder: None, "TypeError: .* 1 positional argument but 2 were given")],
)  # fmt: skip
def test_what_a_loader_raises_is_told_with_its_setting(
    load: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f'dataset = "own_dataset:TWO" raised {problem}'):
        load_two(monkeypatch, load=load)


def test_a_class_without_training_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(datasets.log, "warning", lambda text, *values: said.append(text % values))
    assert load_two(monkeypatch).classes == ("a", "b") and not said
    load_two(monkeypatch, classes=3, load=lambda *_: (PART, PART, ["a", "b", "empty"]))
    assert said == ['dataset = "own_dataset:TWO" has no training image of 1 of its classes:\n  empty']


def test_crops_that_would_move_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own_dataset, "TWO", replace(TWO, crop_padding=0), raising=False)
    config = replace(settings(tmp_path, "own_dataset:TWO"), validation_size=2, calibration_size=0, mask_rule="random")
    with pytest.raises(ConfigError, match='augmentation = "crop" crops nothing of own_dataset:TWO'):
        Workspace(replace(config, augmentation="crop"))
