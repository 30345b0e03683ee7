"""Cells and tables in Markdown, and CSV text."""

import csv
import io
import math
from pathlib import Path

import pytest
from matplotlib import pyplot

from fl_taskarith.figures.markdown import (
    BLANK,
    markdown_table,
    mean_with_interval,
    mean_with_sd,
    number,
    three_digits,
)
from fl_taskarith.figures.plots import save_figure
from fl_taskarith.figures.statistics import paired, summarise
from fl_taskarith.storage.csv_text import csv_text, plain_words


def test_a_table_has_a_line_per_row_and_none_breaks() -> None:
    assert markdown_table(["a", "b"], [["1", "two\nlines"]]) == "| a | b |\n|---|---|\n| 1 | two lines |"
    assert markdown_table(["a|b"], [["\\|"]]).split("\n")[::2] == [r"| a\|b |", r"| \\\| |"]


def test_cells_say_no_more_than_their_number_of_seeds_allows() -> None:
    assert [mean_with_sd(summarise(values)) for values in ([], [1.0], [1.0, 2.0])] == [BLANK, "1.00", "1.50 ± 0.71"]
    pairs = [paired(dict(enumerate(values)), dict.fromkeys(range(3), 1.0)) for values in ([], [0.5], [2.0, 2.0])]
    assert [mean_with_interval(each) for each in pairs] == [BLANK, "-0.50", "+1.00 (+1.00, +1.00)"]
    assert number(math.nan) == BLANK and number(0.25, 1) == "0.2"


def test_three_digits_without_an_exponent_for_what_is_large() -> None:
    values = (1_716.0, 999.6, 999.4, 0.08351, 1.0, 0.0, 1e-7, -2_044_999.0)
    assert [three_digits(value) for value in values] == [
        "1,720", "1,000", "999", "0.0835", "1", "0", "1e-07", "-2,040,000",
    ]  # fmt: skip
    assert [three_digits(value, "+") for value in (1_716.0, 0.5, -1.0)] == ["+1,720", "+0.5", "-1"]
    assert three_digits(math.nan) == "nan"


def test_csv_text_keeps_bits_and_leaves_the_unknown_empty() -> None:
    records = [{"a": 0.1 + 0.2, "b": None}, {"a": math.nan, "b": True}]
    assert csv_text(records) == "a,b\n0.30000000000000004,\n,True\n"
    assert csv_text([], ["a"]) == "a\n" and csv_text([]) == ""
    assert csv_text([{"b": 1}], ["a", "b"]) == "a,b\n,1\n"
    with pytest.raises(ValueError):
        csv_text([{"c": 1}], ["a"])


@pytest.mark.parametrize("words", ["=HYPERLINK(1)", "+1", "-x", "@a", "\t=1", "'=1", "''-", "'a", "a=1", "", 'ä,"\n='])
def test_no_words_become_a_formula_and_all_are_read_back(words: str) -> None:
    (cell,) = list(csv.reader(io.StringIO(csv_text([{"a": words}]), newline="")))[1] or [""]
    assert not cell.startswith(("=", "+", "-", "@", "\t")) and plain_words(cell) == words
    assert csv_text([{"a": -1.5, "=b": -1}]) == "a,'=b\n-1.5,-1\n"


def test_any_words_can_stand_in_a_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    figure, axes = pyplot.subplots(figsize=(1, 1))
    for place, words in enumerate(["costs $5 and $6", "$\\frac{$", "$x^$", "$", "$x^2$", "a $_", "$x$\nb", "a\n$x^$"]):
        axes.text(0, place, words)
    assert all(path.stat().st_size for path in save_figure(figure, tmp_path / "figure"))
    assert [text.get_parse_math() for text in axes.texts] == [True, False, False, False, True, False, True, False]
    assert not caplog.records  # nothing is drawn that the font lacks, such as the end of a line
