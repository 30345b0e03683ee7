"""The in-process engine: calls the ClientApp for one virtual client after the other, without copying a tensor."""

import uuid
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, Context, Message, RecordDict

from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.records import TensorArray

ClientCallable = Callable[[Message, Context], Message]


class SequentialGrid(PartitionGrid):
    """K virtual clients in this process. `client_app` is the same Flower ClientApp that any other engine runs."""

    def __init__(self, client_app: ClientCallable, num_clients: int) -> None:
        ensure_run_identity()
        self._client_app = client_app
        self._num_clients = num_clients

    def get_node_ids(self) -> range:
        """The partition ids 0..K-1."""
        return range(self._num_clients)

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Call the clients lazily, in order; replies hold the resident model's own tensors until the next one."""
        for message in messages:
            partition = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            context = Context(
                run_id=message.metadata.run_id,
                node_id=partition,
                node_config={"partition-id": partition, "num-partitions": self._num_clients},
                state=RecordDict(),
                run_config={},
            )
            yield self._client_app(message, context)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once, each with tensors of its own, for rules that need them together."""
        return [_with_own_tensors(reply) for reply in self.exchange(messages)]


def _with_own_tensors(reply: Message) -> Message:
    if reply.has_error():
        return reply
    for key, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                if isinstance(array, TensorArray):
                    record[name] = TensorArray(array.tensor.clone())
            reply.content[key] = record
    return reply


def ensure_run_identity() -> None:
    """Flower's Message constructor reads the identity of the current run; outside of one, supply it.

    The class is private to Flower, so its absence is tolerated: then Flower no longer needs it here.
    """
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 0)
