"""Thousands of rounds of one run, with its evaluations and checkpoints: does a round come to take longer, or more?"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

from fl_taskarith.bench.report import Bench, resident_bytes
from fl_taskarith.bench.worker import workers
from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config, load
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.workspace.machine import choose_device

WARM_UP = 100  # rounds that are not compared
COMPARED = 100  # first and last rounds after them
BIN = 20  # rounds per point of the figure: as many as from one checkpoint to the next


def bench_long_run(
    model_name: str = "vit_glyph", input_size: int = 16, rounds: int = 2_000, device_name: str = "auto"
) -> Bench:
    """Time and memory of every round of a masked run on digits, in a process of its own on one thread.

    The ratio is the time of the last hundred rounds over that of the hundred after warm-up. Time is from one round's
    end to the next one's, so that rows, evaluations and checkpoints count; memory is what the process holds then.

    Raises:
        ConfigError: too few rounds to compare.
    """
    if rounds < WARM_UP + 2 * COMPARED:
        raise ConfigError(
            f"--rounds {rounds} is too few: {WARM_UP} of warm-up, the {COMPARED} after them and the last {COMPARED} "
            "are needed."
        )
    with scratch_folder() as folder, workers(["run"]) as processes:
        config = _config(model_name, input_size, rounds, device_name, folder)
        seconds, memory = processes["run"].apply(_run, (config,))
    first, last = slice(WARM_UP, WARM_UP + COMPARED), slice(rounds - COMPARED, rounds)
    per_round = {name: fmean(seconds[part]) for name, part in (("first", first), ("last", last))}
    held = {name: fmean(memory[part]) for name, part in (("first", first), ("last", last))}
    lines = [
        f"{model_name} at {input_size} px on digits, {config.sampled_clients} clients of {config.local_steps} step in "
        f"each of {rounds:,} rounds, on {choose_device(device_name).type} with 1 thread",
        *(
            f"rounds {part.start + 1:>5} to {part.stop:>5}  {1000 * per_round[name]:6.1f} ms per round  "
            f"{held[name] / 2**20:6.1f} MiB"
            for name, part in (("first", first), ("last", last))
        ),
        f"memory: {held['last'] / held['first']:.3f} times",
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "rounds": rounds,
        "clients_per_round": config.sampled_clients,
        "warm_up_rounds": WARM_UP,
        "compared_rounds": COMPARED,
        "seconds_per_round": per_round,
        "median_seconds_per_round": {"first": median(seconds[first]), "last": median(seconds[last])},
        "memory_bytes": held,
        "memory_ratio": held["last"] / held["first"],
        "rounds_of_a_point": BIN,
        "seconds_by_round": _binned(seconds),
        "memory_by_round": _binned(memory),
    }
    return Bench(
        "long-run",
        per_round["last"] / per_round["first"],
        figures,
        tuple(lines),
        draw=lambda output: draw(figures, output),
    )


def draw(figures: dict[str, Any], output: Path) -> None:
    """Both curves: output.png and output.pdf."""
    from matplotlib import pyplot

    from fl_taskarith.figures.plots import COLOURS, STYLE, save_figure

    with pyplot.rc_context(cast(Any, STYLE)):
        figure, panels = pyplot.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
        for axes, column, scale, colour, style, label in (
            (panels[0], "seconds_by_round", 1e3, COLOURS[0], "-", "ms per round"),
            (panels[1], "memory_by_round", 2**-20, COLOURS[1], "--", "memory of the process (MiB)"),
        ):
            values = [scale * value for value in figures[column]]
            axes.plot([figures["rounds_of_a_point"] * (index + 1) for index in range(len(values))], values,
                      color=colour, linestyle=style, linewidth=1.4)  # fmt: skip
            axes.set_ylim(0, 1.25 * max(values))
            axes.set_xlabel("communication round")
            axes.set_ylabel(label)
        save_figure(figure, output)


def _run(config: Config) -> tuple[list[float], list[int]]:
    """Seconds of each round from 1 on, and the bytes that this process holds after it."""
    ends: list[float] = []
    memory: list[int] = []

    def note(server_round: int, num_rounds: int, row: Row) -> None:
        ends.append(time.perf_counter())
        memory.append(resident_bytes())

    run_federation(config, app, progress=note)
    return [end - start for start, end in pairwise(ends)], memory[1:]


def _binned(values: Sequence[float]) -> list[float]:
    """Means of `BIN` values each; a rest that fills none is left out."""
    return [fmean(values[start : start + BIN]) for start in range(0, len(values) - BIN + 1, BIN)]


def _config(model_name: str, input_size: int, rounds: int, device_name: str, folder: Path) -> Config:
    return load(
        overrides={
            "model": model_name,
            "input_size": input_size,
            "weights": "pretrained" if model_name == "vit_glyph" else "none",
            "num_clients": 10,
            "participation": 0.2,
            "num_rounds": rounds,
            "local_steps": 1,
            "batch_size": 8,
            "learning_rate": 0.1,
            "evaluate_every": 10,
            "checkpoint_every": 20,
            "draw_curves": False,
            "threads": 1,
            "precision": "fp32",
            "compile": "off",
            "device": device_name,
            "results_dir": str(folder),
        }
    )
