"""Tensor files that can tell damage: .safetensors with a checksum of all they hold among their metadata.

A flipped bit in a tensor leaves a file that loads. Files from elsewhere have no seal and are read as they are. Masks
and models of runs also say which run's they are, so that one in the folder of another run is told.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.run_record import check_belongs
from fl_taskarith.storage.verified_files import read_verified

SEAL = "fl_taskarith.sha256"  # key of the metadata
EARLIER_SEAL = "sha256"  # that key before it had a prefix; others use the word too
OURS = ({"architecture", "input_size", "classes", "head"}, {"shapes"}, {"merging"})  # keys that stood beside it
RUN = "fl_taskarith.run"  # key of the metadata: `course_of` the settings of the run that wrote the file
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
BLOCK = 2**24  # bytes read at a time


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a .safetensors file of `tensors` of any shapes, with `metadata` and the seal."""
    return b"".join(_parts(tensors, metadata))


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `sealed` to `path` atomically, tensor by tensor: memory holds one copy of the tensors, of any shapes.

    Raises:
        CheckpointError: the disk is full, the folder read-only, ...; `path` is as it was.
    """
    write_atomically(path, _parts(tensors, metadata))


def without_seal(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata without the checksum that it wrote among them."""
    return {key: value for key, value in metadata.items() if key not in (SEAL, _seal_of(metadata))}


def check_seal(path: Path) -> bool:
    """Whether the .safetensors file at `path` has a seal; reads it block by block.

    Raises:
        ValueError: it has one and is not what was sealed, it is no such file, or it lies in the folder of a run that
            did not write it.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        header = read_header(file)
        metadata = header.get("__metadata__", {})
        check_belongs(path, metadata.get(RUN))
        seal = _seal_of(metadata)
        if not seal:
            return False
        recorded = metadata.pop(seal)
        if not metadata:
            del header["__metadata__"]
        if recorded != _digest(header, _blocks(file.read)):
            raise ValueError(
                "it is changed or damaged: its content has another checksum than when it was written. If the change is "
                f'meant, write it without the key "{seal}" of its metadata'
            )
    return True


def unsealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a .safetensors file of `tensors`, of any shapes, whose name is to carry its checksum."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(on_cpu, None if metadata is None else dict(metadata))


def read_unsealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors, in their shapes, on the CPU, and the metadata of a file whose name carries its checksum.

    None if it is missing, damaged, or no tensor file; nothing in it is ever run as code.
    """
    content = read_verified(path)
    if content is None:
        return None
    try:
        return safetensors.torch.load(content), read_header(io.BytesIO(content)).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError):
        return None


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Return the table of tensors and metadata that an open .safetensors file begins with.

    Raises:
        ValueError: there is none.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError("it does not begin as a .safetensors file does")
    try:
        header: dict[str, Any] = json.loads(file.read(length))
    except RecursionError as error:
        raise ValueError("its header is no table of tensors") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is no table of tensors with metadata of text")
    return header


def _seal_of(metadata: Mapping[str, str]) -> str:
    """Return the key of the seal among a file's metadata, "" if it has none."""
    earlier = EARLIER_SEAL in metadata and any(keys <= metadata.keys() for keys in OURS)
    return SEAL if SEAL in metadata else EARLIER_SEAL if earlier else ""


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the content of the file piece by piece, the tensors ordered as safetensors does."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": facts} if (facts := without_seal(metadata)) else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _spelling(tensors[name].dtype),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    seal = _digest(header, (_bytes(tensors[name]) for name in names))
    head = json.dumps(header | {"__metadata__": facts | {SEAL: seal}}).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name in names:
        yield _bytes(tensors[name])


@cache
def _spelling(dtype: torch.dtype) -> str:
    """Return safetensors' word for a type."""
    content = safetensors.torch.save({"": torch.empty(1, dtype=dtype)})
    return str(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[""]["dtype"])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(header: dict[str, Any], blocks: Iterable[bytes | memoryview]) -> str:
    """Return the checksum of header and bytes; the order in which the header was written does not matter."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks(read: Any) -> Iterator[bytes]:
    while block := read(BLOCK):
        yield block
