"""CIFAR-100 through torchvision: 32x32 pixels, 100 classes."""

from pathlib import Path

from fl_taskarith.data.datasets import ImageSet, ImageSource
from fl_taskarith.errors import DataError


def load(data_dir: Path, download: bool) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Load CIFAR-100 from `data_dir`, downloading it where allowed: images uint8 [N, 3, 32, 32].

    Raises:
        DataError: it is not there, and may not or cannot be downloaded.
    """
    from torchvision.datasets import CIFAR100

    try:
        train, test = (CIFAR100(str(data_dir), train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, the download OSError or URLError
        raise DataError(
            f"CIFAR-100 cannot be loaded from {data_dir} ({error}). Expected there: the folder cifar-100-python with "
            "the files train, test and meta, unpacked from cifar-100-python.tar.gz. Put it there, or name the folder "
            "that holds it in data-dir, or set download = true on a machine with internet access."
        ) from error
    train_set, test_set = (ImageSet.from_channels_last(part.data, part.targets) for part in (train, test))
    return train_set, test_set, tuple(train.classes)


DATASET = ImageSource(
    words="CIFAR-100",
    source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    train=50_000,
    test=10_000,
    classes=100,
    augmentation="crop-flip",
    crop_padding=4,
    load=load,
)
