"""The reader of JSON and CSV records: what it returns has the shape that was asked for, and all else is told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import file_names
from fl_taskarith.storage.record_files import (
    COUNT,
    SCALAR,
    Within,
    conforming,
    parsed_csv,
    parsed_json,
    read_csv,
    read_json,
)

SHAPE = {"name": str, "rates": [Within(float, 0)], "n?": (COUNT, None), "settings?": {str: SCALAR}}
COLUMNS = {"arm": str, "seed": COUNT, "percent": (Within(float, 0, 100), None)}
REMEDY = "Restore it."

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", *SHAPE, "n"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def sound() -> dict[str, Any]:
    return {"name": "x", "rates": [0.1, 1], "n": None, "settings": {"a": 1, "b": True}, "more": [[]]}


@given(values)
def test_any_value_either_has_the_shape_or_is_told(value: Any) -> None:
    try:
        told = parsed_json(Path("r.json"), json.dumps(value).encode(), SHAPE, REMEDY)
    except CheckpointError as error:
        assert str(error).startswith("Cannot read r.json: ") and str(error).endswith(REMEDY) and len(str(error)) < 400
    else:
        assert isinstance(told["name"], str)
        assert all(math.isfinite(rate) and rate >= 0 for rate in told["rates"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 3}, "name is 3, expected a string"),
        ({"rates": [0.1, "x"]}, r'rates\[1\] is "x", expected a number from 0'),
        ({"rates": [math.inf]}, r"rates\[0\] is inf"),
        ({"rates": [10**400]}, r"rates\[0\]"),
        ({"rates": {}}, "rates is {}, expected a list"),
        ({"n": True}, "n is true, expected a whole number from 0 or nothing"),
        ({"settings": {"a": []}}, r"settings\.a is \[\]"),
        ({"name": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_the_place_is_named(change: dict[str, Any], told: str) -> None:
    assert conforming(sound(), SHAPE) == sound()
    with pytest.raises(CheckpointError, match=told):
        parsed_json(Path("r.json"), json.dumps(sound() | change).encode(), SHAPE, REMEDY)
    lacking = {key: value for key, value in sound().items() if key != "rates"}
    with pytest.raises(ValueError, match="rates is missing"):
        conforming(lacking, SHAPE)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe{}", b"9" * 5000, b"{", None, "folder"])
def test_a_file_that_is_no_json_is_told(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"Cannot read .*r\.json: .*\. Restore it\."):
        read_json(path, object, REMEDY)
    if content is None:
        assert read_json(path, object, REMEDY, optional=True) is None
        assert read_csv(path / "below", {}, REMEDY, optional=True) is None


words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=4)


@given(st.lists(st.tuples(words, st.integers(0, 9), st.none() | st.floats(0, 100)), max_size=4))
def test_tables_come_back_as_they_were_written(lines: list[tuple[str, int, float | None]]) -> None:
    written = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
    assert parsed_csv(Path("t.csv"), csv_text(written, list(COLUMNS)).encode(), COLUMNS, REMEDY) == written


def test_a_table_of_nothing_has_no_lines() -> None:
    for empty in (csv_text([]), csv_text([], list(COLUMNS))):
        assert parsed_csv(Path("t.csv"), empty.encode(), COLUMNS, REMEDY) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("arm,seed,percent\na,1,50", "cut short"),
        ("arm,seed,percent\na,1\n", "line 2 is damaged: 2 cells below 3 columns"),
        ("arm,seed,percent\na,1,50,\n", "4 cells"),
        ("arm,seed,percent\na,1_0,50\n", 'seed in line 2 is "1_0", expected a whole number'),
        ("arm,seed,percent\na,1,100.5\n", "percent in line 2 is 100.5, expected a number from 0 up to 100"),
        ("arm,seed,percent\na,1,1e999\n", "percent in line 2 is inf"),
        ("arm,seed,percent\na,,5\n", "seed in line 2 is missing"),
        ("arm,percent\na,5\n", "seed in line 2 is missing|seed is missing"),
        ("arm,percent\n", "seed is missing"),
        ("arm,seed,seed\na,1,2\n", "one name"),
        ('arm,seed,percent\n"a,1,50\n', "unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(text: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        parsed_csv(Path("t.csv"), text.encode(), COLUMNS, REMEDY)


@given(st.lists(st.text(max_size=6) | st.sampled_from(["Nc = 2", "Nc: 2", "nc-2", "é", "e", "", "-"]), unique=True))
def test_no_two_words_have_one_file_name(words: list[str]) -> None:
    names = file_names(words)
    assert len(set(names.values())) == len(words)
    assert all(name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names.values())


def test_names_are_plain_where_they_can_be() -> None:
    assert file_names(["Nc = 2", "iid"]) == {"Nc = 2": "nc-2", "iid": "iid"}
    both = file_names(["Nc = 2", "Nc: 2"])
    assert all(name.startswith("nc-2-") for name in both.values())
    assert len(file_names(["x" * 500])["x" * 500]) <= 100
