"""The figures of a report: PDFs that the study drew, at their own size where it fits."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from fl_taskarith.errors import CheckpointError
from fl_taskarith.report.latex import Latex
from fl_taskarith.report.read_results import StudyFolder
from fl_taskarith.report.sentences import wording

LIMIT = 2  # of figures in a section
COLUMN = 310.0  # points (1/72 inch) up to which a figure stays readable in one column of 84 mm


class Figure(NamedTuple):
    """A PDF of a study; `name` is that of its copy, without ending; `wide` ones span both columns."""

    name: Latex
    pdf: bytes
    caption: str
    wide: bool


def figures_of(section: str, root: Path, studies: Sequence[StudyFolder]) -> list[Figure]:
    """Return the figures of a section, from the study of its name: one of each kind before a second of any.

    After them come the first of each kind of picture that other commands put below `root`: of shards and of masks.

    Raises:
        CheckpointError: one cannot be read.
    """
    pdfs = [path for study in studies if study.name == section for path in sorted(study.folder.glob("*.pdf"))]
    choices: dict[Path, tuple[int, int, str]] = {}
    for order, (pattern, caption) in enumerate(wording("FIGURES").get(section, ())):
        for place, path in enumerate(path for path in pdfs if fnmatch(path.name, f"{pattern}.pdf")):
            choices.setdefault(path, (place, order, caption))
    chosen = sorted(choices, key=lambda path: choices[path])[:LIMIT]
    for pattern, caption in wording("PICTURES").get(section, ()):
        for path in sorted(root.glob(pattern))[:1]:
            chosen.append(path)
            choices[path] = 0, 0, caption
    names = [re.sub(r"[^A-Za-z0-9]+", "-", f"{section}-{path.stem}").strip("-") for path in chosen]
    names = [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, start=1)]
    return [_figure(Latex(name), path, choices[path][2]) for name, path in zip(names, chosen, strict=True)]


def _figure(name: Latex, path: Path, caption: str) -> Figure:
    try:
        pdf = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read the figure {path}: {error.strerror}.") from error
    number = rb"(\d+\.?\d*)"  # the box is of the first page, if it is in plain text
    box = re.search(rb"/MediaBox\s*\[\s*%b\s+[\d.]+\s+%b" % (number, number), pdf)
    return Figure(name, pdf, caption, box is not None and float(box[2]) - float(box[1]) > COLUMN)
