"""What a run does about a client that fails: whatever goes wrong while one reply is read is that client's failure."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from flwr.app import Error, Message

from fl_taskarith.errors import ClientFailure, Divergence, named_error, printable

CLIENT_ERROR, DIVERGED, LACKS_FROZEN = 100, 101, 102  # codes of our error replies; Flower's own are below
LATE = 1.0  # seconds that a client may state beyond those measured here

Read = TypeVar("Read")

log = logging.getLogger(__name__)


class Failures:
    """Reads replies by `on-client-failure`: "stop" raises at a bad one, "skip" logs it and goes on without it.

    by_client: the last failure of each client that was skipped since `take` was last called.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.by_client: dict[int, ClientFailure] = {}
        self._asked_at = time.perf_counter()

    def read(self, replies: Iterable[Message], read: Callable[[Message], Read]) -> Iterator[Read]:
        """Yield `read` of each reply that is no error, in order; of two replies from one client the first counts.

        Raises:
            ClientFailure: under "stop", a reply is an error, or anything at all went wrong in `read`.
        """
        self._asked_at, heard = time.perf_counter(), set[int]()
        for reply in replies:
            try:
                if reply.metadata.src_node_id in heard:
                    raise complaint(reply, "a second time")
                heard.add(reply.metadata.src_node_id)
                value = guarded(reply, lambda message: read(checked(message)))
            except ClientFailure as failure:
                if self.policy == "stop":
                    raise
                self.by_client[reply.metadata.src_node_id] = failure
                log.warning("%s\nThe run goes on without it (on-client-failure = skip).", failure)
                continue
            yield value

    @property
    def most_seconds(self) -> float:
        """The most seconds that a client can have worked: since the replies that are being read were asked for."""
        return 1.1 * (time.perf_counter() - self._asked_at) + LATE

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


def guarded(reply: Message, read: Callable[[Message], Read]) -> Read:
    """Return `read` of the reply.

    Raises:
        ClientFailure: whatever was raised, but for Ctrl-C, named by the client.
    """
    try:
        return read(reply)
    except (ClientFailure, KeyboardInterrupt):
        raise
    except BaseException as error:
        log.debug("The reply of client %s:", reply.metadata.src_node_id, exc_info=True)
        raise complaint(reply, f"that cannot be used ({named_error(error)})") from error


def checked(reply: Message) -> Message:
    """Return `reply` itself.

    Raises:
        ClientFailure: it carries an error, whose message says why; a Divergence if the client diverged.
    """
    client = reply.metadata.src_node_id
    if reply.has_error() and reply.error.code == DIVERGED:
        raise Divergence(f"Client {client} diverged: {printable(reply.error.reason)}")
    if reply.has_error():
        raise ClientFailure(f"Client {client} failed: {printable(reply.error.reason)}")
    return reply


def answer_to(message: Message, ask: Callable[[Message], object]) -> Message:
    """Return what `ask`, which calls a client in this process, replies to the message; else a reply with an error.

    The error says what the client raised, or that it replied to another message. Ctrl-C is raised again.
    """
    try:
        reply = ask(message)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Message(Error(CLIENT_ERROR, named_error(error)), reply_to=message)
    asked = (message.metadata.dst_node_id, message.metadata.message_id)
    if isinstance(reply, Message) and (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == asked:
        return reply
    return Message(Error(CLIENT_ERROR, "it sent no reply, or one to another message"), reply_to=message)


def complaint(reply: Message, about: str, end: str = ".", kind: type[ClientFailure] = ClientFailure) -> ClientFailure:
    """Return the failure of the client that sent `reply`, which is `about` what."""
    return kind(f"Client {reply.metadata.src_node_id} sent a reply {about}{end}")
