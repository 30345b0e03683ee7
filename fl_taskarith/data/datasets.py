"""What an image data set is, and how a configuration names one: by a file of `data/sets/`, or as "module:name"."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.config.fields import snake
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError, DataError, imported

SPLIT_SEED = 0  # splits are the same in every run, whatever the federation's seed


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 [N, 3, H, W], and labels, int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    @classmethod
    def from_channels_last(cls, images: np.ndarray, labels: list[int]) -> "ImageSet":
        """Return the set of images uint8 [N, H, W, 3] and their labels, as torchvision's CIFAR classes hold them."""
        return cls(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "ImageSet":
        """Return the examples at `indices`, int64 [n]."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "ImageSet":
        """Return the same N examples, images [N, 3, H, W], on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSource:
    """A data set before it is loaded.

    Attributes:
        words: its name in a sentence.
        source: the paper or address that it comes from.
        train, test, classes: how many training images, test images and classes it has.
        augmentation: customary for its training images: "none", "flip", "crop" or "crop-flip".
        crop_padding: of random crops, in pixels of the stored image.
        load: returns the training set, the test set and the class names from the folder `data-dir`, and may download
            them to it if its second argument is true; raises DataError where they are not to be had.
    """

    words: str
    source: str
    train: int
    test: int
    classes: int
    augmentation: str
    crop_padding: int
    load: Callable[[Path, bool], tuple[ImageSet, ImageSet, tuple[str, ...]]]


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, the class names, and the augmentation customary for this data set."""

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    augmentation: str
    crop_padding: int


def image_source(name: str) -> ImageSource:
    """Return the data set that a configuration's `dataset` names.

    Raises:
        ConfigError: "module:name" cannot be imported, or is no ImageSource.
    """
    source = imported("dataset", name if ":" in name else f"fl_taskarith.data.sets.{snake(name)}:DATASET")
    if not isinstance(source, ImageSource):
        raise ConfigError(
            f'dataset = "{name}" is no data set: expected an instance of fl_taskarith.data.datasets.ImageSource.'
        )
    return source


def dataset_words(name: str) -> str:
    """Return what a sentence calls a data set: `name` itself where nothing says more."""
    try:
        return image_source(name).words
    except ConfigError:
        return name


def load_dataset(name: str, data_dir: Path, download: bool) -> Dataset:
    """Load the data set that a configuration's `dataset` names; its images are uint8 [N, 3, H, W].

    Raises:
        ConfigError: `name` cannot be imported.
        DataError: the data set is not in `data_dir` and may not or cannot be downloaded, or is not of that shape.
    """
    source = image_source(name)
    train, test, classes = source.load(data_dir, download)
    for part in (train, test):
        if part.images.dtype != torch.uint8 or part.images.ndim != 4 or part.images.shape[1] != 3:
            raise DataError(
                f'dataset = "{name}" has images {part.images.dtype} {list(part.images.shape)}: expected torch.uint8 '
                "[N, 3, H, W]."
            )
        if part.labels.shape != part.images.shape[:1] or not 0 <= part.labels.min() <= part.labels.max() < len(classes):
            raise DataError(f'dataset = "{name}" needs a label from 0 to {len(classes) - 1} for every image.')
    return Dataset(name, train, test, classes, source.augmentation, source.crop_padding)


def training_images(config: Config) -> int:
    """Count the images that are trained on under these settings, before any is loaded."""
    left = image_source(config.dataset).train - config.validation_size - config.calibration_size
    return config.train_subset or max(left, 1)
