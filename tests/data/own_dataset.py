"""A data set of one's own in one file, CIFAR-10 as its authors pack it: `dataset = "own_dataset:CIFAR10"`."""

import pickle
from pathlib import Path

import numpy as np

from fl_taskarith.data.datasets import ImageSet, ImageSource
from fl_taskarith.errors import DataError

FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def load(data_dir: Path, download: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    folder = data_dir / "cifar-10-batches-py"
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: unpack cifar-10-python.tar.gz in data-dir.")

    def part(names: list[str]) -> ImageSet:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return ImageSet.from_channels_last(pixels, [label for batch in batches for label in batch[b"labels"]])

    names = pickle.loads((folder / "batches.meta").read_bytes(), encoding="bytes")[b"label_names"]
    return part(FILES["train"]), part(FILES["test"]), tuple(name.decode() for name in names)


CIFAR10 = ImageSource("CIFAR-10", "Krizhevsky 2009", 50_000, 10_000, 10, "crop-flip", 4, load)
