"""From a hundred to a hundred thousand virtual clients, as many sampled each round: time and memory of a round."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fl_taskarith.bench.harness import Result, medians, round_settings
from fl_taskarith.bench.run_process import Start, alternate_runs
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.workspace.workspace import Workspace

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
        """Return the positions of a client's examples, int64 [SHARD_SIZE]."""
        if not 0 <= client < self.num_clients:
            raise IndexError(client)
        generator = random_generator(0, "drawn shards", client=client)
        return torch.from_numpy(generator.choice(self.num_examples, SHARD_SIZE, replace=False)).to(self.device)


def bench_scale(options: Namespace) -> Result:
    """Alternate rounds of one run for each number of clients; measure the memory of its process after the last.

    The runs are real ones, each in a process of its own on one thread. Round 0 is apart: it sends the frozen head to
    every client, once, and asks every client for sums.
    """
    counts = sorted(set(options.clients))
    with scratch_folder() as folder:
        runs = alternate_runs({count: run_start(options, count, folder) for count in counts}, options.repeats)
    measured, memory = ({count: getattr(runs[count], name) for count in counts} for name in ("seconds", "memory"))
    per_round, spread = medians(measured), max(memory.values()) / min(memory.values())
    lines = [f"{SAMPLED} clients of {SHARD_SIZE} examples per round; memory within {100 * (spread - 1):.1f} %"]
    for count, run in runs.items():
        once = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in run.before.items())
        lines.append(f"K = {count:>7,}  {1000 * per_round[count]:7.1f} ms per round  {run.memory / 2**20:6.0f} MiB  "
                     f"once: {once}")  # fmt: skip
    figures = {
        **{"sampled": SAMPLED, "shard_size": SHARD_SIZE, "clients": counts, "seconds": measured},
        **{"seconds_per_round": per_round, "memory_bytes": memory, "memory_ratio": spread},
        "round_zero_seconds": {count: run.before for count, run in runs.items()},
    }
    return Result(per_round[counts[-1]] / per_round[counts[0]], figures, lines)


def run_start(options: Namespace, num_clients: int, folder: Path) -> Start:
    """Return how a run among `num_clients` drawn shards begins, its files in `folder`."""
    config = round_settings(options, num_clients=num_clients, participation=min(1.0, SAMPLED / num_clients),
                            learning_rate=1e-3, threads=1, results_dir=str(folder / str(num_clients)))  # fmt: skip
    return Start(config, partial(_drawn_shards, num_clients), num_clients <= ALL_ASKED)


def _drawn_shards(num_clients: int, home: Workspace) -> DrawnShards:
    return DrawnShards(num_clients, len(home.data.train), home.device)
