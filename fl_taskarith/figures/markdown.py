"""Markdown tables, and summaries over seeds as their cells."""

import math
from collections.abc import Sequence

from fl_taskarith.figures.statistics import Paired, Summary

BLANK = "–"  # a cell of what is not known


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; a line break inside a cell becomes a space."""
    head, *lines = ("| " + " | ".join(cells).replace("\n", " ") + " |" for cells in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *lines])


def number(value: float, digits: int = 2, sign: str = "") -> str:
    """Return `value` with so many decimals, and with its sign where `sign` is "+"; `BLANK` for NaN."""
    return BLANK if math.isnan(value) else f"{value:{sign}.{digits}f}"


def mean_with_sd(summary: Summary, digits: int = 2) -> str:
    """Return "mean ± sd"; the mean alone of a single value, `BLANK` of none."""
    mean = number(summary.mean, digits)
    return mean if math.isnan(summary.sd) else f"{mean} ± {summary.sd:.{digits}f}"


def mean_with_interval(difference: Paired, digits: int = 2) -> str:
    """Return "mean [low, high]", all signed; the mean alone of a single pair, `BLANK` of none."""
    mean = number(difference.mean, digits, "+")
    if math.isnan(difference.low):
        return mean
    return f"{mean} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
