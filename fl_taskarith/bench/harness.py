"""What every benchmark shares: alternating measurements, steps in a bare loop, memory, settings and the record."""

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fl_taskarith.config.settings import Config, load
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.workspace.machine import available_threads, choose_device, describe_device
from fl_taskarith.workspace.workspace import Workspace

Name = TypeVar("Name", bound=Hashable)

CLASSES = 100  # of the synthetic images
CLIENTS, LOCAL_STEPS = 10, 4  # of a round, unless a benchmark says otherwise
STEPS = CLIENTS * LOCAL_STEPS
LEARNING_RATE = 1e-4
NEVER = 10**9
ROUNDS_ALONE: dict[str, object] = {
    **{"dataset": "synthetic", "weights": "none", "mask_rule": "none", "num_rounds": NEVER, "evaluate_every": NEVER},
    **{"checkpoint_every": NEVER, "num_clients": CLIENTS, "participation": 1.0, "sharding": "iid"},
    **{"local_steps": LOCAL_STEPS, "learning_rate": LEARNING_RATE, "schedule": "constant", "precision": "fp32"},
    "compile": "off",
}
"""Settings of a run that does nothing but train a random backbone under a random head on synthetic images."""


@dataclass(frozen=True)
class Result:
    """The result of a benchmark.

    Attributes:
        ratio: how many times as long the reference takes as ours, or what the benchmark's docstring says; None if
            that was not measured.
        figures: JSON values besides the options.
        lines: for a reader.
        draw: writes the figure PATH.png and PATH.pdf, where there is one.
        suffix: behind the benchmark's name in those of its files.
    """

    ratio: float | None
    figures: Mapping[str, Any]
    lines: Sequence[str]
    draw: Callable[[Path], object] | None = None
    suffix: str = ""

    def write(self, name: str, options: Namespace, folder: Path) -> Path:
        """Write folder/NAME.json with options, versions and machine, and the figure; return the path of the JSON."""
        make_folder(folder)
        machine = {"device": describe_device(choose_device(options.device)), "threads": torch.get_num_threads()}
        given = {key: value for key, value in vars(options).items() if key != "device"}
        record = {"bench": name, "ratio": self.ratio, **machine, **environment(), **given, **self.figures}
        path = folder / f"{name}{self.suffix}.json"
        write_atomically(path, json.dumps(record, indent=2) + "\n")
        if self.draw is not None:
            self.draw(folder / f"{name}{self.suffix}")
        return path


def round_settings(options: Namespace, **own: object) -> Config:
    """Return the settings `ROUNDS_ALONE` under the options, on all cores, with `own` in place of the rest."""
    keys = ("model", "input_size", "device", "batch_size", "precision", "compile")
    given = {key: getattr(options, key) for key in keys if hasattr(options, key)}
    return load(overrides=ROUNDS_ALONE | {"threads": available_threads()} | given | own)


def random_model(model_name: str, input_size: int, device: torch.device) -> Backbone:
    """Return a model with random weights, the same every time, under a small random head."""
    model = build_model(model_name, CLASSES, input_size, weights="none", download=False, seed=0)
    torch.nn.init.normal_(model.get_parameter(HEAD_PARAMETERS[0]), std=0.05)
    return model.to(device)


def random_head(home: Workspace) -> dict[str, Tensor]:
    """Return a small random classifier under its own names, each tensor in the shape that `home` has it."""
    return {name: torch.randn_like(home.pretrained[name]) * 0.05 for name in HEAD_PARAMETERS}


Clock = Callable[[], float]
"""Gives seconds: time.perf_counter, or time.process_time for those of this process alone, on a shared machine."""


def seconds_of(work: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of one call, with everything queued on a GPU done."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = clock()
    work()
    wait()
    return clock() - started


def alternate(timed: Mapping[Name, Callable[[], float]], repeats: int) -> dict[Name, list[float]]:
    """Call each function, which returns its seconds, in alternation `repeats` times after one uncounted round."""
    rounds = [{name: work() for name, work in timed.items()} for _ in range(repeats + 1)]
    return {name: [seconds[name] for seconds in rounds[1:]] for name in timed}


def measure(
    works: Mapping[Name, Callable[[], object]], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[Name, list[float]]:
    """Return the seconds of `repeats` calls of each work, in alternation after one uncounted round."""
    return alternate({name: partial(seconds_of, work, device, clock) for name, work in works.items()}, repeats)


def medians(measured: Mapping[Name, Sequence[float]], parts: int = 1) -> dict[Name, float]:
    """Return the median seconds of each work, divided by the number of `parts` that one call does."""
    return {name: statistics.median(seconds) / parts for name, seconds in measured.items()}


def time_lines(seconds: Mapping[str, float], images: int, notes: Mapping[str, str] | None = None) -> list[str]:
    """Return a line per work: its milliseconds, images per second where it takes `images`, and a note on it."""
    return [
        f"{name:<32} {1e3 * each:10.1f} ms" + (f"  {images / each:9.1f} images/s" if images else "")
        + (f"  {notes[name]}" if notes else "")
        for name, each in seconds.items()
    ]  # fmt: skip


def require_equal(losses: Mapping[str, float], first: str, second: str, tolerance: float) -> None:
    """Raise RuntimeError if two losses differ by more than a share `tolerance` of the first: the work is unequal."""
    if not abs(losses[second] - losses[first]) <= tolerance * abs(losses[first]):
        raise RuntimeError(f"losses of {first} and {second} differ: {losses}")


def take_steps(losses: Iterable[Callable[[], Tensor]], optimizer: torch.optim.Optimizer) -> Tensor:
    """Take one step of `optimizer` on each loss, a scalar computed when called; return the last loss."""
    for compute in losses:
        loss = compute()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.detach()


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process (or, on a GPU, torch in it) has held so far, in bytes.

    Linux hands getrusage's figure down to child processes, so there the kernel's figure of this process is read.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kernel_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the memory that this process holds now, in bytes; where there is no /proc, the most it has held."""
    return _kernel_bytes("VmRSS")


def _kernel_bytes(field_name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition(f"{field_name}:")[2].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
