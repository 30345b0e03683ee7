"""From a hundred to a hundred thousand virtual clients, as many sampled each round: time and memory of a round."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fl_taskarith.bench.report import Bench, median, resident_bytes
from fl_taskarith.bench.worker import ONLY_ROUNDS, start, train_round, workers
from fl_taskarith.config.settings import Config, load
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.workspace.machine import choose_device
from fl_taskarith.workspace.workspace import Resident

SAMPLED = 10  # clients per round
SHARD_SIZE = 32  # examples of a client
ALL_ASKED = 1_000  # up to so many clients, round 0 asks all of them for the ridge head's sums too


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
    measured: dict[int, list[float]] = {count: [] for count in counts}
    with scratch_folder() as folder, workers(counts) as processes:
        before = {
            count: process.apply(
                start,
                (
                    _config(model_name, input_size, count, device_name, folder),
                    partial(_drawn_shards, count),
                    count <= ALL_ASKED,
                ),
            )
            for count, process in processes.items()
        }
        for number in range(1, repeats + 2):
            for count, process in processes.items():
                seconds = process.apply(train_round, (number,))
                if number > 1:
                    measured[count].append(seconds)
        memory = {count: process.apply(resident_bytes) for count, process in processes.items()}
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


def _drawn_shards(num_clients: int, home: Resident) -> DrawnShards:
    return DrawnShards(num_clients, len(home.data.train), home.device)


def _config(model_name: str, input_size: int, num_clients: int, device_name: str, folder: Path) -> Config:
    return load(
        overrides={
            **ONLY_ROUNDS,
            "dataset": "synthetic",
            "model": model_name,
            "input_size": input_size,
            "num_clients": num_clients,
            "participation": min(1.0, SAMPLED / num_clients),
            "sharding": "iid",
            "learning_rate": 1e-3,
            "threads": 1,
            "precision": "fp32",
            "compile": "off",
            "device": device_name,
            "results_dir": str(folder / str(num_clients)),
        }
    )
