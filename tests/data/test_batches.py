"""Batches: resizing, augmentation, and which examples a step takes."""

import numpy as np
import pytest
import torch
from conftest import augmented
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from fl_taskarith.data.batches import Preprocessing, batch_positions, crop, flip, resize
from fl_taskarith.seeding import random_generator


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def pillow_resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """torchvision's resize of a PIL image, the one in DINO's and timm's own evaluation transforms."""
    steps = v2.Compose([v2.ToPILImage(), v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC)])
    return torch.stack([v2.functional.pil_to_tensor(steps(image)) for image in images]).float()


@pytest.mark.parametrize("size", [98, 112, 224, 16])
def test_resize_equals_torchvisions(images: torch.Tensor, size: int) -> None:
    ours = resize(images.float(), size)
    theirs = reference.resize(images, [size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True).float()
    assert (ours - theirs).abs().max() <= 1.25, "torchvision rounds to whole grey levels after each of two passes"
    assert (ours - pillow_resized(images, size)).abs().max() <= 1.25, "and so does Pillow"


def test_resize_to_its_own_size_changes_nothing(images: torch.Tensor) -> None:
    assert torch.equal(resize(images.float(), 32), images.float())


def test_crop_and_flip_equal_torchvisions_per_image(images: torch.Tensor) -> None:
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [7, 1]])
    mirrored = torch.tensor([True, False, True, False, True, False])
    ours = flip(crop(images, offsets, padding=4), mirrored)
    for image, (top, left), mirror, result in zip(images, offsets.tolist(), mirrored, ours, strict=True):
        expected = reference.crop(reference.pad(image, [4]), top, left, 32, 32)
        assert torch.equal(result, reference.hflip(expected) if mirror else expected)


def test_inputs_are_normalised_as_torchvision_normalises(images: torch.Tensor) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(images))
    assert torch.allclose(Preprocessing(32, mean, std).evaluation_inputs(images), expected, atol=1e-5)


def test_augmentation_is_a_function_of_the_generator_and_differs_per_image(images: torch.Tensor) -> None:
    preprocessing = Preprocessing(32, (0.0,) * 3, (1.0,) * 3, crop_padding=4, flip=True)
    same = images[:1].expand(64, -1, -1, -1)
    first = augmented(preprocessing, same, random_generator(0, "test"))
    assert torch.equal(first, augmented(preprocessing, same, random_generator(0, "test")))
    assert len(first.flatten(1).unique(dim=0)) > 32


def test_without_augmentation_training_sees_the_evaluation_inputs(images: torch.Tensor) -> None:
    preprocessing = Preprocessing(48, (0.5,) * 3, (0.5,) * 3)
    ours = augmented(preprocessing, images, random_generator(0, "test"))
    assert torch.equal(ours, preprocessing.evaluation_inputs(images))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 12), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_batches_go_through_the_shard_evenly(shard: int, batch: int, steps: int, seed: int) -> None:
    positions = batch_positions(shard, batch, steps, np.random.default_rng(seed))
    assert positions.shape == (steps, min(batch, shard))
    counts = np.bincount(positions.ravel(), minlength=shard)
    assert len(counts) == shard
    assert counts.max() - counts.min() <= 1
