"""The tasks of a one-shot benchmark."""

import pickle
from pathlib import Path

import pytest
import torch
from conftest import real_data_folder
from PIL import Image

from fl_taskarith.config.settings import load
from fl_taskarith.errors import ConfigError, DataError
from fl_taskarith.one_shot.tasks import SPLITS, SUPERCLASSES, folder_tasks, make_tasks
from fl_taskarith.workspace.workspace import Data, workspace

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Data:
    return workspace(load(overrides={"calibration_size": 0, "mask_rule": "none"})).data


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_class_groups_divide_every_split_and_overlap_as_told(digits: Data, overlap: float) -> None:
    tasks = make_tasks(digits, "class-groups", 5, overlap, seed=1)
    for split in SPLITS:
        whole = getattr(digits, split)
        parts = [getattr(task, split) for task in tasks]
        assert sum(map(len, parts)) == len(whole)
        pixels = torch.cat([part.images for part in parts]).flatten(1)
        assert torch.equal(pixels.sum(1).sort().values, whole.images.flatten(1).sum(1).sort().values)
        assert max(map(len, parts)) - min(map(len, parts)) < 0.1 * len(whole)
    own = [set(task.name.removeprefix("classes ").split(", ")) for task in tasks]
    assert sorted(name for names in own for name in names) == [str(digit) for digit in range(10)]
    for task, names in zip(tasks, own, strict=True):
        inside = torch.isin(task.train.labels, torch.tensor([int(name) for name in names])).double().mean().item()
        assert inside == pytest.approx(1 - overlap + overlap / 5, abs=0.03)


def test_tasks_are_a_function_of_their_seed(digits: Data) -> None:
    first, same, other = (make_tasks(digits, "class-groups", 5, 0.5, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.train.images, b.train.images) for a, b in zip(first, same, strict=True))
    assert [task.name for task in first] != [task.name for task in other]


def test_inverted_and_turned_images_are_those(digits: Data) -> None:
    tasks = make_tasks(digits, "inversions", 4, 0.0, seed=0)
    assert [task.name for task in tasks] == [
        "turned by 0°", "turned by 0° and inverted", "turned by 90°", "turned by 90° and inverted",
    ]  # fmt: skip
    images = digits.test.images
    expected = [images, 255 - images, images.rot90(1, (-2, -1)), 255 - images.rot90(1, (-2, -1))]
    for task, each in zip(tasks, expected, strict=True):
        assert torch.equal(task.test.images, each)
        assert torch.equal(task.test.labels, digits.test.labels)
    assert sum(len(task.train) for task in tasks) == len(digits.train), "a training image belongs to one task"
    half = make_tasks(digits, "inversions", 4, 0.5, seed=0)[1].test.images
    plain = (half == images).flatten(1).all(1)
    assert plain.double().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(half[~plain], 255 - images[~plain])
    assert all(torch.equal(task.test.images, images) for task in make_tasks(digits, "inversions", 8, 1.0, seed=0))


def test_rotations_are_equal_parts_of_a_turn(digits: Data) -> None:
    tasks = make_tasks(digits, "rotations", 4, 0.0, seed=0)
    for quarter, task in enumerate(tasks):
        assert torch.equal(task.test.images, digits.test.images.rot90(quarter, (-2, -1)))
    assert len(make_tasks(digits, "rotations", 5, 0.0, seed=0)[1].test) == len(digits.test)


@pytest.mark.parametrize(
    ("family", "number"), [("class-groups", 11), ("class-groups", 1), ("superclasses", 20), ("inversions", 9),
                           ("rotations", 1)],
)  # fmt: skip
def test_tasks_that_there_are_not_are_refused(digits: Data, family: str, number: int) -> None:
    with pytest.raises(ConfigError):
        make_tasks(digits, family, number, 0.0, seed=0)


def test_the_superclasses_are_cifar100s() -> None:
    names = sorted(name for members in SUPERCLASSES.values() for name in members)
    assert len(SUPERCLASSES) == 20
    assert len(set(names)) == 100
    folder = real_data_folder()
    if folder is None:
        pytest.skip("the real CIFAR-100 is not at hand")
    meta, test = (pickle.loads((folder / "cifar-100-python" / name).read_bytes(), encoding="latin1")
                  for name in ("meta", "test"))  # fmt: skip
    grouped: dict[int, set[str]] = {}
    for coarse, fine in zip(test["coarse_labels"], test["fine_labels"], strict=True):
        grouped.setdefault(coarse, set()).add(meta["fine_label_names"][fine])
    assert {frozenset(group) for group in grouped.values()} == {frozenset(group) for group in SUPERCLASSES.values()}


def test_folders_of_images_are_tasks(tmp_path: Path) -> None:
    for data_set, colours in (("cars", (0, 255)), ("dogs", (30, 90, 200))):
        for split, count in (("train", 10), ("test", 4)):
            for colour in colours:
                folder = tmp_path / data_set / split / f"colour {colour}"
                folder.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (20 + number, 12), (colour, colour, colour)).save(folder / f"{number}.png")
    tasks = folder_tasks([tmp_path / "cars", tmp_path / "dogs"], 8, CPU, seed=0)
    assert [(task.name, len(task.classes)) for task in tasks] == [("cars", 2), ("dogs", 3)]
    assert [len(getattr(tasks[1], split)) for split in SPLITS] == [27, 3, 12]
    assert tasks[0].test.images.shape == (8, 3, 8, 8)
    assert {(int(image.unique()), int(label)) for image, label in
            zip(tasks[0].test.images, tasks[0].test.labels, strict=True)} == {(0, 0), (255, 1)}  # fmt: skip
    with pytest.raises(DataError, match="train/CLASS"):
        folder_tasks([tmp_path], 8, CPU, seed=0)
