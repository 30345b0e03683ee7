"""The figures of a report: PDFs that the study drew, at their own size where it fits."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from fl_taskarith.report.latex import Latex
from fl_taskarith.report.read_results import StudyFolder
from fl_taskarith.report.sentences import wording

LIMIT = 2  # of figures in a section
COLUMN = 310.0  # points (1/72 inch) up to which a figure stays readable in one column of 84 mm


class Figure(NamedTuple):
    """A PDF of a study; `name` is that of its copy, without ending; `wide` ones span both columns."""

    name: Latex
    source: Path
    caption: str
    wide: bool


def figures_of(section: str, studies: Sequence[StudyFolder]) -> list[Figure]:
    """Return the figures of a section, from the study of its name: one of each kind before a second of any."""
    pdfs = [path for study in studies if study.name == section for path in sorted(study.folder.glob("*.pdf"))]
    choices: dict[Path, tuple[int, int, str]] = {}
    for order, (pattern, caption) in enumerate(wording("FIGURES").get(section, ())):
        for place, path in enumerate(path for path in pdfs if fnmatch(path.name, f"{pattern}.pdf")):
            choices.setdefault(path, (place, order, caption))
    return [
        Figure(Latex(_plain_name(f"{section}-{path.stem}")), path, caption, _width(path) > COLUMN)
        for path, (_, _, caption) in sorted(choices.items(), key=lambda item: item[1])[:LIMIT]
    ]


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _width(path: Path) -> float:
    """Return the width of the first page in points; 0 where the PDF does not say it in plain."""
    box = re.search(rb"/MediaBox\s*\[\s*([\d.]+)\s+[\d.]+\s+([\d.]+)", path.read_bytes())
    return float(box[2]) - float(box[1]) if box else 0.0
