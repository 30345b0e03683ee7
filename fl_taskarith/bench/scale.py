"""From a hundred to a hundred thousand virtual clients, as many sampled each round: time and memory of a round."""

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fl_taskarith.bench.report import Bench, median, resident_bytes
from fl_taskarith.client import app
from fl_taskarith.config import load
from fl_taskarith.federation import make_run
from fl_taskarith.global_model import Frozen, GlobalModel
from fl_taskarith.logbook import Logbook, Row
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.resident import choose_device, resident
from fl_taskarith.run import Run
from fl_taskarith.seeding import random_generator

SAMPLED = 10  # clients per round
SHARD_SIZE = 32  # examples of a client
ALL_ASKED = 1_000  # up to so many clients, round 0 asks all of them for the ridge head's sums too
NEVER = 10**9


class DrawnShards(Sequence[Tensor]):
    """Shards of any number of clients over the same examples, each drawn when asked for and not kept.

    A pure function of the client, so that a client has the same examples whenever it is sampled. Unlike real shards
    they overlap, and there may be more of them than examples.
    """

    def __init__(self, num_clients: int, num_examples: int, device: torch.device) -> None:
        self.num_clients, self.num_examples, self.device = num_clients, num_examples, device

    def __len__(self) -> int:
        return self.num_clients

    def __getitem__(self, client: int) -> Tensor:  # type: ignore[override]
        if not 0 <= client < self.num_clients:
            raise IndexError(client)
        generator = random_generator(0, "drawn shards", client=client)
        return torch.from_numpy(generator.choice(self.num_examples, SHARD_SIZE, replace=False)).to(self.device)


def bench_scale(
    model_name: str = "vit_glyph",
    input_size: int = 16,
    clients: Sequence[int] = (100, 1_000, 10_000, 100_000),
    repeats: int = 15,
    device_name: str = "auto",
) -> Bench:
    """Seconds of a round, and the memory its process holds after the last, for each number of clients.

    Each has a process of its own, with real runs of ours on one thread; their rounds are taken in turn, after one that
    is not counted. Round 0 is apart: it sends the frozen head to every client, once, and asks every client for sums.
    """
    counts = sorted(set(clients))
    context = multiprocessing.get_context("spawn")
    measured: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers = {count: stack.enter_context(context.Pool(1)) for count in counts}
        before = {
            count: worker.apply(_start, (model_name, input_size, count, device_name, folder))
            for count, worker in workers.items()
        }
        for number in range(1, repeats + 2):
            for count, worker in workers.items():
                seconds = worker.apply(_round, (number,))
                if number > 1:
                    measured[count].append(seconds)
        memory = {count: worker.apply(resident_bytes) for count, worker in workers.items()}
    per_round = {count: median(seconds) for count, seconds in measured.items()}
    smallest, largest = counts[0], counts[-1]
    ratio = per_round[largest] / per_round[smallest]
    spread = max(memory.values()) / min(memory.values())
    lines = [
        f"{model_name} at {input_size} px, {SAMPLED} clients of {SHARD_SIZE} examples per round, median of {repeats} "
        f"on {choose_device(device_name).type}; memory within {100 * (spread - 1):.1f} %",
        *(
            f"K = {count:>7,}  {1000 * per_round[count]:7.1f} ms per round  {memory[count] / 2**20:6.0f} MiB  once: "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in before[count].items())
            for count in counts
        ),
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "sampled": SAMPLED,
        "shard_size": SHARD_SIZE,
        "repeats": repeats,
        "clients": counts,
        "seconds": measured,
        "seconds_per_round": per_round,
        "memory_bytes": memory,
        "memory_ratio": spread,
        "round_zero_seconds": before,
    }
    return Bench("scale", ratio, figures, tuple(lines))


_run: Run | None = None  # of this process


def _start(model_name: str, input_size: int, num_clients: int, device_name: str, folder: str) -> dict[str, float]:
    """Make this process's run and take it through round 0; the seconds of its parts."""
    global _run
    config = load(
        overrides={
            "dataset": "synthetic",
            "model": model_name,
            "weights": "none",
            "input_size": input_size,
            "mask_rule": "none",
            "num_clients": num_clients,
            "participation": min(1.0, SAMPLED / num_clients),
            "sharding": "iid",
            "num_rounds": NEVER,
            "evaluate_every": NEVER,
            "checkpoint_every": NEVER,
            "schedule": "constant",
            "learning_rate": 1e-3,
            "threads": 1,
            "device": device_name,
            "results_dir": str(Path(folder) / str(num_clients)),
        }
    )
    home = resident(config)
    home.shards = DrawnShards(num_clients, len(home.data.train), home.device)
    _run = make_run(config, home, Logbook(config), None, app)
    row: Row = {"clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
    seconds: dict[str, float] = {}
    if num_clients <= ALL_ASKED:
        started = time.perf_counter()
        _run.ridge_statistics(row)
        seconds["ridge head"] = time.perf_counter() - started
    head = {name: torch.randn_like(home.pretrained[name]) * 0.05 for name in HEAD_PARAMETERS}
    _run.model = GlobalModel({name: home.pretrained[name] for name in home.trained_names(1)}, Frozen(head))
    started = time.perf_counter()
    _run.distribute(row)
    seconds["frozen head"] = time.perf_counter() - started
    return seconds


def _round(number: int) -> float:
    """Seconds of round `number` of this process's run, from sampling to its row in rounds.csv."""
    assert _run is not None
    started = time.perf_counter()
    _run.train_rounds(number, number)
    return time.perf_counter() - started
