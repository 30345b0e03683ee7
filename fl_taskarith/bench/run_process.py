"""A run in a process of its own, round by round: for benchmarks whose sides must not share memory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from fl_taskarith.bench.harness import Name, alternate, random_head, resident_bytes, seconds_of
from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config
from fl_taskarith.server.launch import make_run
from fl_taskarith.server.run import Run
from fl_taskarith.storage.processes import worker_pool
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.workspace.global_model import Frozen, GlobalModel
from fl_taskarith.workspace.make_mask import make_mask, server_sums
from fl_taskarith.workspace.workspace import Workspace, workspace

Result = TypeVar("Result")
Shards = Callable[[Workspace], Sequence[Tensor]]

_run: Run | None = None  # of this process


@dataclass(frozen=True)
class Start:
    """How a process begins its run.

    shards: make the clients' shards, in place of those that the configuration describes. ridge: also ask all clients
    for the sums of the ridge head, and leave them aside.
    """

    config: Config
    shards: Shards | None = None
    ridge: bool = False


@dataclass(frozen=True)
class Rounds:
    """What was measured of one run: seconds of its start by part, of each round, memory in bytes, and the last row."""

    before: dict[str, float]
    seconds: list[float]
    memory: int
    last_row: Row


def alternate_runs(starts: Mapping[Name, Start], repeats: int) -> dict[Name, Rounds]:
    """Measure `repeats` rounds of each run in alternation, in a process each, after one uncounted round."""
    with ExitStack() as stack:
        pools = {name: stack.enter_context(worker_pool(1)) for name in starts}
        before = {name: pools[name].submit(start, starts[name]).result() for name in pools}
        seconds = alternate({name: lambda pool=pool: pool.submit(train_round).result()  # type: ignore[misc]
                             for name, pool in pools.items()}, repeats)  # fmt: skip
        ends = {name: pool.submit(end).result() for name, pool in pools.items()}
    return {name: Rounds(before[name], seconds[name], *ends[name]) for name in starts}


def in_new_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Return what `work(*arguments)` returns in a new process."""
    with worker_pool(1) as pool:
        return pool.submit(work, *arguments).result()


def start(given: Start) -> dict[str, float]:
    """Make this process's run and take it to round 1; return the seconds of what it asks of all clients before."""
    global _run
    home = workspace(given.config)
    if given.shards is not None:
        home.shards = given.shards(home)
    run = _run = make_run(given.config, home, Logbook(given.config), None, app)
    row: Row = {"clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
    sums = {"ridge head": seconds_of(partial(run.ridge_statistics, row), home.device)} if given.ridge else {}
    run.model = random_start(home)
    return {**sums, "frozen head": seconds_of(partial(run.distribute, row), home.device)}


def random_start(home: Workspace) -> GlobalModel:
    """Return the starting weights, in the model's shapes, under a random head; of a masked run those of its mask."""
    head, trained = random_head(home), {name: home.pretrained[name] for name in home.trained_names(1)}
    mask = make_mask(home, server_sums(home, head)).mask if home.config.masked else None
    return GlobalModel(trained if mask is None else mask.gather(trained), Frozen(head, mask))


def train_round() -> float:
    """Return the seconds of the next round of this process's run, from sampling to its row in rounds.csv."""
    assert _run is not None, "start comes first"
    number = len(_run.logbook.rows) + 1
    return seconds_of(partial(_run.train_rounds, number, number), _run.home.device)


def first_loss() -> float:
    """Return the clients' mean training loss in round 1."""
    assert _run is not None, "start comes first"
    return float(_run.logbook.rows[0]["train_loss"])


def end() -> tuple[int, Row]:
    """Return the memory that this process holds, in bytes, and the row of the last round."""
    assert _run is not None, "start comes first"
    return resident_bytes(), _run.logbook.rows[-1]
