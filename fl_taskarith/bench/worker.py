"""A run of ours in a process of its own, a round at a time: for benchmarks whose sides must share no memory."""

import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.pool import Pool
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config, load
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.server.launch import make_run
from fl_taskarith.server.run import Run
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.workspace.global_model import Frozen, GlobalModel
from fl_taskarith.workspace.workspace import Resident, resident

NEVER = 10**9
ONLY_ROUNDS = {
    "weights": "none",
    "mask_rule": "none",
    "num_rounds": NEVER,
    "evaluate_every": NEVER,
    "checkpoint_every": NEVER,
    "schedule": "constant",
}
"""Settings of a run that does nothing but train a random backbone under a random head."""

CLIENTS, LOCAL_STEPS = 10, 4  # of a round

Name = TypeVar("Name", bound=Hashable)

_run: Run | None = None  # of this process


@contextmanager
def workers(names: Sequence[Name]) -> Iterator[dict[Name, Pool]]:
    """A fresh process for each name."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {name: stack.enter_context(context.Pool(1)) for name in names}


def rounds_config(
    folder: Path, model_name: str, input_size: int, batch_size: int, device_name: str, **own: object
) -> Config:
    """A run of rounds of `CLIENTS` x `LOCAL_STEPS` over synthetic images, its files in `folder`; `own` has the rest."""
    return load(
        overrides={
            **ONLY_ROUNDS,
            "dataset": "synthetic",
            "data_dir": str(folder),
            "train_subset": CLIENTS * 100,
            "validation_size": 100,
            "calibration_size": 0,
            "test_subset": 100,
            "model": model_name,
            "input_size": input_size,
            "num_clients": CLIENTS,
            "participation": 1.0,
            "sharding": "iid",
            "local_steps": LOCAL_STEPS,
            "batch_size": batch_size,
            "learning_rate": 1e-4,
            "precision": "fp32",
            "compile": "off",
            "device": device_name,
            **own,
        }
    )


def start(
    config: Config, shards: Callable[[Resident], Sequence[Tensor]] | None = None, ridge: bool = False
) -> dict[str, float]:
    """Make this process's run and take it to round 1; the seconds of what it asks of all clients before.

    Args:
        shards: in place of those that the configuration describes.
        ridge: also ask all clients for the sums of the ridge head, and leave them aside.
    """
    global _run
    home = resident(config)
    if shards is not None:
        home.shards = shards(home)
    _run = make_run(config, home, Logbook(config), None, app)
    row: Row = {"clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
    seconds: dict[str, float] = {}
    if ridge:
        started = time.perf_counter()
        _run.ridge_statistics(row)
        seconds["ridge head"] = time.perf_counter() - started
    head = {name: torch.randn_like(home.pretrained[name]) * 0.05 for name in HEAD_PARAMETERS}
    _run.model = GlobalModel({name: home.pretrained[name] for name in home.trained_names(1)}, Frozen(head))
    started = time.perf_counter()
    _run.distribute(row)
    seconds["frozen head"] = time.perf_counter() - started
    return seconds


def train_round(number: int) -> float:
    """Seconds of round `number` of this process's run, from sampling to its row in rounds.csv."""
    assert _run is not None, "start comes first"
    started = time.perf_counter()
    _run.train_rounds(number, number)
    return time.perf_counter() - started


def rounds_in_turn(configs: Mapping[str, Config], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of `repeats` rounds of each run, in turn, a process each, after one uncounted round; the last losses."""
    measured: dict[str, list[float]] = {name: [] for name in configs}
    with workers(list(configs)) as processes:
        for name, process in processes.items():
            process.apply(start, (configs[name],))
        for number in range(1, repeats + 2):
            for name, process in processes.items():
                seconds = process.apply(train_round, (number,))
                if number > 1:
                    measured[name].append(seconds)
        return measured, {name: process.apply(last_row)["train_loss"] for name, process in processes.items()}


def last_row() -> Row:
    """What the last round logged."""
    assert _run is not None, "start comes first"
    return _run.logbook.rows[-1]
