"""Markdown tables, summaries over seeds as their cells, and the templates (*.md.j2) that hold the sentences."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fl_taskarith.figures.statistics import Paired, Summary

BLANK = "–"  # a cell of what is not known


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of plain words."""
    head, *lines = ("| " + " | ".join(map(markdown_cell, cells)) + " |" for cells in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *lines])


def markdown_cell(words: str) -> str:
    r"""Return words as one cell of a table: on one line, with \ and | escaped, which would end it or escape its end."""
    return re.sub(r"([\\|])", r"\\\1", re.sub(r"[\r\n]+", " ", words))


def number(value: float, digits: int = 2, sign: str = "") -> str:
    """Return `value` with so many decimals, and with its sign where `sign` is "+"; `BLANK` for NaN."""
    return BLANK if math.isnan(value) else f"{value:{sign}.{digits}f}"


def three_digits(value: float, sign: str = "") -> str:
    """Return `value` to three significant digits, "0.0835" or "1,720", and with its sign where `sign` is "+"."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:{sign},.0f}" if abs(rounded) >= 1000 else f"{rounded:{sign}.3g}"


def mean_with_sd(summary: Summary, digits: int = 2) -> str:
    """Return "mean ± sd"; the mean alone of a single value, `BLANK` of none."""
    mean = number(summary.mean, digits)
    return mean if math.isnan(summary.sd) else f"{mean} ± {summary.sd:.{digits}f}"


def mean_with_interval(difference: Paired, digits: int = 2) -> str:
    """Return "mean [low, high]", all signed; without an interval "mean (first, second)", the mean alone, or `BLANK`.

    An interval of no width, where all seeds differ alike, is none.
    """
    mean = number(difference.mean, digits, "+")
    if difference.has_width:
        return f"{mean} [{bound(difference.low, digits)}, {bound(difference.high, digits)}]"
    if difference.over:
        return f"{mean} (all seeds alike)"
    each = ", ".join(number(value, digits, "+") for value in difference.values)
    return f"{mean} ({each})" if difference.n > 1 else mean


def bound(value: float, digits: int = 2, sign: str = "+") -> str:
    """Return an end of an interval with so many decimals, or with up to 4 where fewer would hide its side of 0."""
    while value and digits < 4 and round(value, digits) == 0:
        digits += 1
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.00


def render_markdown(template: Path, **variables: Any) -> str:
    """Return the filled jinja2 template; several empty lines become one, and the text ends with one line break.

    Raises:
        jinja2.TemplateError: the template is wrong, or needs a variable that is not given.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), trim_blocks=True, lstrip_blocks=True, autoescape=False,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["three_digits"] = three_digits
    text = environment.get_template(template.name).render(variables)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
