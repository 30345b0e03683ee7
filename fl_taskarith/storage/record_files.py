"""The one reader of JSON and CSV records: whatever is wrong with a file becomes an error with its path and the place.

What a record has to hold is said by a shape:

- str, bool, int, float, None: a value of that type; a float is finite, and may be written as a whole number
- object: anything
- Within(kind, low, high): a number in a closed interval; NaN too where `nan`
- (shape, shape): one of several
- [shape]: a list
- {"key": shape, "key?": shape, str: shape}: a table; "?" may be missing, and `str` stands for all other keys
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config.rule import shown
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.csv_text import plain_words

Shape = Any
USER = "It is a text of yours: save it in UTF-8."
SCALAR = (str, bool, int, float)
LARGEST = 2**63  # of a whole number: beyond it neither pandas nor a file of ours has any
_NAMES = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", type(None): "nothing"}
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*([eE][-+]?[0-9]+)?|inf|nan)")


@dataclass(frozen=True)
class Within:
    """A number of a kind from `low` to `high`; NaN, which stands for what has no value, where `nan`."""

    kind: type[int] | type[float]
    low: float = -math.inf
    high: float = math.inf
    nan: bool = False

    def accepts(self, value: object) -> bool:
        """Whether `value` is such a number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if value != value:
            return self.nan
        representable = abs(value) <= LARGEST if isinstance(value, int) else self.kind is float and math.isfinite(value)
        return representable and self.low <= value <= self.high


COUNT = Within(int, 0, LARGEST)


def read_json(path: Path, shape: Shape, remedy: str, *, optional: bool = False) -> Any:
    """Return what a JSON file holds, which has the given shape; None without a file that is `optional`.

    Raises:
        CheckpointError: it is missing, unreadable, damaged, or of another shape; names the path, the place and the
            remedy, which is a sentence.
    """
    content = read_content(path, remedy, optional=optional)
    return None if content is None else parsed_json(path, content, shape, remedy)


def parsed_json(path: Path, content: bytes, shape: Shape, remedy: str) -> Any:
    """Return what the content of a JSON file at `path` says; see `read_json`."""
    try:
        value = json.loads(content.decode())
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters, which no file can be written with
        return conforming(value, shape)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error, remedy) from error


def read_csv(
    path: Path, columns: Mapping[str, Shape], remedy: str, *, optional: bool = False, filled: bool = False
) -> list[dict[str, Any]] | None:
    """Return the lines of a CSV file by column; a column or cell may be missing where its shape accepts None.

    Columns that are not asked for are left as text. None without a file that is `optional`. A file that is `filled` has
    at least one line below its header.

    Raises:
        CheckpointError: as `read_json`; or a line has more or fewer cells than the header, or the last one no end.
    """
    content = read_content(path, remedy, optional=optional)
    records = None if content is None else parsed_csv(path, content, columns, remedy)
    if filled and records == []:
        raise unreadable(path, ValueError("it is empty"), remedy)
    return records


def parsed_csv(path: Path, content: bytes, columns: Mapping[str, Shape], remedy: str) -> list[dict[str, Any]]:
    """Return the lines of the content of a CSV file at `path`, none of an empty one; see `read_csv`."""
    if not content:  # as it is written where nothing is known yet
        return []
    try:
        text = content.decode()
        if not text.endswith("\n"):
            raise ValueError("its last line is cut short")
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        absent = {name: None for name in columns if name not in header}
        if len(set(header)) < len(header):
            raise ValueError("two of its columns have one name")
        records = []
        for number, line in enumerate(lines, start=2):
            if len(line) != len(header):
                raise ValueError(f"line {number} is damaged: {len(line)} cells below {len(header)} columns")
            cells: dict[str, Any] = absent | dict(zip(header, line, strict=True))
            for name, shape in columns.items():
                cells[name] = conforming(_cell(cells[name], shape), shape, f"{name} in line {number}")
            records.append(cells)
        for name in absent:  # though there be no line
            conforming(None, columns[name], name)
    except (ValueError, csv.Error) as error:
        raise unreadable(path, error, remedy) from error
    return records


def read_content(path: Path, remedy: str, *, optional: bool = False) -> bytes | None:
    """Return the bytes of a file; None without one that is `optional`.

    Raises:
        CheckpointError: it is missing, a folder, or may not be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if optional:
            return None
        raise unreadable(path, error, remedy) from error
    except OSError as error:
        raise unreadable(path, error, remedy) from error


def read_words(path: Path) -> str:
    """Return the text of a file of the user's, without white space around it; "" without one.

    Raises:
        CheckpointError: it cannot be read, or is not in UTF-8.
    """
    try:
        return (read_content(path, USER, optional=True) or b"").decode().strip()
    except UnicodeDecodeError as error:
        raise unreadable(path, error, USER) from error


def unreadable(path: Path, error: Exception, remedy: str, place: str = "") -> CheckpointError:
    """Return the error that says what is wrong with the file at `path`, at a place in it, and what to do."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    where = f"{place} of {path}" if place else str(path)
    return CheckpointError(f"Cannot read {where}: {reason[:300].rstrip('.')}. {remedy}")


def conforming(value: Any, shape: Shape, place: str = "") -> Any:
    """Return `value`, which has the given shape.

    Raises:
        ValueError: it has another; names the place.
    """
    alternatives = shape if isinstance(shape, tuple) else (shape,)
    if any(_is_plain(each) and _accepts(value, each) for each in alternatives):
        return value
    for each in alternatives:
        if isinstance(each, list) and isinstance(value, list):
            for number, member in enumerate(value):
                conforming(member, each[0], f"{place}[{number}]")
            return value
        if isinstance(each, dict) and isinstance(value, dict):
            _check_table(value, each, place)
            return value
    expected = " or ".join(dict.fromkeys(map(_words, alternatives)))
    raise ValueError(f"{place or 'it'} is {'missing' if value is None else shown(value)}, expected {expected}")


def _check_table(value: Mapping[str, Any], shape: Mapping[Any, Shape], place: str) -> None:
    known = {key.removesuffix("?") for key in shape if key is not str}
    for key, of_key in shape.items():
        for name in (value.keys() - known) if key is str else [key.removesuffix("?")]:
            where = f"{place}.{name}" if place else str(name)
            if name in value:
                conforming(value[name], of_key, where if where.isprintable() else ascii(where))
            elif not key.endswith("?"):
                raise ValueError(f"{where} is missing")


def _is_plain(shape: Shape) -> bool:
    return not isinstance(shape, (list, dict))


def _accepts(value: Any, shape: Shape) -> bool:
    if shape in (int, float):
        shape = Within(shape)
    if isinstance(shape, Within):
        return shape.accepts(value)
    return value is None if shape is None else isinstance(value, shape)


def _words(shape: Shape) -> str:
    if isinstance(shape, Within):
        bounds = f" from {shape.low:g}" if shape.low > -math.inf else ""
        return _NAMES[shape.kind] + bounds + (f" up to {shape.high:g}" if shape.high < LARGEST else "")
    if isinstance(shape, (list, dict)):
        return "a list" if isinstance(shape, list) else "a table"
    return _NAMES[type(None) if shape is None else shape]


def _cell(text: str | None, shape: Shape) -> Any:
    """Return a cell by its looks: None where it is empty, a number where one is asked for."""
    if not text:
        return "" if shape is str and text is not None else None
    alternatives = shape if isinstance(shape, tuple) else (shape,)
    if bool in alternatives and text in ("True", "False"):
        return text == "True"
    if str in alternatives:
        return plain_words(text)
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
