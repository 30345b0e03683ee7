"""Several virtual clients' local training in one go, for the sequential engine; the replies each gives by itself."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from flwr.app import Message, MessageType, RecordDict

from fl_taskarith.client.local_work import (
    draw_local_steps,
    keep,
    move_control,
    read_frozen_of,
    read_kept,
    trained_reply,
    training_examples,
)
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import RoundSettings, read_settings
from fl_taskarith.engine.records import to_tensors
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import CONTROL, under
from fl_taskarith.training.corrections import control_shift, correct_gradients
from fl_taskarith.training.local import is_single, set_trained
from fl_taskarith.training.sparse_sgdm import in_every_client, sgdm
from fl_taskarith.training.stacked import ClientData, has_dropout, stacked, train_stacked
from fl_taskarith.workspace.global_model import GlobalModel, Weights
from fl_taskarith.workspace.workspace import Workspace, workspace

log = logging.getLogger("fl_taskarith")


def train_together(messages: Sequence[Message]) -> dict[int, Message]:
    """Replies by partition to those of a round's messages that can be answered together; the others are left out.

    Those are local steps in single precision from one global model: no client's own weights or mask, no clipping.
    Clients go together with those of as many steps and as large a batch.
    """
    if any(message.metadata.message_type != MessageType.TRAIN for message in messages):
        return {}
    read = [read_settings(message.content.config_records["config"]) for message in messages]
    config, current = read[0]
    if any((each, dataclasses.replace(told, state_name=current.state_name)) != read[0] for each, told in read):
        return {}
    kinds = set(messages[0].content)
    if any(set(message.content) != kinds for message in messages) or kinds - {"control"} != {"arrays", "config"}:
        return {}
    if not _is_plain(config, current) or not all(_same_arrays(messages, key) for key in kinds - {"config"}):
        return {}
    home = workspace(config)
    told = {message.metadata.dst_node_id: each for message, (_, each) in zip(messages, read, strict=True)}
    if has_dropout(home.model):
        return {}

    def shape(message: Message) -> tuple[int, int]:
        partition = message.metadata.dst_node_id
        shard = len(home.shards[partition])
        return draw_local_steps(config, current.number, partition), min(config.batch_size, shard)

    replies: dict[int, Message] = {}
    for (local_steps, _), group in groupby(sorted(messages, key=shape), key=shape):
        members = list(group)
        if len(members) == 1:
            continue
        try:
            replies |= _train(home, [told[message.metadata.dst_node_id] for message in members], members, local_steps)
        except Exception as error:  # too little memory, or a kind of layer that vmap cannot do
            _tell(config, f"{type(error).__name__}: {error}")
    return replies


@lru_cache(maxsize=16)
def _tell(_: Config, reason: str) -> None:
    """Once per run and reason: every cohort of every round would say it again."""
    log.warning("Clients are trained one by one: %s", reason)


def _is_plain(config: Config, current: RoundSettings) -> bool:
    """Whether clients do what `train_stacked` does, and nothing else."""
    own_masks = config.mask_source == "own" and current.number > config.head_rounds
    return is_single(config.precision) and config.compile == "off" and not config.clip_norm and not own_masks


def _same_arrays(messages: Sequence[Message], key: str) -> bool:
    """Whether all messages bring the very tensors that the first one does, and not only equal or others."""
    first, *others = (message.content.array_records[key] for message in messages)
    return all(other is first or (list(other) == list(first) and all(other[name] is first[name] for name in first))
               for other in others)  # fmt: skip


def _train(
    home: Workspace, told: Sequence[RoundSettings], messages: Sequence[Message], local_steps: int
) -> dict[int, Message]:
    """Replies to `messages`, whose settings `told` differ in the file that a client keeps and in nothing else."""
    started = time.perf_counter()
    config, current = home.config, told[0]
    received = {key: to_tensors(value, home.device) for key, value in messages[0].content.array_records.items()}
    shared, control = received["arrays"], received.get("control")
    frozen = read_frozen_of(home, current)
    mask = frozen.mask
    if shared.keys() != set(home.trained_names(current.number) if mask is None else mask.indices):
        return {}  # some of what is trained is each client's own
    home.place(GlobalModel(shared, frozen))
    partitions = [message.metadata.dst_node_id for message in messages]
    weights = stacked({name: home.parameters[name] for name in shared}, len(partitions))
    set_trained(home.model, [])  # else the frozen parts would have gradients, too
    clients = [
        ClientData(
            *training_examples(home, partition),
            random_generator(config.seed, "local training", current.number, partition),
        )
        for partition in partitions
    ]
    rows = None if mask is None else in_every_client(mask, weights)
    optimizer = sgdm(weights.items(), config, current.learning_rate, rows=rows)
    kept: list[Weights] = []
    if control is not None:
        kept = [read_kept(each, partition, home.device) for each, partition in zip(told, partitions, strict=True)]
    if config.proximal_mu or control is not None:
        shifts = [control_shift(control, under(CONTROL, own)) for own in kept] if control is not None else []
        correct_gradients(
            optimizer,
            weights,
            rows,
            start={name: value.expand(len(partitions), *value.shape) for name, value in shared.items()},
            proximal_mu=config.proximal_mu,
            shift={name: torch.stack([shift[name] for shift in shifts]) for name in shared} if shifts else None,
        )
    losses = train_stacked(
        home.network,
        weights,
        clients,
        optimizer,
        home.preprocessing,
        local_steps=local_steps,
        batch_size=config.batch_size,
        loss_name=config.local_loss,
        logit_scale=current.logit_scale,
    )
    contents: list[RecordDict] = []
    with torch.no_grad():
        for index, (client, loss) in enumerate(zip(clients, losses, strict=True)):
            ends = {name: value[index] for name, value in weights.items()}
            if mask is not None:
                ends = mask.gather(ends)
            task_vector = {name: ends[name].sub_(start) for name, start in shared.items()}
            reply = trained_reply(config, current, task_vector, len(client.shard), loss, local_steps)
            if control is not None:
                moved = move_control(reply, config, current, control, kept[index], task_vector, local_steps)
                keep(reply, current, partitions[index], moved)
            contents.append(reply)
    seconds = (time.perf_counter() - started) / len(partitions)
    replies = {}
    for message, content in zip(messages, contents, strict=True):
        content.metric_records["metrics"]["train-seconds"] = seconds
        replies[message.metadata.dst_node_id] = Message(content, reply_to=message)
    return replies
