"""A file cache of the frozen blocks' tokens per image and flip, which a run with few trained blocks reads."""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.data.batches import Augmentation
from fl_taskarith.errors import CheckpointError, DataError
from fl_taskarith.storage.files import make_folder, remove_leftovers, replacement, version_of, write_atomically
from fl_taskarith.storage.locks import only_maker
from fl_taskarith.storage.progress import tracked
from fl_taskarith.storage.verified_files import checksum_of_file

Compute = Callable[[Tensor], Tensor]
"""Computes tokens [B, T, d] from stored images, uint8 [B, 3, H, W]."""


CHUNK = {"cpu": 64, "cuda": 512}  # images per pass while the cache is made
GPU_SHARE = 0.5  # of a GPU's memory that the caches of a run may take; larger ones stay on the host

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedInputs:
    """What replaces `Preprocessing` under a prefix cache: model inputs are looked up by position.

    Attributes:
        tokens: [N, T, d] of every image, on `device`, or on the host, where they may be a memory-mapped file.
        mirrored: [M, T, d] of the first M images (the training set) flipped left to right, in the same place; None
            without flips.
        device: where inputs are wanted.
    """

    tokens: Tensor
    mirrored: Tensor | None
    device: torch.device
    crop_padding: ClassVar[int] = 0

    def evaluation_inputs(self, positions: Tensor) -> Tensor:
        """Return the tokens, float32 [B, T, d], of the images at `positions`, int64 [B]."""
        return self.tokens[positions.to(self.tokens.device)].to(self.device).float()

    def training_inputs(self, positions: Tensor, augmentation: Augmentation) -> Tensor:
        """Return the tokens, float32 [B, T, d], of the flipped images where one is drawn; there are no crops."""
        if self.mirrored is None:
            return self.evaluation_inputs(positions)
        here = self.tokens.device
        positions, flipped = positions.to(here), augmentation.mirrored.to(here).view(-1, 1, 1)
        # Both are read: to see which are needed, the host would wait for a GPU at every step.
        return torch.where(flipped, self.mirrored[positions], self.tokens[positions]).to(self.device).float()


def cache_key(parts: Mapping[str, Tensor | str]) -> str:
    """Return 16 hexadecimal digits of a hash over the bits and shapes of all that the tokens depend on, by name."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"|{name}:".encode())
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(part.encode())
    return digest.hexdigest()[:16]


def open_or_make(folder: Path, key: str, images: Tensor, compute: Compute, dtype: str) -> Tensor:
    """Return the tokens [N, T, d] of `images`, memory-mapped from folder/KEY.npy; a missing or damaged file is made.

    Of several processes that want them at once, one computes them, and the others wait.

    Args:
        key: the `cache_key` of everything the tokens depend on.
        images: uint8 [N, 3, H, W].
        dtype: "float16" or "float32", as stored.

    Raises:
        DataError: a token does not fit the dtype.
        CheckpointError: the cache cannot be written; names the path.
    """
    path = folder / f"{key}.npy"
    tokens = _sound_tokens(path, len(images), dtype)
    if tokens is None:
        make_folder(folder)
        with only_maker(path, "computes the tokens"):
            tokens = _sound_tokens(path, len(images), dtype)
            if tokens is None:
                _make(path, images, compute, dtype)
                tokens = _open(path, len(images), dtype)
    if tokens is None:
        raise CheckpointError(f'The cache {path} changed while it was opened: run again, or set prefix-cache = "off".')
    return tokens


def content_of(path: Path) -> str:
    """Return the SHA-256 of a cache that `open_or_make` has opened, as recorded when it was made."""
    return str(json.loads(_record(path).read_text())["sha256"])


def near(caches: Mapping[Path, Tensor], device: torch.device) -> list[Tensor]:
    """Return the tokens [N, T, d] of the caches at these paths on a GPU, once per process, if they fit `GPU_SHARE`.

    Either all are on the GPU or all stay as given, so that a batch can be combined from them. From the host, every step
    would wait for its batch.
    """
    given = list(caches.values())
    if device.type != "cuda":
        return given
    if sum(tokens.nbytes for tokens in given) > GPU_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return given
    try:
        return [_copied(path, version_of(path), device) for path in caches]
    except torch.OutOfMemoryError:
        _copied.cache_clear()
        log.warning("The GPU's memory has no room for %s: batches are copied to it.", ", ".join(map(str, caches)))
        return given


@lru_cache(maxsize=2)  # with flips and without
def _copied(path: Path, _: tuple[int, int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c")).to(device)


def _sound_tokens(path: Path, count: int, dtype: str) -> Tensor | None:
    """Return the tokens in the file, if it is there and its content has the checksum recorded when it was made."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if content_of(path) == _digest(path, version_of(path)):
            return _open(path, count, dtype)
    return None


def _open(path: Path, count: int, dtype: str) -> Tensor | None:
    """Return the tokens in the file; None if it holds anything else, such as pickled objects, which are not loaded."""
    try:
        # Copy-on-write: torch wants a writable array, and nothing written to it may reach the file.
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        return None
    if array.dtype != np.dtype(dtype) or array.ndim != 3 or len(array) != count:
        return None
    return torch.from_numpy(array)


def _make(path: Path, images: Tensor, compute: Compute, dtype: str) -> None:
    """Compute the tokens and write them to `path`, which is the old file or the new one, whatever happens."""
    if path.exists():
        log.warning("The cache %s is damaged, or holds no tokens of %d images; it is rebuilt.", path, len(images))
    remove_leftovers(path.parent)
    log.info("Computing the tokens of %d images, once: %s", len(images), path)
    digest = hashlib.sha256()
    try:
        with replacement(path) as file:  # written, not mapped: a full disk is then an error and not a crash
            for block in _content(images, compute, dtype):
                file.write(block)
                digest.update(block)
            write_atomically(_record(path), json.dumps({"sha256": digest.hexdigest()}) + "\n")
    except OSError as error:
        raise CheckpointError(
            f'Cannot write the cache {path}: {error.strerror or error}. Free some space, or set prefix-cache = "off".'
        ) from error


def _content(images: Tensor, compute: Compute, dtype: str) -> Iterator[bytes]:
    """Yield the parts of a .npy file of the tokens: its header, then those of some images at a time.

    Raises:
        DataError: a token does not fit the dtype.
    """
    kind = np.dtype(dtype)
    shape = (len(images), *compute(images[:1]).shape[1:])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    yield header.getvalue()
    parts = images.split(CHUNK[images.device.type])
    for part in tracked(parts, len(parts), "Tokens of the frozen blocks"):
        tokens = compute(part).float().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = tokens.astype(kind)
        if not np.isfinite(stored).all():
            raise DataError(f'A token of the frozen blocks does not fit {dtype}: set prefix-cache = "float32".')
        yield stored.tobytes()


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


@lru_cache(maxsize=4)  # gigabytes, which a study would otherwise read again for each of its runs
def _digest(path: Path, _: tuple[int, int]) -> str:
    return checksum_of_file(path)
