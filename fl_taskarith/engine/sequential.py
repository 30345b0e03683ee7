"""The in-process engine: calls the ClientApp for one virtual client after the other, without copying a tensor."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from flwr.app import Context, Message, RecordDict

from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.replies import answer_to

ClientCallable = Callable[[Message, Context], Message]
Together = Callable[[Sequence[Message]], dict[int, Message]]
"""Replies, by partition, to those of several messages that can be answered in one go."""


class SequentialGrid(PartitionGrid):
    """K virtual clients in this process. `client_app` is the same Flower ClientApp that any other engine runs.

    `together`, if given, gets `at_once` messages at a time (0: all of a round); `client_app` gets those that it leaves.
    """

    def __init__(
        self, client_app: ClientCallable, num_clients: int, together: Together | None = None, at_once: int = 1
    ) -> None:
        ensure_run_identity()
        self._client_app = client_app
        self._num_clients = num_clients
        self._together = together
        self._at_once = at_once if together is not None else 1

    def get_node_ids(self) -> range:
        """Return the partition ids 0..K-1."""
        return range(self._num_clients)

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Call the clients lazily, in order; a reply's tensors may be the model's own, until the next reply."""
        left = iter(messages)
        while cohort := list(islice(left, self._at_once or None)):
            for message in cohort:
                message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ready = self._together(cohort) if self._together is not None and len(cohort) > 1 else {}
            for message in cohort:
                reply = ready.pop(message.metadata.dst_node_id, None)
                yield answer_to(message, self._call) if reply is None else reply

    def _call(self, message: Message) -> Message:
        partition = message.metadata.dst_node_id
        context = Context(
            run_id=message.metadata.run_id,
            node_id=partition,
            node_config={"partition-id": partition, "num-partitions": self._num_clients},
            state=RecordDict(),
            run_config={},
        )
        return self._client_app(message, context)


def ensure_run_identity() -> None:
    """Supply the identity of a run, which Flower's Message constructor reads, outside of a Flower run.

    The class is private to Flower. A Flower without it does not need it here.
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
