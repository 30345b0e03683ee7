"""What every benchmark writes: the machine, the figures, and one ratio."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.workspace.machine import describe_device


@dataclass(frozen=True)
class Bench:
    """One benchmark's result.

    Attributes:
        name: of the benchmark.
        ratio: how many times the reference takes what ours takes, or as `lines` say.
        figures: JSON values.
        lines: for a reader.
        draw: writes the figure PATH.png and PATH.pdf, where there is one.
    """

    name: str
    ratio: float
    figures: Mapping[str, Any]
    lines: tuple[str, ...] = field(default=())
    draw: Callable[[Path], None] | None = None

    def write(self, folder: Path, device: torch.device) -> Path:
        """folder/NAME.json, with versions and machine, and the figure beside it; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "bench": self.name,
            "ratio": self.ratio,
            "device": describe_device(device),
            "threads": torch.get_num_threads(),
            **environment(),
            **self.figures,
        }
        path = folder / f"{self.name}.json"
        write_atomically(path, json.dumps(record, indent=2) + "\n")
        if self.draw is not None:
            self.draw(folder / self.name)
        return path


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, with everything queued on a GPU done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternate(works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work, taken in turn `repeats` times after one round that is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            seconds = seconds_of(work, device)
            if repeat:
                measured[name].append(seconds)
    return measured


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process (or, on a GPU, torch in it) has held so far, in bytes.

    Linux hands getrusage's figure down to child processes, so there the kernel's figure of this process is read.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kernel_bytes("VmHWM")


def resident_bytes() -> int:
    """The memory that this process holds now, in bytes; where there is no /proc, the most it has held."""
    return _kernel_bytes("VmRSS")


def _kernel_bytes(field_name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition(f"{field_name}:")[2].split()[0])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
