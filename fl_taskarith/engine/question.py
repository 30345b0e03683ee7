"""What clients are asked for, and the one place where a reply is read and held to it.

A client may say anything. So of each number it is known beforehand where it must lie, and of each tensor which type,
shape and norm it has; what can be computed from the tensors (norms, bytes) is computed here and not believed.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from torch import Tensor

from fl_taskarith.engine.records import read_array, tensor_bytes
from fl_taskarith.engine.replies import complaint
from fl_taskarith.errors import Divergence, printable
from fl_taskarith.merging.aggregate import task_vector_norm

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type and shape of each tensor that a reply must have, by name."""

LARGEST_LOSS = 1e9  # beyond it a client has diverged, though its loss is a number
ORIGIN = ("partition-id", "round")  # what every reply of ours says of itself


@dataclass(frozen=True)
class Range:
    """Where a number must lie that a client says.

    whole: it has no fraction. diverges: above the range, or NaN, it shows divergence. length: how many numbers are in
    a list, 0 for one by itself. unknown: NaN is allowed. words: the range in words, if numbers do not tell it.
    """

    low: float
    high: float
    whole: bool = False
    diverges: bool = False
    length: int = 0
    unknown: bool = False
    words: str = ""

    def __str__(self) -> str:
        if self.words:
            return self.words
        kind = "a whole number " if self.whole else ""
        return f"{kind}from {self.low:g} to {self.high:g}" if self.low < self.high else f"{self.low:g}"


EXAMPLES, SECONDS = Range(1, 1e12, whole=True), Range(0.0, math.inf)
SHARE = Range(0.0, 1.0, unknown=True)
LOSS = Range(0.0, LARGEST_LOSS, diverges=True)
WORKED = {"num-examples": EXAMPLES, "train-seconds": SECONDS}


@dataclass(frozen=True)
class Answer:
    """What one client replied, once it is found to be what was asked for.

    Attributes:
        client: its partition.
        numbers: its metrics, and `lists` those of them that are lists.
        tensors: on the device, by the key of their record and by name, in the order of the layout.
        norms: the 2-norm of all tensors of a record together, by its key.
        bytes: of the arrays, as Flower serialises them.
        state: the name of the file that the client keeps its state in from now on, if it wrote one.
    """

    client: int
    numbers: Mapping[str, float]
    lists: Mapping[str, list[float]]
    tensors: Mapping[str, dict[str, Tensor]]
    norms: Mapping[str, float]
    bytes: int
    state: str | None


Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Question:
    """What was asked of some clients in one exchange.

    Attributes:
        number: of the round, which a reply that says one must agree with.
        clients: who was asked; None for anybody.
        numbers: of each metric, where it must lie.
        layouts: of each array record, its tensors.
        largest_norm: from the key of a record, the reply's numbers, and the norms of the records so far, this one's
            included, the largest 2-norm that the record's tensors may have together.
        examples_of: the number of examples of a client, where the server knows it.
        frozen_name: the file of what is fixed in the round, which the reply must name; None where that is no matter.
    """

    number: int
    clients: Collection[int] | None = None
    numbers: Mapping[str, Range] = field(default_factory=lambda: WORKED)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    largest_norm: Callable[[str, Numbers, Numbers], float] = lambda *_: math.inf
    examples_of: Callable[[int], int] | None = None
    frozen_name: str | None = None

    def read(self, reply: Message, device: torch.device, most_seconds: float) -> Answer:
        """Return what the reply holds; `most_seconds` is the longest time that the client can have worked.

        Raises:
            ClientFailure: it is not what was asked for.
            Divergence: a loss or a tensor is NaN, infinite, or far too large.
        """
        client = reply.metadata.src_node_id
        if self.clients is not None and client not in self.clients:
            raise complaint(reply, "and was not asked")
        numbers, lists = self._numbers(reply, most_seconds)
        state = self._state_name(reply)
        records = reply.content.array_records
        if records.keys() != self.layouts.keys():
            names = printable(", ".join(f'"{key}"' for key in sorted(map(str, records))) or "none")
            wanted = ", ".join(f'"{key}"' for key in self.layouts) or "none"
            raise complaint(reply, f"with the array records {names}, not {wanted}")
        tensors, norms = dict[str, dict[str, Tensor]](), dict[str, float]()
        for key, layout in self.layouts.items():
            tensors[key] = tensors_of(reply, records[key], key, device, layout)
            if all(dtype.is_floating_point for dtype, _ in layout.values()):
                norms[key] = task_vector_norm(tensors[key])
                _check_norm(reply, key, tensors[key], norms[key], self.largest_norm(key, numbers, norms))
        sent = sum(map(tensor_bytes, tensors.values()))
        return Answer(client, numbers, lists, tensors, norms, sent, state)

    def _numbers(self, reply: Message, most_seconds: float) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the reply's metrics: those that are numbers, and those that are lists."""
        metrics = reply.content.metric_records.get("metrics")
        if metrics is None:
            raise complaint(reply, "without metrics")
        if more := metrics.keys() - self.numbers.keys() - set(ORIGIN):
            raise complaint(reply, f"with metrics that were not asked for: {printable(', '.join(sorted(more)))}")
        for name, expected in zip(ORIGIN, (reply.metadata.src_node_id, self.number), strict=True):
            if name in metrics and metrics[name] != expected:
                raise complaint(reply, f"with {name} = {printable(metrics[name])}, not {expected}")
        numbers, lists = dict[str, float](), dict[str, list[float]]()
        for name, within in self.numbers.items():
            if name.endswith("-seconds"):
                within = Range(0.0, most_seconds)
            values = self._within(reply, name, metrics.get(name), within)
            if within.length:
                lists[name] = values
            else:
                (numbers[name],) = values
        if self.examples_of is not None and "num-examples" in numbers:
            count, expected = numbers["num-examples"], self.examples_of(reply.metadata.src_node_id)
            if count != expected:
                raise complaint(reply, f"of {count:g} examples, and its shard holds {expected}")
        return numbers, lists

    def _within(self, reply: Message, name: str, value: object, within: Range) -> list[float]:
        """Return the metric `name`, `value`, as a list of numbers that lie where they must."""
        values: list[Any] = value if isinstance(value, list) else [value]
        length = within.length or 1
        if len(values) != length or not all(isinstance(each, int | float) for each in values):
            shown = "number" if length == 1 else f"list of {length} numbers"
            raise complaint(reply, f'whose metric "{name}" is missing or no {shown} ({printable(value)})')
        numbers: list[float] = [float(each) for each in values]
        for each in numbers:
            if within.diverges and not each <= within.high:
                raise Divergence(
                    f"Client {reply.metadata.src_node_id} diverged in round {self.number}: its {name} is {each:g}. "
                    "Lower learning-rate, or add warmup-rounds."
                )
            sound = within.low <= each <= within.high and (not within.whole or each.is_integer())
            if not sound and not (within.unknown and math.isnan(each)):
                raise complaint(reply, f'whose metric "{name}" is {each:g}, and must be {within}')
        return numbers

    def _state_name(self, reply: Message) -> str | None:
        """Return the name of the client's file; check that it worked with the head and mask of this round."""
        records = reply.content.config_records
        if more := records.keys() - {"frozen", "state"}:
            raise complaint(reply, f"with records that were not asked for: {printable(', '.join(sorted(more)))}")
        used = records.get("frozen", ConfigRecord()).get("name", "")
        if self.frozen_name is not None and used != self.frozen_name:
            raise complaint(reply, f"made with another mask or head ({printable(used)}, not {self.frozen_name})")
        if "state" not in records:
            return None
        name = records["state"].get("name")
        if not isinstance(name, str):
            raise complaint(reply, "whose state has no name")
        if not re.fullmatch(rf"round-{self.number:06d}-[0-9a-f]+\.safetensors", name):
            raise complaint(reply, f"whose state is {printable(name)}, and not of round {self.number}")
        return name


def tensors_of(
    reply: Message, record: ArrayRecord, key: str, device: torch.device, layout: Layout
) -> dict[str, Tensor]:
    """Return the tensors of the reply's array record `key` on `device`, in the order, types and shapes of `layout`.

    Raises:
        ClientFailure: it is damaged, or its names, types or shapes are not those of `layout`.
    """
    if record.keys() != layout.keys():
        different = printable(", ".join(sorted(record.keys() ^ layout.keys())[:5]))
        raise complaint(reply, f'whose "{key}" has other tensors than asked for: {different}')
    tensors = {}
    for name, (dtype, shape) in layout.items():
        try:
            tensors[name] = read_array(record[name], dtype, shape).to(device)
        except ValueError as error:
            raise complaint(reply, f'whose "{key}" holds {name} {printable(error)}') from error
    return tensors


def _check_norm(reply: Message, key: str, tensors: Mapping[str, Tensor], norm: float, limit: float) -> None:
    """Check that the 2-norm of the tensors, of any shape, together is no larger than `limit`.

    An entry that is NaN or infinite, or beyond what a sum of squares can hold, makes the norm so as well.
    """
    if norm <= limit and math.isfinite(norm):
        return
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            about = f"with NaN or infinite values in {name}; if it diverged, lower learning-rate"
            raise complaint(reply, about, kind=Divergence)
    true = math.hypot(*(float(torch.linalg.vector_norm(value.double())) for value in tensors.values()))
    about = f'whose "{key}" has norm {true:.3g}, and may have {limit:.3g}; if it diverged, lower learning-rate'
    raise complaint(reply, about, kind=Divergence)


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the type and shape of each tensor."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(value.shape) for name, value in tensors.items()}
