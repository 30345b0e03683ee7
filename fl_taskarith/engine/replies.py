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
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Of the tensors that are asked for: type and shape by name."""

log = logging.getLogger(__name__)


class Failures:
    """Reads replies by `on-client-failure`: "stop" raises at a bad one, "skip" logs it and passes it over.

    by_client: the last failure of each client that was passed over since `take` was last called.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.by_client: dict[int, ClientFailure] = {}

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
                self.by_client[reply.metadata.src_node_id] = failure
                log.warning("%s\nThe run goes on without it (on-client-failure = skip).", failure)
                continue
            yield value

    def take(self) -> int:
        """How many clients failed, once for each; counting starts anew."""
        count = len(self.by_client)
        self.by_client = {}
        return count

    def of_all(self, place: str) -> ClientFailure:
        """What to raise where no reply was left; a Divergence if nothing but that was wrong."""
        reasons = list(self.by_client.values())
        diverged = bool(reasons) and all(isinstance(reason, Divergence) for reason in reasons)
        kind = Divergence if diverged else ClientFailure
        return kind(f"{place} got no reply that can be used from any client. {reasons[0] if reasons else ''}".rstrip())


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


def positive(reply: Message, name: str) -> float:
    """One finite number above 0 of a reply's metrics.

    Raises:
        ClientFailure: it is missing, no number, or not above 0.
        Divergence: it is NaN or infinite.
    """
    value = number(reply, name)
    if value <= 0:
        raise ClientFailure(_complaint(reply, f'whose metric "{name}" is {value:g}, and must be above 0'))
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
        ClientFailure: with others, or, where there are any, it does not say.
    """
    name = reply.content.config_records.get("frozen", ConfigRecord()).get("name", "")
    if name != expected:
        raise ClientFailure(_complaint(reply, f"made with another mask or head ({name!r}, not {expected!r})"))


def state_name(reply: Message) -> str | None:
    """The name of the file that the client keeps its state in from now on, if it wrote one.

    Raises:
        ClientFailure: it says that it did, and no name.
    """
    record = reply.content.config_records.get("state")
    if record is None:
        return None
    if not isinstance(name := record.get("name"), str):
        raise ClientFailure(_complaint(reply, "whose state has no name"))
    return name


def tensors_of(reply: Message, key: str, device: torch.device, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a reply's array record `key`, in the order of `layout`.

    Raises:
        ClientFailure: the record is missing or damaged, or its names, types or shapes are not those of `layout`.
    """
    record = reply.content.array_records.get(key)
    if record is None:
        raise ClientFailure(_complaint(reply, f'without the array record "{key}"'))
    if record.keys() != layout.keys():
        different = sorted(record.keys() ^ layout.keys())
        raise ClientFailure(
            _complaint(reply, f'whose "{key}" has other tensors than asked for: {", ".join(different[:5])}')
        )
    try:
        tensors = to_tensors(record, device)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise ClientFailure(_complaint(reply, f'whose "{key}" cannot be read: {error}')) from error
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if found != layout:
        name = next(name for name in layout if found[name] != layout[name])
        about = f'whose "{key}" holds {name} as {_shown(*found[name])}, not as {_shown(*layout[name])}'
        hint = ": was it made under another mask?" if found[name][0] == layout[name][0] else "."
        raise ClientFailure(_complaint(reply, about, hint))
    return {name: tensors[name] for name in layout}


def check_finite(reply: Message, tensors: Mapping[str, Tensor]) -> None:
    """That no entry is NaN or infinite; one synchronisation.

    Raises:
        Divergence: one is.
    """
    if not tensors or bool(torch.stack([value.isfinite().all() for value in tensors.values()]).all()):
        return
    name = next(name for name, value in tensors.items() if not bool(value.isfinite().all()))
    raise Divergence(_complaint(reply, f"with NaN or infinite values in {name}; if it diverged, lower learning-rate"))


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _shown(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _complaint(reply: Message, about: str, end: str = ".") -> str:
    return f"Client {reply.metadata.src_node_id} sent a reply {about}{end}"
