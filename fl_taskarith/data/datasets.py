"""What an image data set is, and how a configuration names one: by a file of `data/sets/`, or as "module:name"."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.config.fields import rules, snake
from fl_taskarith.config.rule import AUTO, shown
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError, DataError, imported, kind_of, listed, own_code

log = logging.getLogger(__name__)

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

    Classes without a training image are named in a warning.

    Raises:
        ConfigError: `name` cannot be imported, or is one's own and raises an error.
        DataError: the data set is not in `data_dir` and may not or cannot be downloaded, is not of that shape, or is
            other than it declares.
    """
    source = image_source(name)
    with own_code("dataset", name):
        loaded = source.load(data_dir, download)
    if not isinstance(loaded, tuple | list) or len(loaded) != 3:
        given = f"{len(loaded)} values" if isinstance(loaded, tuple | list) else kind_of(loaded)
        raise DataError(f'dataset = "{name}" loads {given}: expected a training set, a test set and the class names.')
    train, test, classes = loaded
    _check_declared(name, source, classes)
    for split, part, size in (("train", train, source.train), ("test", test, source.test)):
        _check_part(f'dataset = "{name}"', split, part, len(classes))
        if ":" in name and len(part) != size:  # a stand-in for a published data set may be smaller than that is
            raise DataError(
                f'dataset = "{name}" declares {split} = {size} and loads {len(part)} of these images: declare '
                f"{split} = {len(part)}, by which learning rates and durations are chosen."
            )
    present = set(train.labels.unique().tolist())
    if absent := [word for label, word in enumerate(classes) if label not in present]:
        log.warning('dataset = "%s" has no training image of %d of its classes:%s', name, len(absent), listed(absent))
    return Dataset(name, train, test, tuple(classes), source.augmentation, source.crop_padding)


def _check_declared(name: str, source: ImageSource, classes: object) -> None:
    """Raise DataError if the class names are none or not as many as declared, or the augmentation cannot be done."""
    if not isinstance(classes, tuple | list) or not all(isinstance(each, str) for each in classes):
        raise DataError(f'dataset = "{name}" loads the class names {shown(classes)}: expected a tuple of strings.')
    if len(classes) != source.classes:
        raise DataError(
            f'dataset = "{name}" declares {source.classes} classes and loads {len(classes)} class names: expected one '
            "name for each class."
        )
    known = [word for word in rules()["augmentation"].choices if word != AUTO]
    if source.augmentation not in known:
        raise DataError(
            f'dataset = "{name}" declares augmentation = {shown(source.augmentation)}: expected one of '
            f"{', '.join(known)}."
        )
    padding = source.crop_padding
    if type(padding) is not int or padding < ("crop" in source.augmentation):
        raise DataError(
            f'dataset = "{name}" declares crop_padding = {shown(padding)} and augmentation = "{source.augmentation}": '
            "expected a whole number of pixels, above 0 where images are cropped."
        )


def _check_part(dataset: str, split: str, part: object, classes: int) -> None:
    """Raise DataError unless a part is images, uint8 [N, 3, H, W], at least one, with labels of so many classes."""
    if not isinstance(part, ImageSet):
        raise DataError(f"{dataset} loads its {split} set as {kind_of(part)}: expected an ImageSet.")
    images, labels = part.images, part.labels
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"{dataset} has {split} images {kind_of(images)}: expected a tensor, torch.uint8 [N, 3, H, W].")
    if not images.numel():
        raise DataError(f"{dataset} has no {split} images ({list(images.shape)}): expected at least one.")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(f"{dataset} has {split} labels {kind_of(labels)}: expected torch.int64 [{len(images)}].")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"{dataset} has {split} labels from {labels.min()} to {labels.max()}: expected 0 to {classes - 1}, for "
            f"there are {classes} class names."
        )


def training_images(config: Config) -> int:
    """Count the images that are trained on under these settings, before any is loaded."""
    left = image_source(config.dataset).train - config.validation_size - config.calibration_size
    return config.train_subset or max(left, 1)
