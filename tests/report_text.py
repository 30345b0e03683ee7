"""A report as a reader sees it: what TeX makes of the files it consists of."""

import csv
import re
from pathlib import Path

from fl_taskarith.report.document import write_report


def report(root: Path, output: Path, **options: Path) -> str:
    """What TeX makes of main.tex."""
    return expanded(write_report(root, output, **options)[0])


def expanded(main: Path) -> str:
    """A main.tex with what it inputs in its place, and the macros of numbers.tex replaced by what they stand for."""
    text = main.read_text(encoding="utf-8").replace(r"\input{numbers}", "")
    numbers = (main.parent / "numbers.tex").read_text(encoding="utf-8")
    skew = r"\1" if r"\reportLabelSkewtrue" in numbers else ""
    text = re.sub(r"\\ifreportLabelSkew\n(.*?)\\fi\n", skew, text, flags=re.DOTALL)
    text = re.sub(r"\\input\{(\w[\w/-]+)\}", lambda found: (main.parent / f"{found[1]}.tex").read_text("utf-8"), text)
    own_text = re.compile(r"\\reportOwnText\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{#1\}")
    for found in re.finditer(r"\\newcommand\{(\\report\w+)\}(?:\[\d\])?\{", numbers):
        body = group(numbers, found.end())
        macro = re.escape(found[1]) + r"(\{\}|(?![A-Za-z]))"
        while (place := re.search(macro, text)) is not None:
            end, own = place.end(), ""
            if "[1]" in found[0]:
                own = re.sub(r"%.*\n", "", group(text, end + 1))
                end += len(group(text, end + 1)) + 2
            filled = own_text.sub(lambda asked, own=own: own or f"[Your text: {asked[1]}]", body)
            text = text[: place.start()] + filled.replace("#1", own) + text[end:]
    assert r"\report" not in text and r"\input" not in text
    return "\n".join(line for line in text.splitlines() if not line.startswith("%"))


def group(text: str, start: int) -> str:
    """What stands from `start` up to the brace that closes the one before it."""
    depth, end = 1, start
    while depth:
        depth += 0 if text[end - 1] == "\\" else {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def prose(tex: str) -> str:
    """On one line, as a reader would search it, without the tables and figures that a sentence refers to."""
    return re.sub(r" \((?:Table|Figures?)~\\ref\{[^()]*\}\)", "", " ".join(tex.split()))


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
