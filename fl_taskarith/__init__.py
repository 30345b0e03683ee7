"""Federated learning under the lens of task arithmetic: a Flower app, and the same as a function."""

import os
from importlib import import_module
from typing import Any

# torch's OpenMP threads spin while they wait for one another, for long by default. Where another process wants a core,
# spinning threads keep each other off it: 200 ms instead of 16 ms for a small step on 2 shared cores. Without any
# spinning the kernel wakes them for every operation: 12.5 ms instead of 6 ms on cores of one's own. GNU's OpenMP, which
# torch brings on Linux, takes a count in between; others know waiting policies only. Both are read when torch is first
# imported, which this package does later.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PUBLIC = {
    "simulate": "fl_taskarith.server.simulate",
    "History": "fl_taskarith.server.history",
    "results": "fl_taskarith.describe.runs_at_hand",
    "studies": "fl_taskarith.describe.runs_at_hand",
    "study": "fl_taskarith.study.run_files",
    "mask": "fl_taskarith.describe.one_mask",
    "merge": "fl_taskarith.one_shot.merge_models",
}
__all__ = list(PUBLIC)  # types of all of them are in __init__.pyi


def __getattr__(name: str) -> Any:
    """Import the public names when first used: reading the configuration must not cost an import of torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
