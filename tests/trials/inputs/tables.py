"""Words of any kind in the cells of CSV and Markdown tables, and in the labels of figures."""

import csv
import io
import random
import re
from pathlib import Path

from extremes import VALUES, WORDS
from matplotlib import pyplot

from fl_taskarith.figures.markdown import markdown_table
from fl_taskarith.figures.plots import save_figure
from fl_taskarith.storage.csv_text import FORMULA, csv_text, plain_words

FAULT = "words in tables and figures"
PIECES = (*WORDS, *(value for value in VALUES if isinstance(value, str)), "=", "+", "-", "@", "\t", "\r", "\n", "'",
          '"', ",", ";", "|", "\\", "$", "{", "}", "^", "_", "\u2028", "\x85")  # fmt: skip


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    def words() -> str:
        return "".join(drawn.choice(PIECES) for _ in range(drawn.randint(0, 4)))

    cells = [[words() for _ in range(3)] for _ in range(3)]
    text = csv_text([dict(zip("abc", row, strict=True)) for row in cells])
    read = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert [[plain_words(cell) for cell in row] for row in read] == [
        [re.sub("\r\n?", "\n", cell) for cell in row] for row in cells
    ]
    assert not any(re.match(FORMULA, cell) for row in read for cell in row)
    lines = markdown_table(["a", "b", "c"], cells).split("\n")
    assert len(lines) == 5
    for line, row in zip(lines[2:], cells, strict=True):
        shown = [re.sub(r"\\([\\|])", r"\1", cell) for cell in re.findall(r" ((?:[^\\|]|\\.)*) \|", line)]
        assert shown == [re.sub(r"[\r\n]+", " ", cell) for cell in row], line
    if drawn.random() < 0.02:
        figure, axes = pyplot.subplots(figsize=(1, 1), dpi=20)
        axes.set_title(drawn.choice(["$", ""]) + words() + "$")
        axes.text(0, 0, words().replace("\n", " "))
        assert all(path.stat().st_size for path in save_figure(figure, folder / "figure"))
        return "with a figure"
    return "written and read"
