"""Federated learning under the lens of task arithmetic: a Flower app, and the same as a function."""

import os
from typing import TYPE_CHECKING, Any

# torch's OpenMP threads spin while they wait for one another, for long by default. Where another process wants a core,
# spinning threads keep each other off it: 200 ms instead of 16 ms for a small step on 2 shared cores. Without any
# spinning the kernel wakes them for every operation: 12.5 ms instead of 6 ms on cores of one's own. GNU's OpenMP, which
# torch brings on Linux, takes a count in between; others know waiting policies only. Both are read when torch is first
# imported, which this package does later.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from fl_taskarith.server.run import History
    from fl_taskarith.server.simulate import simulate

__all__ = ["History", "simulate"]


def __getattr__(name: str) -> Any:
    """Import the public names when first used: reading the configuration must not cost an import of torch."""
    if name == "simulate":
        from fl_taskarith.server.simulate import simulate

        return simulate
    if name == "History":
        from fl_taskarith.server.run import History

        return History
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
