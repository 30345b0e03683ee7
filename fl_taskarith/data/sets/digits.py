"""scikit-learn's 1,797 handwritten digits: 8x8 pixels, grey levels 0..16 scaled to 0..255, three equal channels."""

from pathlib import Path

import numpy as np
import torch

from fl_taskarith.data.datasets import SPLIT_SEED, ImageSet, ImageSource
from fl_taskarith.data.splits import stratified_sample

TEST_SIZE = 360  # one fifth of the images; scikit-learn ships no official test set


def load(data_dir: Path, download: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Load the digits from scikit-learn: images uint8 [N, 3, 8, 8]."""
    from sklearn.datasets import load_digits  # takes a second, which the numbers below do not need

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))
    everything = ImageSet(grey[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target.astype(np.int64)))
    test = stratified_sample(everything.labels.numpy(), TEST_SIZE, SPLIT_SEED)
    train = np.setdiff1d(np.arange(len(everything)), test)
    train_set, test_set = (everything.take(torch.from_numpy(positions)) for positions in (train, test))
    return train_set, test_set, tuple(str(digit) for digit in range(10))


DATASET = ImageSource(
    words="handwritten digits",
    source="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
    train=1_437,
    test=TEST_SIZE,
    classes=10,
    augmentation="none",  # a mirrored digit is no digit, and at 8 pixels a shift cuts strokes off
    crop_padding=1,
    load=load,
)
