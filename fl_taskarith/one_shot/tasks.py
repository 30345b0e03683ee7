"""Tasks made from the data at hand, more or less unlike each other.

`overlap` is the share of every task's examples that come from what all tasks have in common: for class groups, from all
classes; for rotations and inversions, untransformed images. At 1 the tasks are iid parts of one data set, at 0 they
have no class, or no transformation, in common.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, rotate

from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError, DataError
from fl_taskarith.seeding import random_generator
from fl_taskarith.workspace.workspace import Data

FAMILIES = ("class-groups", "superclasses", "rotations", "inversions", "folders")
SPLITS = ("train", "validation", "test")
FOLDER_VALIDATION = 0.1  # share of a folder's training images on which choices are made
FULL_TURN = 360.0

SUPERCLASSES: dict[str, list[str]] = tomllib.loads(
    Path(__file__).with_name("superclasses.toml").read_text(encoding="utf-8")
)

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One task: its examples, and what their labels mean."""

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet


def make_tasks(data: Data, family: str, number: int, overlap: float, seed: int) -> list[Task]:
    """Make T tasks of a family from the splits of one data set; a function of (family, T, overlap, seed).

    Training examples have one owner each. Class groups divide validation and test images as well; every rotation or
    inversion is evaluated on all of them.

    Raises:
        ConfigError: more tasks than the family has, or another data set's superclasses.
    """
    if family in ("rotations", "inversions"):
        return _transformed(data, _transforms(family, number), overlap, seed)
    groups = _superclass_groups(data, number) if family == "superclasses" else _class_groups(data, number, seed)
    group_of = torch.empty(len(data.dataset.classes), dtype=torch.int64)
    for index, labels in enumerate(groups.values()):
        group_of[torch.tensor(labels)] = index
    parts: list[list[ImageSet]] = [[] for _ in groups]
    for split in SPLITS:
        examples: ImageSet = getattr(data, split)
        owners = _owners(examples.labels.cpu(), group_of, number, overlap, seed, split)
        for index, part in enumerate(parts):
            part.append(examples.take((owners == index).nonzero().flatten()))
    return [Task(name, data.dataset.classes, *part) for name, part in zip(groups, parts, strict=True)]


def folder_tasks(folders: Sequence[Path], size: int, device: torch.device, seed: int) -> list[Task]:
    """Make a task per folder, which holds train/CLASS/* and test/CLASS/* (torchvision's ImageFolder), at `size` px.

    The shorter side is resized to `size` and the centre kept. A tenth of the training images are for validation.

    Raises:
        DataError: a folder lacks them, or both have not the same classes.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    prepare = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    tasks = []
    for folder in folders:
        try:
            train, test = (ImageFolder(str(folder / split), prepare) for split in ("train", "test"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: {error}. Expected train/CLASS/* and test/CLASS/* with images.") from error
        if train.classes != test.classes:
            raise DataError(f"{folder}: train/ and test/ have different classes.")
        examples = _read(train)
        order = random_generator(seed, f"folder validation {folder.name}").permutation(len(examples))
        held_out = torch.from_numpy(np.sort(order[: max(1, round(FOLDER_VALIDATION * len(order)))]))
        rest = torch.from_numpy(np.sort(order[len(held_out) :]))
        parts = (part.to(device) for part in (examples.take(rest), examples.take(held_out), _read(test)))
        tasks.append(Task(folder.name, tuple(train.classes), *parts))
    return tasks


def _read(folder: Sequence[tuple[Tensor, int]]) -> ImageSet:
    images, labels = zip(*(folder[index] for index in range(len(folder))), strict=True)
    return ImageSet(torch.stack(images), torch.tensor(labels))


def _class_groups(data: Data, number: int, seed: int) -> dict[str, list[int]]:
    """Return the labels of all classes, in random order, in T groups of equal size ±1, by the group's name."""
    classes = data.dataset.classes
    if not 2 <= number <= len(classes):
        raise ConfigError(f"{number} tasks from {len(classes)} classes: expected 2 to {len(classes)}.")
    order = random_generator(seed, "class groups").permutation(len(classes))
    groups = [sorted(part.tolist()) for part in np.array_split(order, number)]
    return {"classes " + ", ".join(classes[label] for label in group): group for group in groups}


def _superclass_groups(data: Data, number: int) -> dict[str, list[int]]:
    classes = data.dataset.classes
    if set(classes) != {name for names in SUPERCLASSES.values() for name in names}:
        raise ConfigError(f'family = "superclasses" groups the classes of cifar100, not those of {data.dataset.name}.')
    if number != len(SUPERCLASSES):
        raise ConfigError(f"There are {len(SUPERCLASSES)} superclasses, so number = {number} is not possible.")
    return {name: [classes.index(each) for each in members] for name, members in SUPERCLASSES.items()}


def _owners(labels: Tensor, group_of: Tensor, number: int, overlap: float, seed: int, split: str) -> Tensor:
    """Return the task of each example, int64 [n]: its class's group, or evenly for a share `overlap` of every class."""
    generator = random_generator(seed, f"task overlap {split}")
    owners = group_of[labels]
    for label in labels.unique().tolist():
        positions = torch.from_numpy(generator.permutation((labels == label).nonzero().flatten().numpy()))
        common = positions[: round(overlap * len(positions))]
        first = int(generator.integers(number))  # else the first tasks would get the odd ones of every class
        owners[common] = (torch.arange(len(common)) + first) % number
    return owners


def _transforms(family: str, number: int) -> dict[str, Transform]:
    """Return T rotations by equal parts of a full turn; or quarter turns and their inversions in brightness, T <= 8."""
    if family == "rotations":
        if number < 2:
            raise ConfigError(f"number = {number}: expected at least 2 rotations.")
        return {f"rotated by {angle:g}°": _rotation(angle) for angle in (FULL_TURN * k / number for k in range(number))}
    if not 2 <= number <= 8:
        raise ConfigError(f"number = {number}: expected 2 to 8 tasks of inverted and turned images.")
    turned: dict[str, Transform] = {}
    for quarter in range(4):
        turn = _rotation(90.0 * quarter)
        turned[f"turned by {90 * quarter}°"] = turn
        turned[f"turned by {90 * quarter}° and inverted"] = lambda images, turn=turn: 255 - turn(images)  # type: ignore[misc]
    return dict(list(turned.items())[:number])


def _rotation(angle: float) -> Transform:
    if angle % 90 == 0:
        return lambda images: torch.rot90(images, round(angle / 90), (-2, -1))  # no interpolation
    return lambda images: rotate(images, angle, InterpolationMode.BILINEAR)


def _transformed(data: Data, transforms: dict[str, Transform], overlap: float, seed: int) -> list[Task]:
    no_group = torch.zeros(len(data.dataset.classes), dtype=torch.int64)
    owners = _owners(data.train.labels.cpu(), no_group, len(transforms), 1.0, seed, "train")
    tasks = []
    for index, (name, transform) in enumerate(transforms.items()):
        parts = []
        for split in SPLITS:
            examples: ImageSet = getattr(data, split)
            if split == "train":
                examples = examples.take((owners == index).nonzero().flatten())
            generator = random_generator(seed, f"task overlap {split}", 0, index)
            plain = torch.from_numpy(generator.permutation(len(examples))[: round(overlap * len(examples))])
            images = transform(examples.images)
            images[plain.to(images.device)] = examples.images[plain.to(images.device)]
            parts.append(ImageSet(images, examples.labels))
        tasks.append(Task(name, data.dataset.classes, *parts))
    return tasks
