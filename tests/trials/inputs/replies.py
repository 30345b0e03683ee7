"""Replies of one hostile client to every kind of message, sound ones with one or two things wrong.

Under "skip" a run must end as if that client had not answered, or with the numbers of an answer that could be true;
under "stop" likewise, or in an error that names it.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from hostile import CLIENTS, CPU, EXAMPLES, HOSTILE, LAYERS, RATE, SHAPES, App, absent, hostile, statistics

from fl_taskarith.config.settings import Config, load
from fl_taskarith.engine.client_questions import ask_all, check_squares
from fl_taskarith.engine.grid import RoundSettings, settings_record
from fl_taskarith.engine.question import EXAMPLES as COUNT
from fl_taskarith.engine.question import SECONDS, SHARE, Question, Range, layout_of
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.engine.replies import Failures
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.errors import ClientFailure
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.server.personal_accuracy import COLUMNS, evaluate_clients
from fl_taskarith.strategies import strategy_class

FAULT = "replies of a client drawn at random"

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


def prepare(folder: Path, names: Sequence[str] = (*STRATEGIES, *QUESTIONS)) -> dict[str, dict[int, Outcome]]:
    """Every kind of run, by the round from which the hostile client is absent; 3: never."""
    return {
        name: {start: rounds(STRATEGIES[name], "skip", absent(start)) for start in (1, 2, 3)}
        if name in STRATEGIES
        else {start: question(name, "skip", absent(start), folder) for start in (1, 3)}
        for name in names
    }


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
    # in one of two rounds it was taken, or its Grams failed and a round
    most = 1 + (name == "gram-anchored")
    assert failed <= most and len(rows) == 2, f"{name}: {failed} failures, and not what the others give"
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
