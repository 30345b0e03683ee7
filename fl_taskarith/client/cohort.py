"""Local training of several virtual clients at once, for the sequential engine; each client has its own reply."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby

import torch
from flwr.app import Message, MessageType, RecordDict
from torch import Tensor

from fl_taskarith.client.local_work import Work
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import named_error
from fl_taskarith.training.corrections import correct_gradients
from fl_taskarith.training.local import set_trained
from fl_taskarith.training.sparse_sgdm import SparseSGDM, in_every_client, sgdm
from fl_taskarith.training.stacked import has_dropout, train_stacked
from fl_taskarith.workspace.global_model import GlobalModel, Weights

log = logging.getLogger("fl_taskarith")


def train_together(messages: Sequence[Message]) -> dict[int, Message]:
    """Return replies, by partition, to those of a round's messages that can be answered together.

    Those are local steps from one global model, with no client's own weights or mask. Clients are grouped by their
    numbers of steps and batch sizes; fewer go together where memory does not suffice for all.
    """
    if any(message.metadata.message_type != MessageType.TRAIN for message in messages):
        return {}
    kinds = set(messages[0].content)
    if any(set(message.content) != kinds for message in messages) or kinds - {"control", "momentum"} != {
        "arrays",
        "config",
    }:
        return {}
    if not all(_same_arrays(messages, key) for key in kinds - {"config"}):
        return {}
    works = {message.metadata.dst_node_id: Work(message.content, message.metadata.dst_node_id) for message in messages}
    first = next(iter(works.values()))
    for work in works.values():
        same_file = dataclasses.replace(work.current, state_name=first.current.state_name)
        if (work.config, same_file) != (first.config, first.current):
            return {}
    own_masks = first.config.mask_source == "own" and first.current.number > first.config.head_rounds
    if own_masks or has_dropout(first.home.model):
        return {}

    def shape(work: Work) -> tuple[int, int]:
        return work.local_steps, min(work.config.batch_size, len(work.home.shards[work.partition]))

    replies: dict[int, RecordDict] = {}
    for _, group in groupby(sorted(works.values(), key=shape), key=shape):
        try:
            replies |= _train_what_fits(list(group))
        except (Exception, SystemExit) as error:  # such as a kind of layer that has no form for several clients
            _warn(first.config, named_error(error))
    return {message.metadata.dst_node_id: Message(replies[message.metadata.dst_node_id], reply_to=message)
            for message in messages if message.metadata.dst_node_id in replies}  # fmt: skip


@lru_cache(maxsize=16)
def _warn(_: Config, reason: str) -> None:
    """Warn once per run and reason, not for every cohort of every round."""
    log.warning("Clients are trained one by one: %s", reason)


def _same_arrays(messages: Sequence[Message], key: str) -> bool:
    """Return whether all messages hold the same tensor objects, and not only equal ones."""
    first, *others = (message.content.array_records[key] for message in messages)
    return all(other is first or (list(other) == list(first) and all(other[name] is first[name] for name in first))
               for other in others)  # fmt: skip


def _train_what_fits(works: Sequence[Work]) -> dict[int, RecordDict]:
    """Train these clients, as many at once as memory suffices for; one that is left over trains by itself.

    Where it does not suffice, half as many go together from then on.
    """
    home, replies, left = works[0].home, dict[int, RecordDict](), list(works)
    while (size := min(home.fitting, len(left))) > 1:
        try:
            trained = _train(left[:size])
        except torch.OutOfMemoryError:
            log.warning("Memory does not suffice for %d clients at once: %d go together.", size, size // 2)
        else:
            replies |= trained
            left = left[size:]
            continue
        home.let_fit(size // 2)  # outside of the handler, which holds on to the tensors
    return replies


def _train(works: Sequence[Work]) -> dict[int, RecordDict]:
    """Train these clients together; return the content of each one's reply, by partition."""
    started = time.perf_counter()
    first, home, config = works[0], works[0].home, works[0].config
    shared, mask = first.received["arrays"], first.frozen.mask
    if shared.keys() != set(home.trained_names(first.current.number) if mask is None else mask.indices):
        return {}  # some of what is trained is each client's own
    home.place(GlobalModel(shared, first.frozen))
    set_trained(home.model, [])  # else the frozen parts would have gradients, too
    loss = home.local_loss(first.current.logit_scale)
    together = home.together(list(shared), len(works), loss)
    weights: Weights = {**together.weights}
    rows = None if mask is None else in_every_client(mask, weights)
    optimizer = sgdm(weights.items(), config, first.current.learning_rate, rows=rows, clients=len(works))
    _correct(works, optimizer, weights, rows)
    losses = train_stacked(
        together,
        loss.network(home.network),
        [work.training_data() for work in works],
        optimizer,
        home.preprocessing,
        local_steps=first.local_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        loss=loss,
    )
    replies = {}
    for index, (work, mean_loss) in enumerate(zip(works, losses, strict=True)):
        own = {name: value[index].detach() for name, value in weights.items()}
        # The network is used again, so what is replied does not lie in it.
        ends = {name: value.clone() for name, value in own.items()} if mask is None else mask.gather(own)
        replies[work.partition] = work.trained_reply(shared, ends, {}, mean_loss)
    seconds = (time.perf_counter() - started) / len(works)
    for reply in replies.values():
        reply.metric_records["metrics"]["train-seconds"] = seconds
    return replies


def _correct(works: Sequence[Work], optimizer: SparseSGDM, weights: Weights, rows: Mapping[str, Tensor] | None) -> None:
    """Add what an algorithm adds to the gradients of the clients' weights, [clients, ...]."""
    mu, shared = works[0].config.proximal_mu, works[0].received["arrays"]
    shifts = [found for work in works if (found := work.gradient_shift(shared)) is not None]
    shift = {name: torch.stack([each[name] for each in shifts]) for name in shared} if shifts else None
    if mu or shift is not None:
        start = {name: value.expand(len(works), *value.shape) for name, value in shared.items()}
        correct_gradients(optimizer, weights, rows, start=start, proximal_mu=mu, shift=shift)
