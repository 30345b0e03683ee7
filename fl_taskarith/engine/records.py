"""Tensors in and out of Flower's records.

Flower's `Array` holds `np.save` bytes, so every conversion copies. `TensorArray` holds the tensor itself and makes
those bytes only when somebody asks for them, for instance to send them over a wire.
"""

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from torch import Tensor

NUMPY_STYPE = "numpy.ndarray"  # Flower's name for np.save bytes


class TensorArray(Array):
    """A Flower Array that refers to a tensor instead of copying it.

    Inside one process the reader gets that very tensor. Pickled (Ray) or serialised (a SuperNode), it becomes a plain
    Array with the same dtype, shape and bytes.
    """

    __qualname__ = Array.__qualname__  # the type that Flower writes into what it sends, and looks up where it arrives

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(  # past Array's own bookkeeping, which takes longer than all else here
            tensor=tensor.detach(), dtype=_dtype_name(tensor.dtype), shape=tuple(tensor.shape), stype=NUMPY_STYPE
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The np.save bytes of the tensor, made at each call."""
        return Array(self.tensor).data

    def numpy(self) -> np.ndarray:
        """Return the tensor as an array on the CPU, sharing its memory where it can."""
        return self.tensor.cpu().numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of the tensors, of any shape, by reference and in their order."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = TensorArray(tensor)
    return record


def to_tensors(record: ArrayRecord, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a record on `device`, in their shapes: those it refers to, or copies."""
    return {
        name: (array.tensor if isinstance(array, TensorArray) else torch.from_numpy(array.numpy())).to(device)
        for name, array in record.items()
    }


def read_array(array: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of an array that a client sent, of this type and shape, where the array really holds that.

    What the array says of itself, what the header of its bytes says, and how many bytes there are must all agree with
    what is expected before any memory is taken. The result is the tensor that a `TensorArray` refers to, or a copy.

    Raises:
        ValueError: they do not, or the bytes are no .npy file.
    """
    expected = _shown(_dtype_name(dtype), shape)
    if array.dtype != _dtype_name(dtype):
        raise ValueError(f"as {_shown(array.dtype, array.shape)}, not as {expected}")
    if tuple(array.shape) != shape:
        raise ValueError(f"as {_shown(array.dtype, array.shape)}, not as {expected}: was it made under another mask?")
    if array.stype != NUMPY_STYPE:
        raise ValueError(f"in the form {array.stype!r}, not {NUMPY_STYPE!r}")
    if isinstance(array, TensorArray):
        tensor = array.tensor
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            raise ValueError(f"as a {type(tensor).__name__} that is no plain tensor")
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"as {_shown(_dtype_name(tensor.dtype), tensor.shape)}, not as {expected}")
        return tensor.detach()
    try:
        values = _values(array.data, np.dtype(array.dtype), shape)
    except Exception as error:  # whatever numpy, or Python's parser, makes of the bytes
        raise ValueError(f"in a form that cannot be read: {error}") from error
    return torch.from_numpy(values)


def _values(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return a copy of the values in .npy bytes, after their header and their length are found to be as expected."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
    if read_header is None:
        raise ValueError(f"a .npy file of version {version}")
    told_shape, by_columns, told_dtype = read_header(file)
    if (told_dtype, told_shape) != (dtype, shape):
        raise ValueError(f"a header of {_shown(str(told_dtype), told_shape)}, not of {_shown(str(dtype), shape)}")
    start, count = file.tell(), math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise ValueError(f"{len(data) - start} bytes, not {count * dtype.itemsize}")
    values = np.frombuffer(data, dtype, count, start)
    return values.reshape(shape, order="F" if by_columns else "C").copy(order="C")


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def payload_bytes(record: ArrayRecord) -> int:
    """Return the bytes of the record's arrays as Flower serialises them: Σ (bytes of values + .npy header + name).

    This is `record.count_bytes()` without making the bytes; the headers are 128 bytes each for usual shapes. Message
    metadata (some hundred bytes) and the configuration sent along are not counted.
    """
    return sum(_array_bytes(name, array.dtype, tuple(array.shape)) for name, array in record.items())


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return `payload_bytes` of a record of these tensors, of any shape."""
    return sum(_array_bytes(name, _dtype_name(value.dtype), tuple(value.shape)) for name, value in tensors.items())


def metric(record: MetricRecord, name: str) -> float:
    """Return one number of a MetricRecord, which may hold lists as well.

    Raises:
        TypeError: it is a list.
    """
    value = record[name]
    if isinstance(value, list):
        raise TypeError(f"the metric {name} is a list, expected a number")
    return float(value)


@lru_cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return numpy's name of the type, for example "float32"."""
    return str(dtype).removeprefix("torch.")


def _array_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    return len(name) + _npy_bytes(dtype, shape)


@lru_cache(maxsize=4096)
def _npy_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    header = io.BytesIO()
    descriptor = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, descriptor)
    return len(header.getvalue()) + math.prod(shape) * np.dtype(dtype).itemsize
