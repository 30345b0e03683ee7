"""From uint8 images on the device to batches of normalised model inputs, without PIL and without worker processes."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Augmentation:
    """The random part of a batch: crop offsets, int64 [B, 2] from 0 to twice the padding, and flips, bool [B]."""

    offsets: Tensor
    mirrored: Tensor


def draw_augmentations(
    steps: int, batch: int, padding: int, generator: np.random.Generator, device: torch.device
) -> list[Augmentation]:
    """Draw one for each step, moved to the device together, so that no step waits for the host."""
    draws = [(generator.integers(0, 2 * padding + 1, size=(batch, 2)), generator.random(batch)) for _ in range(steps)]
    offsets = torch.from_numpy(np.stack([offset for offset, _ in draws])).to(device)
    mirrored = torch.from_numpy(np.stack([chance for _, chance in draws]) < 0.5).to(device)
    return [Augmentation(*drawn) for drawn in zip(offsets, mirrored, strict=True)]


@dataclass(frozen=True)
class Preprocessing:
    """Everything between stored images and the model: input side in pixels, channel statistics, augmentation.

    `mean` and `std` are those of pixel values in [0, 1], as timm states them. `crop_padding` is in pixels of the stored
    image; 0 means no random crop.
    """

    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_padding: int = 0
    flip: bool = False

    def evaluation_inputs(self, images: Tensor) -> Tensor:
        """Resize and normalise images, uint8 [B, 3, H, W]: float32 [B, 3, input_size, input_size]."""
        pixels = resize(images.float(), self.input_size)
        return (pixels - _channels(self.mean, pixels.device)) / _channels(self.std, pixels.device)

    def training_inputs(self, images: Tensor, augmentation: Augmentation) -> Tensor:
        """Crop and flip images, uint8 [B, 3, H, W], as drawn, then resize and normalise them as for evaluation."""
        if self.crop_padding:
            images = crop(images, augmentation.offsets, self.crop_padding)
        if self.flip:
            images = flip(images, augmentation.mirrored)
        return self.evaluation_inputs(images)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return channel statistics scaled from [0, 1] to [0, 255], [1, 3, 1, 1]; cached, for copies make the host wait."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize float32 [B, C, H, W] in [0, 255] to [B, C, size, size]: bicubic, antialiased, as Pillow does 8-bit images.

    Like Pillow: columns first, clamped after each pass, a = -0.5 (torch's kernel with antialiasing). Unlike it, without
    rounding to whole grey levels.
    """
    height = pixels.shape[-2]
    for target in ((height, size), (size, size)):
        if pixels.shape[-2:] != target:
            pixels = functional.interpolate(pixels, size=target, mode="bicubic", antialias=True).clamp_(0, 255)
    return pixels


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Zero-pad by `padding` on every side, then cut [H, W] at each image's (row, column): `offsets`, int64 [B, 2]."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right the images [B, C, H, W] where `mirrored`, bool [B], holds."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def batch_positions(shard_size: int, batch_size: int, steps: int, generator: np.random.Generator) -> np.ndarray:
    """Draw positions into a shard for each local step: int64 [steps, min(batch_size, shard_size)].

    The steps pass through the shard in one random order after another, so no example is used more than once more often
    than another.
    """
    batch = min(batch_size, shard_size)
    passes = -(-steps * batch // shard_size)
    order = np.concatenate([generator.permutation(shard_size) for _ in range(passes)])
    return order[: steps * batch].reshape(steps, batch)
