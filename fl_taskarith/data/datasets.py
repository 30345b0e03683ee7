"""Data sets as device-resident tensors. A new data set is one loader and one line in `LOADERS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.data.splits import stratified_sample
from fl_taskarith.errors import DataError

DIGITS_TEST_SIZE = 360  # one fifth of the 1,797 images; scikit-learn ships no official test set
SYNTHETIC_SIZES = {"train": 10_000, "test": 1_000}


@dataclass(frozen=True)
class DatasetSize:
    """Images of a data set, and its classes: known before it is loaded."""

    train: int
    test: int
    classes: int


DATASET_SIZES = {
    "digits": DatasetSize(1_437, DIGITS_TEST_SIZE, 10),
    "cifar100": DatasetSize(50_000, 10_000, 100),
    "synthetic": DatasetSize(**SYNTHETIC_SIZES, classes=100),
}
SPLIT_SEED = 0  # splits are the same in every run, whatever the federation's seed


def training_images(config: Config) -> int:
    """Images that are trained on under these settings, of a data set of `DATASET_SIZES`."""
    left = DATASET_SIZES[config.dataset].train - config.validation_size - config.calibration_size
    return config.train_subset or max(left, 1)


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 [N, 3, H, W], and labels, int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "ImageSet":
        """The examples at `indices`, int64 [n]."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "ImageSet":
        """The same examples on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, the class names, and the augmentation customary for this data set."""

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    augmentation: str
    crop_padding: int


def load_dataset(name: str, data_dir: Path, download: bool) -> Dataset:
    """Load a data set by its configuration name.

    Raises:
        DataError: it is not in `data_dir` and may not or cannot be downloaded.
    """
    return LOADERS[name](data_dir, download)


def load_digits(data_dir: Path, download: bool) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (UCI), 8x8, grey levels 0..16 scaled to 0..255, three equal channels."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    everything = ImageSet(grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target.astype(np.int64)))
    test = stratified_sample(everything.labels.numpy(), DIGITS_TEST_SIZE, SPLIT_SEED)
    train = np.setdiff1d(np.arange(len(everything)), test)
    return Dataset(
        name="digits",
        train=everything.take(torch.from_numpy(train)),
        test=everything.take(torch.from_numpy(test)),
        classes=tuple(str(digit) for digit in range(10)),
        augmentation="none",  # a mirrored digit is no digit, and at 8 pixels a shift cuts strokes off
        crop_padding=1,
    )


def load_cifar100(data_dir: Path, download: bool) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009) through torchvision: 50,000 training and 10,000 test images, 32x32."""
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(str(data_dir), train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, the download OSError or URLError
        raise DataError(
            f"CIFAR-100 cannot be loaded from {data_dir} ({error}). Expected there: the folder cifar-100-python with "
            "the files train, test and meta, unpacked from cifar-100-python.tar.gz. Put it there, or name the folder "
            "that holds it in data-dir, or set download = true on a machine with internet access."
        ) from error
    return Dataset(
        name="cifar100",
        train=_from_arrays(train.data, train.targets),
        test=_from_arrays(test.data, test.targets),
        classes=tuple(train.classes),
        augmentation="crop-flip",
        crop_padding=4,
    )


def load_synthetic(data_dir: Path, download: bool) -> Dataset:
    """Noise around one colour per class in the shape of CIFAR-100, for benchmarks and tests: no result comes of it."""
    generator = np.random.default_rng(0)
    colours = torch.from_numpy(generator.integers(40, 216, size=(100, 3, 1, 1), dtype=np.uint8))

    def examples(count: int) -> ImageSet:
        labels = torch.arange(count) % len(colours)
        noise = torch.from_numpy(generator.integers(-40, 40, size=(count, 3, 32, 32), dtype=np.int8))
        return ImageSet((colours[labels] + noise).to(torch.uint8), labels)  # 0..255: uint8 + int8 is int16

    train, test = (examples(count) for count in SYNTHETIC_SIZES.values())
    classes = tuple(f"colour {label}" for label in range(len(colours)))
    return Dataset("synthetic", train, test, classes, augmentation="crop-flip", crop_padding=4)


def _from_arrays(images: np.ndarray, labels: list[int]) -> ImageSet:
    """uint8 [N, H, W, 3] and a list of labels, as torchvision holds them."""
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


LOADERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "digits": load_digits,
    "cifar100": load_cifar100,
    "synthetic": load_synthetic,
}
