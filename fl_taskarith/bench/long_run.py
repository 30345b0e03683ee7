"""Thousands of rounds of one run, with its evaluations and checkpoints: do time and memory of a round grow?"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

from fl_taskarith.bench.harness import Result, resident_bytes, round_settings
from fl_taskarith.bench.run_process import in_new_process
from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.storage.run_folder import Row

WARM_UP = 100  # rounds that are not compared
COMPARED = 100  # first and last rounds after them
BIN = 20  # rounds per point of the figure: as many as from one checkpoint to the next


def bench_long_run(options: Namespace) -> Result:
    """Measure time and memory of every round of a masked run on digits, in a process of its own on one thread.

    The ratio is the time of the last hundred rounds over that of the hundred after warm-up. Time is from one round's
    end to the next one's, so that rows, evaluations and checkpoints count; memory is what the process holds then.

    Raises:
        ConfigError: too few rounds to compare.
    """
    rounds = options.rounds
    if rounds < WARM_UP + 2 * COMPARED:
        raise ConfigError(
            f"--rounds {rounds} is too few: {WARM_UP} of warm-up, the {COMPARED} after them and the last {COMPARED} "
            "are needed."
        )
    with scratch_folder() as folder:
        config = digits_settings(options, folder)
        seconds, memory = in_new_process(times_and_memory, config)
    parts = {"first": slice(WARM_UP, WARM_UP + COMPARED), "last": slice(rounds - COMPARED, rounds)}
    per_round = {name: fmean(seconds[part]) for name, part in parts.items()}
    held = {name: fmean(memory[part]) for name, part in parts.items()}
    lines = [
        f"rounds {part.start + 1:>5} to {part.stop:>5}  {1000 * per_round[name]:6.1f} ms per round  "
        f"{held[name] / 2**20:6.1f} MiB"
        for name, part in parts.items()
    ]
    figures = {
        **{"clients_per_round": config.sampled_clients, "warm_up_rounds": WARM_UP, "compared_rounds": COMPARED},
        **{"seconds_per_round": per_round, "memory_bytes": held, "memory_ratio": held["last"] / held["first"]},
        "median_seconds_per_round": {name: median(seconds[part]) for name, part in parts.items()},
        **{"rounds_of_a_point": BIN, "seconds_by_round": _binned(seconds), "memory_by_round": _binned(memory)},
    }
    lines.append(f"memory: {held['last'] / held['first']:.3f} times")
    return Result(per_round["last"] / per_round["first"], figures, lines, draw=lambda output: draw(figures, output))


def draw(figures: Mapping[str, Any], output: Path) -> None:
    """Draw time and memory by round into output.png and output.pdf."""
    from matplotlib import pyplot

    from fl_taskarith.figures.plots import COLOURS, STYLE, save_figure

    with pyplot.rc_context(cast(Any, STYLE)):
        figure, (times, memories) = pyplot.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for axes, column, scale, look, label in (
        (times, "seconds_by_round", 1e3, {"color": COLOURS[0], "linestyle": "-"}, "ms per round"),
        (memories, "memory_by_round", 2**-20, {"color": COLOURS[1], "linestyle": "--"}, "memory of the process (MiB)"),
    ):
        values = [scale * value for value in figures[column]]
        rounds = [figures["rounds_of_a_point"] * (index + 1) for index in range(len(values))]
        axes.plot(rounds, values, linewidth=1.4, **look)
        axes.set(ylim=(0, 1.25 * max(values)), xlabel="communication round", ylabel=label)
    save_figure(figure, output)


def times_and_memory(config: Config) -> tuple[list[float], list[int]]:
    """Run `config`; return the seconds of each round from 1 on, and the bytes that this process holds after it."""
    ends: list[float] = []
    memory: list[int] = []

    def note(server_round: int, num_rounds: int, row: Row) -> None:
        ends.append(time.perf_counter())
        memory.append(resident_bytes())

    run_federation(config, app, progress=note)
    return [end - start for start, end in pairwise(ends)], memory[1:]


def _binned(values: Sequence[float]) -> list[float]:
    """Return means of `BIN` values each; a rest that fills none is left out."""
    return [fmean(values[start : start + BIN]) for start in range(0, len(values) - BIN + 1, BIN)]


def digits_settings(options: Namespace, folder: Path) -> Config:
    """Return the settings of a run of short rounds on digits, its files in `folder`."""
    return round_settings(
        options, dataset="digits", weights="pretrained" if options.model == "vit_glyph" else "none",
        mask_rule="least-sensitive", sharding="classes", participation=0.2, num_rounds=options.rounds, local_steps=1,
        batch_size=8, learning_rate=0.1, schedule="cosine", evaluate_every=10, checkpoint_every=20, draw_curves=False,
        threads=1, results_dir=str(folder),
    )  # fmt: skip
