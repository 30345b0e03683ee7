"""Tensor files that can tell damage: .safetensors with a checksum of all they hold among their metadata.

A flipped bit in a tensor leaves a file that loads. Files from elsewhere have no seal and are read as they are. Masks
and models of runs also say which run's they are, so that one in the folder of another run is told.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fl_taskarith.storage.run_record import check_belongs

SEAL = "sha256"  # key of the metadata
RUN = "fl_taskarith.run"  # key of the metadata: `course_of` the settings of the run that wrote the file
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
BLOCK = 2**24  # bytes read at a time


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a .safetensors file of contiguous `tensors` of any shapes, with `metadata` and the seal."""
    facts = {key: value for key, value in metadata.items() if key != SEAL}
    plain = safetensors.torch.save(dict(tensors), facts or None)
    start = 8 + int.from_bytes(plain[:8], "little")
    seal = _digest(json.loads(plain[8:start]), [memoryview(plain)[start:]])
    return safetensors.torch.save(dict(tensors), facts | {SEAL: seal})


def check_seal(path: Path) -> bool:
    """Whether the .safetensors file at `path` has a seal; reads it block by block.

    Raises:
        ValueError: it has one and is not what was sealed, it is no such file, or it lies in the folder of a run that
            did not write it.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError("it does not begin as a .safetensors file does")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is no table of tensors") from error
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        check_belongs(path, metadata.get(RUN) if isinstance(metadata, dict) else None)
        if not isinstance(metadata, dict) or SEAL not in metadata:
            return False
        recorded = metadata.pop(SEAL)
        if not metadata:
            del header["__metadata__"]
        if recorded != _digest(header, _blocks(file.read)):
            raise ValueError("it is damaged: its content has another checksum than when it was written")
    return True


def _digest(header: dict[str, Any], blocks: Iterable[bytes | memoryview]) -> str:
    """Return the checksum of header and bytes; the order in which the header was written does not matter."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks(read: Any) -> Iterator[bytes]:
    while block := read(BLOCK):
        yield block
