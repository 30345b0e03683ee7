"""Noise around one colour per class in the shape of CIFAR-100, for benchmarks and tests: no result comes of it."""

from pathlib import Path

import numpy as np
import torch

from fl_taskarith.data.datasets import ImageSet, ImageSource

TRAIN, TEST, CLASSES = 10_000, 1_000, 100


def load(data_dir: Path, download: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Draw the images, uint8 [N, 3, 32, 32], the same ones every time."""
    generator = np.random.default_rng(0)
    colours = torch.from_numpy(generator.integers(40, 216, size=(CLASSES, 3, 1, 1), dtype=np.uint8))

    def examples(count: int) -> ImageSet:
        labels = torch.arange(count) % CLASSES
        noise = torch.from_numpy(generator.integers(-40, 40, size=(count, 3, 32, 32), dtype=np.int8))
        return ImageSet((colours[labels] + noise).to(torch.uint8), labels)  # 0..255: uint8 + int8 is int16

    return examples(TRAIN), examples(TEST), tuple(f"colour {label}" for label in range(CLASSES))


DATASET = ImageSource(
    words="synthetic images",
    source="drawn by this file",
    train=TRAIN,
    test=TEST,
    classes=CLASSES,
    augmentation="crop-flip",
    crop_padding=4,
    load=load,
)
