"""Replies of one hostile client to every kind of message, sound ones with one or two things wrong.

Under "skip" a run must end as if that client had not answered, or with the numbers of an answer that could be true;
under "stop" likewise, or in an error that names it.
"""

import io
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config, load
from fl_taskarith.engine.client_questions import ask_all, check_squares
from fl_taskarith.engine.grid import RoundSettings, read_settings, settings_record
from fl_taskarith.engine.question import EXAMPLES as COUNT
from fl_taskarith.engine.question import SECONDS, SHARE, Question, Range, layout_of
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.engine.replies import Failures
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.errors import ClientFailure
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.server.personal_accuracy import COLUMNS, evaluate_clients
from fl_taskarith.strategies import strategy_class
from fl_taskarith.training.corrections import control_change
from fl_taskarith.training.schedules import draw_local_steps, step_coefficient_sum

FAULT = "replies of a client drawn at random"

CPU = torch.device("cpu")
CLIENTS, HOSTILE, RATE, EXAMPLES = 5, 2, 0.05, 7
SHAPES = {"block.weight": (4, 6), "block.bias": (4,), "scale": (1,), "norm.weight": (6,)}
LAYERS = {"block.weight": (4, 6)}
WEIGHTS = {name: torch.linspace(-1, 1, max(1, math.prod(shape))).reshape(shape) for name, shape in SHAPES.items()}
STRATEGIES: dict[str, dict[str, object]] = {
    **{name: {"strategy": name} for name in (
        "fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedgma", "median", "trimmed-mean",
        "geometric-median", "krum", "cclip", "fedbn", "gram-anchored",
    )},
    "fednova": {"strategy": "fednova", "local_steps_min": 1, "local_steps_max": 4},
    "bank": {"task_vector_bank": "float32"},
    "own masks": {"mask_source": "own", "mask_rule": "least-sensitive", "density": 0.4},
    "br-ifca": {"strategy": "br-ifca", "num_clusters": 2, "cluster_rule": "median"},
    "regression, fed-em": {"strategy": "fed-em", "dataset": "linear-regression"},
    "regression, br-ifca": {"strategy": "br-ifca", "dataset": "linear-regression"},
}  # fmt: skip
OF_REGRESSION = {"dimension": 4, "num_clusters": 2, "tolerance": 0.0, "examples_per_client": EXAMPLES}
QUESTIONS = ("ridge", "sensitivity", "evaluate", "frozen")
Outcome = tuple[dict[str, torch.Tensor], list[dict[str, object]], int]
App = Callable[[Message, Context], Message]


def config_of(settings: dict[str, object], policy: str) -> Config:
    common = {"num_clients": CLIENTS, "participation": 1.0, "num_rounds": 2, "learning_rate": RATE, "mask_rule": "none",
              "on_client_failure": policy, "schedule": "constant", "classes_per_client": 5}  # fmt: skip
    if settings.get("dataset") == "linear-regression":
        common = {name: common[name] for name in common if name not in ("mask_rule", "classes_per_client")}
        common |= OF_REGRESSION
        if settings["strategy"] == "fed-em":
            del common["learning_rate"], common["schedule"]
        else:
            del common["tolerance"]
    return load(overrides=common | settings)


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


def rounds(settings: dict[str, object], policy: str, app: App) -> Outcome:
    """The weights after two rounds, the metrics of each, and how many clients failed."""
    config = config_of(settings, policy)
    strategy = strategy_class(config.strategy)(config, CPU)
    weights = WEIGHTS
    if config.dataset == "linear-regression":
        weights = {"theta": torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)}
    elif config.strategy == "br-ifca":
        weights = {name: torch.stack([value, -value]) for name, value in WEIGHTS.items()}
    context = RoundContext(RATE, linear_shapes=LAYERS, shard_size=lambda _: EXAMPLES)
    rows: list[dict[str, object]] = []
    failed = 0

    def after(number: int, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        nonlocal failed
        failed += strategy.failures.take()
        rows.append({name: value for name, value in metrics.items() if not name.endswith("seconds")})

    result = strategy.start(SequentialGrid(app, CLIENTS), to_record(weights), 2, context_of=lambda _: context,
                            after_round=after)  # fmt: skip
    return {name: value.clone() for name, value in to_tensors(result.arrays, CPU).items()}, rows, failed


def question(kind: str, policy: str, app: App, folder: Path) -> Outcome:
    """What comes of a question to all clients beside training."""
    config, failures, traffic = config_of({}, policy), Failures(policy), Traffic()
    grid = SequentialGrid(app, CLIENTS)
    content = RecordDict({"config": settings_record(config, RoundSettings(1)), "arrays": ArrayRecord()})
    total: dict[str, torch.Tensor] = {}
    rows: list[dict[str, object]] = []
    if kind in ("ridge", "sensitivity"):
        like = statistics(torch.Generator()).tensors() if kind == "ridge" else WEIGHTS

        def check(_: int, tensors: dict[str, torch.Tensor]) -> None:
            if kind == "ridge":
                RidgeStatistics(**tensors).check(EXAMPLES)
            else:
                check_squares(tensors, EXAMPLES)

        asked = Question(1, layouts={"arrays": layout_of(like)}, examples_of=lambda _: EXAMPLES)
        for _, sums in ask_all(grid, failures, content, f"query.{kind}", asked, CPU, traffic, check):
            total = {name: total.get(name, 0.0) + value for name, value in sums.items()}
        rows.append({"uplink-bytes": traffic.uplink})
    else:
        messages = [Message(content, partition, f"query.{kind}" if kind == "frozen" else "evaluate")
                    for partition in range(CLIENTS)]  # fmt: skip
        accuracies = {name.replace("_", "-"): SHARE for name in COLUMNS if name.endswith("accuracy")}
        counts = {name: Range(0, 100, whole=True) for name in ("num-classes", "val-examples", "test-examples")}
        numbers = {"num-examples": COUNT, "evaluate-seconds": SECONDS, **counts, **accuracies}
        if kind == "frozen":
            asked = Question(1, range(CLIENTS), numbers={})
            rows += [{"client": answer.client} for answer in failures.read(
                grid.exchange(messages), lambda reply: asked.read(reply, CPU, 1.0))]  # fmt: skip
        else:
            asked = Question(1, range(CLIENTS), numbers, examples_of=lambda _: EXAMPLES)
            rows.append(dict(evaluate_clients(grid, messages, folder / "clients.csv", failures, asked)))
    return total, rows, failures.take()


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


def absent(start: int, kind: str = "") -> App:
    """An app whose client 2 fails from a round on, at messages whose type begins with `kind`."""

    def app(message: Message, context: Context) -> Message:
        number = int(message.content.config_records["config"]["round.number"])
        hit = message.metadata.message_type.startswith(kind) and number >= start
        if int(context.node_config["partition-id"]) == HOSTILE and hit:
            return Message(Error(7, "absent"), reply_to=message)
        return honest(message, context)

    return app


def prepare(folder: Path) -> dict[str, dict[int, Outcome]]:
    """Every kind of run, by the round from which the hostile client is absent; 0: from training only; 3: never."""
    runs = {name: {start: rounds(settings, "skip", absent(start)) for start in (1, 2, 3)}
            for name, settings in STRATEGIES.items()}  # fmt: skip
    runs["gram-anchored"][0] = rounds(STRATEGIES["gram-anchored"], "skip", absent(1, "train"))
    return runs | {kind: {start: question(kind, "skip", absent(start), folder) for start in (1, 3)}
                   for kind in QUESTIONS}  # fmt: skip


def attempt(prepared: dict[str, dict[int, Outcome]], drawn: random.Random, folder: Path) -> str:
    name, policy = drawn.choice(list(prepared)), drawn.choice(["skip", "skip", "stop"])
    app = hostile(drawn)
    try:
        outcome = rounds(STRATEGIES[name], policy, app) if name in STRATEGIES else question(name, policy, app, folder)
    except ClientFailure as failure:
        told = str(failure)
        assert policy == "stop", f"{name}: ended under skip: {told[:300]}"
        assert told.startswith(f"Client {HOSTILE} "), f"{name}: {told[:300]}"
        assert told.isprintable() and len(told) < 500, f"{name}: {told[:600]!r}"
        return "stopped, named"
    weights, rows, failed = outcome
    _check_range(name, weights, rows)
    if policy == "stop" or not failed:
        assert not failed
        same = _equal(outcome, prepared[name][3])
        return "taken as it is" if same else "taken, in range"
    expected = [each for start, each in prepared[name].items() if start < 3]
    if any(_equal(outcome, each) for each in expected):
        return "skipped, as if absent"
    # in one of two rounds it was taken
    assert failed == 1 and len(rows) == 2, f"{name}: {failed} failures, and not what the others give"
    return "skipped in one round"


def _equal(first: Outcome, second: Outcome) -> bool:
    same_weights = all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    return same_weights and repr(first[1]) == repr(second[1])


def _check_range(name: str, weights: dict[str, torch.Tensor], rows: list[dict[str, object]]) -> None:
    for key, value in weights.items():
        assert bool(value.isfinite().all()), f"{name}: {key} is not finite"
    for row in rows:
        for key, value in row.items():
            if isinstance(value, list) or (name == "regression, fed-em" and key == "client-update-norm"):
                continue
            assert math.isfinite(value), f"{name}: {key} = {value}"
            low, high = {"client-cosine": (-1.001, 1.001), "train-loss": (-10.0, 1e13)}.get(key, (0, 1e13))
            assert low <= value <= (1.0 if key.endswith("accuracy") else high), f"{name}: {key} = {value}"
