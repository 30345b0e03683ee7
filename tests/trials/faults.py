"""Client apps in which some clients are at fault, each in one way, for tests of what a run does about it."""

import dataclasses
import io
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.records import to_record, to_tensors

Work = Callable[[Message, int], RecordDict]
CPU = torch.device("cpu")


def raises(message: Message, partition: int) -> RecordDict:
    raise ZeroDivisionError("a bug in client code")


def hangs(message: Message, partition: int) -> RecordDict:
    while True:
        time.sleep(0.01)


def loses_its_loss(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply.metric_records["metrics"]["train-loss"] = math.nan
    return reply


def _with_tensors(message: Message, partition: int, change: Callable[[dict[str, torch.Tensor]], None]) -> RecordDict:
    reply = client.train(message, partition)
    tensors = {name: value.clone() for name, value in to_tensors(reply.array_records["arrays"], CPU).items()}
    change(tensors)
    reply["arrays"] = to_record(tensors)
    return reply


def sends_nan(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].view(-1)[-1] = math.nan

    return _with_tensors(message, partition, change)


def sends_infinity(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].fill_(math.inf)

    return _with_tensors(message, partition, change)


def sends_wrong_shapes(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = tensors[name][..., :-1]

    return _with_tensors(message, partition, change)


def sends_wrong_keys(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["something.else"] = tensors.pop(sorted(tensors)[0])

    return _with_tensors(message, partition, change)


def sends_whole_numbers(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].long()

    return _with_tensors(message, partition, change)


def sends_damaged_bytes(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    arrays = ArrayRecord({name: array for name, array in _plain(reply).items()})
    first = arrays[sorted(arrays)[0]]
    first.data = first.data[: len(first.data) // 2]
    reply["arrays"] = arrays
    return reply


def _plain(reply: RecordDict) -> ArrayRecord:
    """The arrays as they come over a wire."""
    plain = ArrayRecord()
    for name, array in reply.array_records["arrays"].items():
        constructor, arguments = array.__reduce__()
        plain[name] = constructor(*arguments)
    return plain


def miscounts(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply.metric_records["metrics"]["num-examples"] = 10_000
    return reply


def forgets_its_metrics(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    del reply["metrics"]
    return reply


def doubles_its_numbers(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.double() for name, value in tensors.items()})

    return _with_tensors(message, partition, change)


def says_nothing_of_its_loss(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    del reply.metric_records["metrics"]["train-loss"]
    return reply


def took_no_steps(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply.metric_records["metrics"]["step-coefficient-sum"] = 0.0
    return reply


def has_a_nameless_state(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply["state"] = ConfigRecord({"folder": "somewhere"})
    return reply


def uses_another_mask(message: Message, partition: int) -> RecordDict:
    """Tensors of the right shapes, made under another mask."""
    reply = client.train(message, partition)
    reply["frozen"] = ConfigRecord({"name": "frozen-0123456789abcdef0123456789abcdef.safetensors"})
    return reply


def leaves_the_process(message: Message, partition: int) -> RecordDict:
    raise SystemExit(0)


def says_too_much(message: Message, partition: int) -> RecordDict:
    raise ValueError("\x1b[2J" + "words\n" * 1000 + "and the end of it")


def _with_plain(message: Message, partition: int, change: Callable[[Array], None]) -> RecordDict:
    reply = client.train(message, partition)
    arrays = _plain(reply)
    change(arrays[sorted(arrays)[0]])
    reply["arrays"] = arrays
    return reply


def lies_about_a_shape(message: Message, partition: int) -> RecordDict:
    return _with_plain(message, partition, lambda array: array.__dict__.update(shape=(2**45,)))


def lies_about_a_type(message: Message, partition: int) -> RecordDict:
    return _with_plain(message, partition, lambda array: array.__dict__.update(dtype=None))


def claims_too_many_numbers(message: Message, partition: int) -> RecordDict:
    def change(array: Array) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**45,)})
        array.data = header.getvalue()

    return _with_plain(message, partition, change)


def sends_huge_numbers(message: Message, partition: int) -> RecordDict:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].view(-1)[-1] = 1e18

    return _with_tensors(message, partition, change)


def _with_metric(message: Message, partition: int, name: str, value: float) -> RecordDict:
    reply = client.train(message, partition)
    reply.metric_records["metrics"][name] = value
    return reply


def sends_a_mask(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply["mask"] = to_record({"pos_embed": torch.zeros(1, dtype=torch.uint8)})
    return reply


def names_another_folder(message: Message, partition: int) -> RecordDict:
    reply = client.train(message, partition)
    reply["state"] = ConfigRecord({"name": "../../etc/passwd"})
    return reply


FAULTS: dict[str, tuple[Work, str]] = {  # what goes wrong, and what is said about it
    "raises": (raises, "failed: ZeroDivisionError: a bug in client code"),
    "hangs": (hangs, "did not finish within client-timeout = "),
    "sends no loss": (loses_its_loss, "diverged in round 1"),
    "sends NaN": (sends_nan, "NaN or infinite values in "),
    "sends infinity": (sends_infinity, "NaN or infinite values in "),
    "sends wrong shapes": (sends_wrong_shapes, "was it made under another mask"),
    "sends wrong keys": (sends_wrong_keys, "other tensors than asked for: "),
    "sends whole numbers": (sends_whole_numbers, "as int64 "),
    "sends damaged bytes": (sends_damaged_bytes, "cannot be read"),
    "sends float64": (doubles_its_numbers, "as float64 "),
    "sends no loss at all": (says_nothing_of_its_loss, "is missing or no number"),
    "took no steps": (took_no_steps, "must be above 0"),
    "has a nameless state": (has_a_nameless_state, "whose state has no name"),
    "sends a wrong example count": (miscounts, "of 10000 examples, and its shard holds "),
    "sends no metrics": (forgets_its_metrics, "without metrics"),
    "leaves the process": (leaves_the_process, "failed: SystemExit: 0 (faults.py, line "),
    "says too much": (says_too_much, "failed: ValueError: ?[2Jwords words words"),
    "lies about a shape": (lies_about_a_shape, "as float32 [35184372088832], not as float32 ["),
    "lies about a type": (lies_about_a_type, "as None ["),
    "claims too many numbers": (claims_too_many_numbers, "a header of float32 [35184372088832], not of "),
    "sends huge numbers": (sends_huge_numbers, "has norm 1e+18, and may have "),
    "reports a norm": (partial(_with_metric, name="update-norm", value=1e308), "not asked for: update-norm"),
    "took hardly a step": (partial(_with_metric, name="step-coefficient-sum", value=1e-300), "is 1e-300, and must be "),
    "reports a huge loss": (partial(_with_metric, name="train-loss", value=1e300), "its train-loss is 1e+300"),
    "reports a loss below 0": (partial(_with_metric, name="train-loss", value=-1.0), "is -1, and must be from 0 to"),
    "worked for a year": (partial(_with_metric, name="train-seconds", value=3e7), "is 3e+07, and must be from 0 to"),
    "answers for another": (partial(_with_metric, name="partition-id", value=3), "with partition-id = 3, not "),
    "answers another round": (partial(_with_metric, name="round", value=7), "with round = 7, not 1"),
    "sends a mask unasked": (sends_a_mask, 'the array records "arrays", "mask", not "arrays"'),
    "names another folder": (names_another_folder, "whose state is ../../etc/passwd, and not of round 1"),
    "uses another mask": (uses_another_mask, "made with another mask or head"),
}


def with_fault(config: Config, fault: str, policy: str) -> Config:
    """The run `POLICY-FAULT`, under a time limit where the fault is to hang."""
    return dataclasses.replace(
        config,
        run_name=f"{policy}-{fault}".replace(" ", "-"),
        on_client_failure=policy,
        client_timeout=4.0 if fault == "hangs" else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class FaultyApp:
    """The real client app, in which training of the clients of `partitions` goes wrong; Ray can pickle it."""

    fault: str
    partitions: tuple[int, ...]

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and int(context.node_config["partition-id"]) in self.partitions:
            return client.answer(FAULTS[self.fault][0], message, context)
        return client.app(message, context)
