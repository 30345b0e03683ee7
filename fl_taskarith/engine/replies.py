"""What clients send back, checked before it is used, and what a run does about a client that fails."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from flwr.app import ConfigRecord, Message, MetricRecord
from torch import Tensor

from fl_taskarith.engine.records import metric, to_tensors
from fl_taskarith.errors import ClientFailure, Divergence

CLIENT_ERROR, DIVERGED, LACKS_FROZEN = 100, 101, 102  # codes of our error replies; Flower's own are below

Read = TypeVar("Read")
Shapes = Mapping[str, tuple[int, ...]]

log = logging.getLogger(__name__)


class Failures:
    """Reads replies by `on-client-failure`: "stop" raises at a bad one, "skip" logs it, counts it and passes it over.

    count: replies passed over since `take` was last called.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.count = 0

    def read(self, replies: Iterable[Message], read: Callable[[Message], Read]) -> Iterator[Read]:
        """`read` of each reply that is no error, in order.

        Raises:
            ClientFailure: by "stop", a reply is an error, or `read` raised one.
        """
        for reply in replies:
            try:
                value = read(checked(reply))
            except ClientFailure as failure:
                if self.policy == "stop":
                    raise
                self.count += 1
                log.warning("%s\nThe run goes on without it (on-client-failure = skip).", failure)
                continue
            yield value

    def take(self) -> int:
        """The count, which starts anew."""
        count, self.count = self.count, 0
        return count


def checked(reply: Message) -> Message:
    """`reply` itself; if it carries an error, ClientFailure or Divergence with the client's own words."""
    client = reply.metadata.src_node_id
    if reply.has_error() and reply.error.code == DIVERGED:
        raise Divergence(f"Client {client} diverged: {reply.error.reason}")
    if reply.has_error():
        raise ClientFailure(f"Client {client} failed: {reply.error.reason}")
    return reply


def told(reply: Message) -> MetricRecord:
    """The metrics of a reply.

    Raises:
        ClientFailure: it has none.
    """
    metrics = reply.content.metric_records.get("metrics")
    if metrics is None:
        raise ClientFailure(_complaint(reply, "without metrics"))
    return metrics


def number(reply: Message, name: str) -> float:
    """One finite number of a reply's metrics.

    Raises:
        ClientFailure: it is missing or no number.
        Divergence: it is NaN or infinite.
    """
    metrics = told(reply)
    try:
        value = metric(metrics, name)
    except (KeyError, TypeError, ValueError) as error:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is missing or no number')) from error
    if not math.isfinite(value):
        raise Divergence(_complaint(reply, f'whose metric "{name}" is {value}; if it diverged, lower learning-rate'))
    return value


def numbers(reply: Message, name: str, length: int) -> list[float]:
    """A metric that holds `length` finite numbers, or one of them by itself.

    Raises:
        ClientFailure: it does not.
    """
    value = told(reply).get(name)
    listed = value if isinstance(value, list) else [value]
    found = [float(each) for each in listed if isinstance(each, int | float) and math.isfinite(each)]
    if not len(found) == len(listed) == length:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is {value!r}, not {length} finite numbers'))
    return found


def check_examples(reply: Message, expected: int) -> None:
    """That "num-examples" is the number of examples that the client has.

    Raises:
        ClientFailure: it is another; it would weigh the client wrongly.
    """
    count = number(reply, "num-examples")
    if count != expected:
        raise ClientFailure(_complaint(reply, f"of {count:g} examples, and its shard holds {expected}"))


def check_frozen(reply: Message, expected: str) -> None:
    """That the client worked with the frozen tensors, and so under the mask, of the file `expected`.

    Raises:
        ClientFailure: with others, or it does not say.
    """
    name = reply.content.config_records.get("frozen", ConfigRecord()).get("name")
    if name != expected:
        raise ClientFailure(_complaint(reply, f"made with another mask or head ({name!r}, not {expected!r})"))


def tensors_of(reply: Message, key: str, device: torch.device, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of a reply's array record `key`, in the order of `shapes`.

    Raises:
        ClientFailure: the record is missing or damaged, or its names, shapes or kind of numbers are not the expected.
    """
    record = reply.content.array_records.get(key)
    if record is None:
        raise ClientFailure(_complaint(reply, f'without the array record "{key}"'))
    if record.keys() != shapes.keys():
        different = sorted(record.keys() ^ shapes.keys())
        raise ClientFailure(
            _complaint(reply, f'whose "{key}" has other tensors than asked for: {", ".join(different[:5])}')
        )
    try:
        tensors = to_tensors(record, device)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ClientFailure(_complaint(reply, f'whose "{key}" cannot be read: {error}')) from error
    for name, shape in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != tuple(shape) or not value.is_floating_point():
            raise ClientFailure(
                _complaint(
                    reply,
                    f'whose "{key}" holds {name} as {value.dtype} of shape {list(value.shape)}, not as floating point '
                    f"of shape {list(shape)}: was it made under another mask?",
                )
            )
    return {name: tensors[name] for name in shapes}


def check_finite(reply: Message, tensors: Mapping[str, Tensor]) -> None:
    """That no entry is NaN or infinite; one synchronisation.

    Raises:
        Divergence: one is.
    """
    if not tensors or bool(torch.stack([value.isfinite().all() for value in tensors.values()]).all()):
        return
    name = next(name for name, value in tensors.items() if not bool(value.isfinite().all()))
    raise Divergence(_complaint(reply, f"with NaN or infinite values in {name}; if it diverged, lower learning-rate"))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _complaint(reply: Message, about: str) -> str:
    return f"Client {reply.metadata.src_node_id} sent a reply {about}."
