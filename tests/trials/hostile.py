"""A client app of made-up replies: all sound, or those of client 2 with one or two things wrong."""

import io
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fl_taskarith.client import app as client
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.training.corrections import control_change
from fl_taskarith.training.schedules import draw_local_steps, step_coefficient_sum

App = Callable[[Message, Context], Message]

CPU = torch.device("cpu")
CLIENTS, HOSTILE, RATE, EXAMPLES = 5, 2, 0.05, 7
SHAPES = {"block.weight": (4, 6), "block.bias": (4,), "scale": (1,), "norm.weight": (6,)}
LAYERS = {"block.weight": (4, 6)}


def honest(message: Message, context: Context) -> Message:
    """A sound reply to a message of any kind, the same at every call."""
    kind, partition = message.metadata.message_type, int(context.node_config["partition-id"])
    config = message.content.config_records["config"]
    if config["dataset"] == "linear-regression":
        return client.app(message, context)
    number = int(config["round.number"])
    draw = torch.Generator().manual_seed(100 * number + partition)
    metrics: dict[str, object] = {"num-examples": EXAMPLES, "train-seconds": 0.0, "partition-id": partition,
                                  "round": number}  # fmt: skip
    records: dict[str, object] = {}
    if kind.startswith("train"):
        records, more = trained(message, partition, draw)
        metrics |= more
    elif kind == "query.ridge":
        records["arrays"] = to_record(statistics(draw).tensors())
    elif kind in ("query.sensitivity", "query.gram"):
        shapes = {name: (shape[1],) for name, shape in LAYERS.items()} if kind == "query.gram" else SHAPES
        records["arrays"] = to_record({name: torch.rand(shape, generator=draw) for name, shape in shapes.items()})
    elif kind == "query.frozen":
        metrics = {"partition-id": partition, "round": number}
    else:
        accuracies = {f"{model}-{split}-accuracy": 0.5 for model in ("own", "global") for split in ("val", "test")}
        del metrics["train-seconds"]
        metrics |= {"num-classes": 2, "val-examples": 4, "test-examples": 6, "evaluate-seconds": 0.0, **accuracies}
    return Message(RecordDict({**records, "metrics": MetricRecord(metrics)}), reply_to=message)


def trained(message: Message, partition: int, draw: torch.Generator) -> tuple[dict[str, object], dict[str, object]]:
    """The records and the metrics of a reply after local steps."""
    settings = message.content.config_records["config"]
    config, _ = read_settings(settings)
    steps = step_coefficient_sum(config, draw_local_steps(config, int(settings["round.number"]), partition), RATE)
    metrics: dict[str, object] = {"train-loss": 0.7, "step-coefficient-sum": steps}
    sent = to_tensors(message.content.array_records["arrays"], CPU)
    records: dict[str, object] = {"frozen": ConfigRecord({"name": ""})}
    if message.metadata.message_type == "train.cluster":
        sent = {name: value[:1] for name, value in sent.items()}
        metrics |= {"partitions": [partition], "clusters": [partition % 2], "losses": [0.7]}
    vector = {name: 0.01 * torch.randn(value.shape, generator=draw) for name, value in sent.items()}
    if config.mask_source == "own":
        full = Mask({name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
        full.tensors["block.weight"].view(-1)[: round(0.4 * full.size)] = True
        vector = full.gather(vector)
        if settings["round.number"] == 1:
            records["mask"] = to_record(full.packed())
    records["arrays"] = to_record(vector)
    if "control" in message.content.array_records:
        control = to_tensors(message.content.array_records["control"], CPU)
        records["control"] = to_record(control_change(control, vector, RATE * steps))
        records["state"] = ConfigRecord({"name": f"round-{settings['round.number']:06d}-{'0' * 32}.safetensors"})
    return records, metrics


def statistics(draw: torch.Generator) -> RidgeStatistics:
    return RidgeStatistics.of(torch.randn(EXAMPLES, 6, generator=draw), torch.arange(EXAMPLES) % 3, 3)


# What is wrong


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddError(BaseException):
    pass


RAISED: tuple[Callable[[], BaseException], ...] = (
    lambda: ValueError("\x1b[31m" + "a\nb\tc" * 500), lambda: SystemExit(0), lambda: SystemExit("bye"), MemoryError,
    RecursionError, HostileError, OddError, lambda: StopIteration(3), GeneratorExit, lambda: KeyError("\u202e\0x"),
)  # fmt: skip
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 0, 1, 1e-300, 5e-324, 1e308, 1e300, 1e18, 2.5, 10**400, -3,
           True, [], [1.0], [math.nan], [1e308] * 3, 2**63, 1e9)  # fmt: skip
ENTRIES = (math.nan, math.inf, -math.inf, 1e18, -1e19, 1e20, 1e30, 3e38, -3e38, 1e10, 1e6, 1e-40)
WORDS = ("", "\x1b[2J", "x" * 10_000, "../../etc", "a\nb", "\u202eabc", "frozen-0.safetensors",
         "round-000001-" + "f" * 32 + ".safetensors")  # fmt: skip


def hostile_array(drawn: random.Random, array: Array) -> Array:
    """The array with something wrong."""
    tensor = array.numpy().copy()
    plain = Array(tensor)
    fault = drawn.randrange(9)
    if fault == 0:
        flat = tensor.reshape(-1)
        for _ in range(drawn.choice([1, 1, len(flat)])):
            flat[drawn.randrange(len(flat))] = drawn.choice(ENTRIES) if tensor.dtype.kind == "f" else 255
        return Array(flat.reshape(tensor.shape))
    if fault == 1:
        return Array(tensor.astype(drawn.choice(["f8", "f4", "f2", "i8", "u1", "?", "c8", ">f4"])))
    if fault == 2:
        return Array(drawn.choice([tensor[..., None], tensor.reshape(-1), tensor[:0], np.zeros(0, tensor.dtype)])
                     if tensor.ndim else tensor[None])  # fmt: skip
    if fault == 3:
        lie = drawn.choice([("shape", (3,)), ("shape", (2**45,)), ("shape", "abc"), ("shape", None), ("shape", (-1,)),
                            ("dtype", "float64"), ("dtype", "x" * 999), ("dtype", None), ("dtype", "O"), ("stype", ""),
                            ("data", None), ("data", "text")])  # fmt: skip
        plain.__dict__[lie[0]] = lie[1]
    elif fault == 4:
        plain.data = plain.data[: drawn.randrange(len(plain.data))]
    elif fault == 5:
        data = bytearray(plain.data)
        for _ in range(drawn.choice([1, 3, 20])):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        plain.data = bytes(data)
    elif fault == 6:
        header = io.BytesIO()
        shape = drawn.choice([(2**45,), (2**62, 4), tensor.shape, (-1,), (0,)])
        descriptor = {
            "descr": drawn.choice(["<f4", "<f8", "|O"]),
            "fortran_order": drawn.random() < 0.5,
            "shape": shape,
        }
        np.lib.format.write_array_header_2_0(header, descriptor)
        plain.data = header.getvalue() + drawn.choice([b"", tensor.tobytes()])
    elif fault == 7:
        plain.data += b"\0" * drawn.choice([1, 4096])
    else:
        scaled = tensor * tensor.dtype.type(drawn.choice([1e3, 1e6, 1e15, 1e25, -1]) if tensor.dtype.kind == "f" else 3)
        return Array(scaled.astype(tensor.dtype))
    return plain


def spoil_arrays(drawn: random.Random, content: RecordDict) -> None:
    key = drawn.choice(list(content.array_records) or ["arrays"])
    record = ArrayRecord({name: Array(array.numpy()) for name, array in content.array_records.get(key, {}).items()})
    names = list(record) or ["x"]
    name = drawn.choice(names)
    fault = drawn.randrange(6)
    if fault == 0 and record:
        record[drawn.choice(["\x1b[31mred", "x" * 5000, "block.weight2", ""])] = record.pop(name)
    elif fault == 1 and record:
        del record[name]
    elif fault == 2:
        del content[key]
        if drawn.random() < 0.5:
            content[drawn.choice(["arrays2", "mask", "control"])] = record
        return
    elif record:
        record[name] = hostile_array(drawn, record[name])
    content[key] = record


def spoil_metrics(drawn: random.Random, content: RecordDict) -> None:
    metrics = content.metric_records["metrics"]
    fault = drawn.randrange(8)
    if fault == 0:
        del content["metrics"]
        if drawn.random() < 0.5:
            content["metrics"] = ConfigRecord({"train-loss": 0.1})
    elif fault == 1:
        del metrics[drawn.choice(list(metrics))]
    elif fault == 2:
        metrics[drawn.choice(["update-norm", "more", "\x1b[2J", "x" * 999])] = drawn.choice(NUMBERS[:13])
    else:
        metrics.__dict__["_data"][drawn.choice(list(metrics))] = drawn.choice(NUMBERS)


def spoil_words(drawn: random.Random, content: RecordDict) -> None:
    key = drawn.choice(["frozen", "state", "more"])
    named = ConfigRecord({"name": drawn.choice(WORDS)})
    content[key] = drawn.choice([named, ConfigRecord({}), ConfigRecord({"name": 3}), MetricRecord({"name": 1})])


def hostile(drawn: random.Random) -> App:
    """An app whose client 2 is at fault from a round on."""
    start = drawn.choice([1, 1, 2])
    fault = drawn.choice(["arrays"] * 4 + ["metrics"] * 3 + ["words", "raises", "no reply", "error", "stale", "other"])
    seeds = drawn.random()
    last: dict[str, RecordDict] = {}

    def app(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        number = int(message.content.config_records["config"]["round.number"])
        kind = message.metadata.message_type
        if int(context.node_config["partition-id"]) != HOSTILE or number < start:
            if fault == "stale":
                last.setdefault(kind, reply.content)
            return reply
        if kind == "query.gram":
            number = 0
        dice = random.Random(f"{seeds}-{number}")
        if fault == "raises":
            raise dice.choice(RAISED)()
        if fault == "no reply":
            return dice.choice([None, 3, message, Message(reply.content, reply_to=Message(RecordDict(), 4, "train")),
                                Message(Error(7, "x"), reply_to=Message(RecordDict(), HOSTILE, "train"))])  # fmt: skip
        if fault == "error":
            return Message(Error(dice.choice([0, 7, 100, 101, 102]), dice.choice(WORDS)), reply_to=message)
        if fault == "stale":
            return Message(last.setdefault(kind, reply.content), reply_to=message)
        if fault == "other":
            context.node_config["partition-id"] = dice.choice([0, 4])
            return Message(honest(message, context).content, reply_to=message)
        spoil = {"arrays": spoil_arrays, "metrics": spoil_metrics, "words": spoil_words}[fault]
        for _ in range(dice.choice([1, 1, 2])):
            if "metrics" in reply.content and isinstance(reply.content["metrics"], MetricRecord):
                spoil(dice, reply.content)
        return reply

    return app


def absent(start: int) -> App:
    """An app whose client 2 fails from a round on."""

    def app(message: Message, context: Context) -> Message:
        number = int(message.content.config_records["config"]["round.number"])
        if int(context.node_config["partition-id"]) == HOSTILE and number >= start:
            return Message(Error(7, "absent"), reply_to=message)
        return honest(message, context)

    return app
