"""Federated learning under the lens of task arithmetic: a Flower app, and the same as a function."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_taskarith.federation import History
    from fl_taskarith.simulate import simulate

__all__ = ["History", "simulate"]


def __getattr__(name: str) -> Any:
    """Import the public names when first used: reading the configuration must not cost an import of torch."""
    if name == "simulate":
        from fl_taskarith.simulate import simulate

        return simulate
    if name == "History":
        from fl_taskarith.federation import History

        return History
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
