"""Checks of clients' replies before they are used, and what a run does about a client that fails."""

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
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type and shape of each tensor that a reply must have, by name."""

log = logging.getLogger(__name__)


class Failures:
    """Reads replies by `on-client-failure`: "stop" raises at a bad one, "skip" logs it and goes on without it.

    by_client: the last failure of each client that was skipped since `take` was last called.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.by_client: dict[int, ClientFailure] = {}

    def read(self, replies: Iterable[Message], read: Callable[[Message], Read]) -> Iterator[Read]:
        """Yield `read` of each reply that is no error, in order.

        Raises:
            ClientFailure: under "stop", a reply is an error, or `read` raised one.
        """
        for reply in replies:
            try:
                value = read(checked(reply))
            except ClientFailure as failure:
                if self.policy == "stop":
                    raise
                self.by_client[reply.metadata.src_node_id] = failure
                log.warning("%s\nThe run goes on without it (on-client-failure = skip).", failure)
                continue
            yield value

    def take(self) -> int:
        """Return how many clients failed, each counted once, and forget them."""
        count = len(self.by_client)
        self.by_client = {}
        return count

    def of_all(self, place: str) -> ClientFailure:
        """Return what to raise where no usable reply is left: a Divergence if all clients diverged."""
        reasons = list(self.by_client.values())
        diverged = bool(reasons) and all(isinstance(reason, Divergence) for reason in reasons)
        kind = Divergence if diverged else ClientFailure
        return kind(f"{place} got no reply that can be used from any client. {reasons[0] if reasons else ''}".rstrip())


def checked(reply: Message) -> Message:
    """Return `reply` itself.

    Raises:
        ClientFailure: it carries an error, whose message says why; a Divergence if the client diverged.
    """
    client = reply.metadata.src_node_id
    if reply.has_error() and reply.error.code == DIVERGED:
        raise Divergence(f"Client {client} diverged: {reply.error.reason}")
    if reply.has_error():
        raise ClientFailure(f"Client {client} failed: {reply.error.reason}")
    return reply


def metrics_of(reply: Message) -> MetricRecord:
    """Return the metrics of a reply.

    Raises:
        ClientFailure: it has none.
    """
    metrics = reply.content.metric_records.get("metrics")
    if metrics is None:
        raise ClientFailure(_complaint(reply, "without metrics"))
    return metrics


def number(reply: Message, name: str, above: float = -math.inf) -> float:
    """Return one finite number of a reply's metrics.

    Raises:
        ClientFailure: it is missing, no number, or not above `above`.
        Divergence: it is NaN or infinite.
    """
    metrics = metrics_of(reply)
    try:
        value = metric(metrics, name)
    except (KeyError, TypeError, ValueError) as error:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is missing or no number')) from error
    if not math.isfinite(value):
        raise Divergence(_complaint(reply, f'whose metric "{name}" is {value}; if it diverged, lower learning-rate'))
    if value <= above:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is {value:g}, and must be above {above:g}'))
    return value


def numbers(reply: Message, name: str, length: int) -> list[float]:
    """Return a metric that holds `length` finite numbers, or a single one.

    Raises:
        ClientFailure: it does not.
    """
    value = metrics_of(reply).get(name)
    listed = value if isinstance(value, list) else [value]
    finite = [float(each) for each in listed if isinstance(each, int | float) and math.isfinite(each)]
    if not len(finite) == len(listed) == length:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is {value!r}, not {length} finite numbers'))
    return finite


def check_examples(reply: Message, expected: int) -> None:
    """Check that "num-examples" is the number of examples that the client has, for it is the client's weight.

    Raises:
        ClientFailure: it is another number.
    """
    count = number(reply, "num-examples")
    if count != expected:
        raise ClientFailure(_complaint(reply, f"of {count:g} examples, and its shard holds {expected}"))


def check_frozen(reply: Message, expected: str) -> None:
    """Check that the client worked with the frozen tensors, and so under the mask, of the file `expected`.

    Raises:
        ClientFailure: it worked with others or, where there are any, does not say.
    """
    name = reply.content.config_records.get("frozen", ConfigRecord()).get("name", "")
    if name != expected:
        raise ClientFailure(_complaint(reply, f"made with another mask or head ({name!r}, not {expected!r})"))


def state_name(reply: Message) -> str | None:
    """Return the name of the file that the client keeps its state in from now on, if it wrote one.

    Raises:
        ClientFailure: it wrote a file, and does not name it.
    """
    record = reply.content.config_records.get("state")
    if record is None:
        return None
    if not isinstance(name := record.get("name"), str):
        raise ClientFailure(_complaint(reply, "whose state has no name"))
    return name


def tensors_of(reply: Message, key: str, device: torch.device, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of a reply's array record `key`, in the order, types and shapes of `layout`.

    Raises:
        ClientFailure: the record is missing or damaged, or its names, types or shapes are not those of `layout`.
    """
    record = reply.content.array_records.get(key)
    if record is None:
        raise ClientFailure(_complaint(reply, f'without the array record "{key}"'))
    if record.keys() != layout.keys():
        different = ", ".join(sorted(record.keys() ^ layout.keys())[:5])
        raise ClientFailure(_complaint(reply, f'whose "{key}" has other tensors than asked for: {different}'))
    try:
        tensors = to_tensors(record, device)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ClientFailure(_complaint(reply, f'whose "{key}" cannot be read: {error}')) from error
    for name, (dtype, shape) in layout.items():
        received = tensors[name]
        if (received.dtype, received.shape) != (dtype, shape):
            hint = ": was it made under another mask?" if received.dtype == dtype else "."
            about = f"holds {name} as {_shown(received.dtype, received.shape)}, not as {_shown(dtype, shape)}"
            raise ClientFailure(_complaint(reply, f'whose "{key}" {about}', hint))
    return {name: tensors[name] for name in layout}


def check_finite(reply: Message, tensors: Mapping[str, Tensor]) -> None:
    """Check that no entry of `tensors`, of any shape, is NaN or infinite; one synchronisation.

    Raises:
        Divergence: an entry is.
    """
    if not tensors or bool(torch.stack([value.isfinite().all() for value in tensors.values()]).all()):
        return
    name = next(name for name, value in tensors.items() if not bool(value.isfinite().all()))
    raise Divergence(_complaint(reply, f"with NaN or infinite values in {name}; if it diverged, lower learning-rate"))


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the type and shape of each tensor."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _shown(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _complaint(reply: Message, about: str, end: str = ".") -> str:
    return f"Client {reply.metadata.src_node_id} sent a reply {about}{end}"
