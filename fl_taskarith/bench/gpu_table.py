"""The rows of `bench gpu` as a table of text."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = ("", "images/s", "x bare", "% peak", "% nominal", "first s", "paid back", "MiB")
LEGEND = (
    "x bare: as fast as so many bare compiled loops, measured in alternation. % peak: of the matrix product above in",
    "that precision; % nominal: of the data sheet's. first s: the first call, which compiles. paid back: rounds after",
    "which that is made up for, against the eager loop. MiB: the peak since the row began, with all that is held.",
)
LONGEST = 160  # characters of a reason


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per row, in the order of measurement, under their headings and above what these mean."""
    width = max((len(_title(row)) for row in rows), default=0)
    lines = [_line(HEADINGS, width)]
    for row in rows:
        reason = row.get("failed")
        lines.append(f"{_title(row):<{width}}  {reason[:LONGEST]}" if reason else _line(_cells(row), width))
        remarks = [*row.get("warnings", []), *([row["note"]] if "note" in row else [])]
        lines += [f"{'':<{width}}  ({remark[:LONGEST]})" for remark in remarks]
    return [*lines, *LEGEND]


def _title(row: Mapping[str, Any]) -> str:
    size = f"{row['input_size']} px " if row["input_size"] else ""
    return f"{size}{row['precision']} {row['what']}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "flop_per_second" in row:
        speed = f"{row['flop_per_second'] / 1e12:.1f} TF/s"
    elif "largest_difference" in row:
        speed = f"differ {row['largest_difference']:.0e}"
    else:
        speed = f"{row['images_per_second']:,.0f}"
    payback = row.get("payback", "")
    return [
        _title(row),
        speed,
        _number(row.get("against_bare"), 2),
        *(_number(row.get(f"share_of_{name}_peak"), 1, 100) for name in ("measured", "nominal")),
        _number(row.get("first_call_seconds"), 1),
        "never" if payback is None else _number(payback or None, 0),
        _number(row["peak_bytes"], 0, 2**-20),
    ]


def _number(value: float | None, digits: int, times: float = 1) -> str:
    return "" if value is None else f"{value * times:,.{digits}f}"


def _line(cells: Sequence[str], width: int) -> str:
    return f"{cells[0]:<{width}}" + "".join(f"{cell:>13}" for cell in cells[1:])
