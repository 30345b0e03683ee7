"""Tokens of the frozen first blocks, once per image and flip, on disk: what a run with few trained blocks reads instead
of images.
"""

import contextlib
import hashlib
import io
import json
import logging
import re
import time
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
from fl_taskarith.storage.locks import A_DAY, only_maker
from fl_taskarith.storage.progress import tracked

Compute = Callable[[Tensor], Tensor]
"""From stored images, uint8 [B, 3, H, W], to tokens [B, T, d]."""

DTYPES = {"float16": np.float16, "float32": np.float32}
CHUNK = {"cpu": 64, "cuda": 512}  # images per pass while the cache is made
_OLDER = re.compile(r"\.[0-9a-f]{16}\.npy\.\d+\.tmp")
GPU_SHARE = 0.5  # of a GPU's memory that the caches of a run may take; larger ones stay on the host

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedInputs:
    """In place of `Preprocessing`: model inputs are looked up by position instead of computed from images.

    tokens: [N, T, d] of every image; mirrored: [M, T, d] of the first M images (the training set) flipped left to
    right, or None without flips; both on `device`, or both on the host, where they may be memory-mapped files. device:
    where inputs are wanted.
    """

    tokens: Tensor
    mirrored: Tensor | None
    device: torch.device
    crop_padding: ClassVar[int] = 0

    def evaluation_inputs(self, positions: Tensor) -> Tensor:
        """Positions int64 [B] to tokens float32 [B, T, d]."""
        return self.tokens[positions.to(self.tokens.device)].to(self.device).float()

    def training_inputs(self, positions: Tensor, augmentation: Augmentation) -> Tensor:
        """The same, of the flipped image where one is drawn; crops are not offered."""
        if self.mirrored is None:
            return self.evaluation_inputs(positions)
        here = self.tokens.device
        positions, flipped = positions.to(here), augmentation.mirrored.to(here).view(-1, 1, 1)
        # Both are read: to look which are needed, the host would wait for a GPU at every step.
        return torch.where(flipped, self.mirrored[positions], self.tokens[positions]).to(self.device).float()


def cache_key(parts: Mapping[str, Tensor | str]) -> str:
    """16 hexadecimal digits over the exact bits of everything the tokens depend on, by name."""
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
    """Tokens [N, T, d] of `images`, memory-mapped from folder/KEY.npy; made there if missing, cut short or damaged.

    Of several processes that want them at once, one computes them, and the others wait.

    Args:
        folder: of all caches.
        key: of everything the tokens depend on (`cache_key`).
        images: uint8 [N, 3, H, W].
        compute: tokens of a part of them.
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
    """The SHA-256 of a cache that `open_or_make` has opened, as recorded when it was made."""
    return str(json.loads(_record(path).read_text())["sha256"])


def near(caches: Mapping[Path, Tensor], device: torch.device) -> list[Tensor]:
    """The tokens of the caches at these paths on a GPU, once per process, if they take little of its memory.

    All or none, so that a batch can be put together of them; else as given. From the host, every step would wait for
    its batch.
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
    """The tokens in the file, if it is there and its content has the checksum recorded when it was made."""
    try:
        recorded = json.loads(_record(path).read_text())["sha256"]
        sound = bool(recorded == _digest(path, version_of(path)))
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    return _open(path, count, dtype) if sound else None


def _open(path: Path, count: int, dtype: str) -> Tensor | None:
    """The tokens in the file; None if it holds anything else, pickled objects among it, which are not loaded."""
    try:
        # Copy-on-write: torch wants a writable array, and nothing written to it may reach the file.
        array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError):
        return None
    if array.dtype != DTYPES[dtype] or array.ndim != 3 or len(array) != count:
        return None
    return torch.from_numpy(array)


def _make(path: Path, images: Tensor, compute: Compute, dtype: str) -> None:
    """Compute the tokens and write them to `path`, which is the old file or the new one, whatever happens."""
    if path.exists():
        log.warning("The cache %s is damaged, or holds no tokens of %d images; it is made anew.", path, len(images))
    remove_leftovers(path.parent)
    _remove_older_leftovers(path.parent)
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
    """The parts of a .npy file of the tokens: its header, then those of some images at a time.

    Raises:
        DataError: a token does not fit the dtype.
    """
    kind = np.dtype(DTYPES[dtype])
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


def _remove_older_leftovers(folder: Path) -> None:
    """Remove what killed processes of earlier versions left, `.KEY.npy.PID.tmp`, unless it was written to today."""
    for path in folder.glob(".*.npy.*.tmp"):
        with contextlib.suppress(OSError):
            if _OLDER.fullmatch(path.name) and time.time() - path.lstat().st_mtime > A_DAY:
                path.unlink()


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


@lru_cache(maxsize=4)  # gigabytes, that a study would read anew for each of its runs
def _digest(path: Path, _: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file.read):
            digest.update(block)
    return digest.hexdigest()


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(2**24):
        yield block
