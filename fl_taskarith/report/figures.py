"""Which of a study's figures go into the report: PDFs that the study drew, at their own size where it fits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fl_taskarith.report.latex import Latex
from fl_taskarith.report.results import StudyFolder

# Of each section: patterns of file names, first choice first, with the caption; at most LIMIT of them are shown.
WANTED: dict[str, tuple[tuple[str, str], ...]] = {
    "centralized": (
        ("*curve*", "Centralized training: accuracy and loss against epochs."),
        ("*loss*", "Centralized training: loss against epochs."),
    ),
    "heterogeneity": (
        ("*heat*", "Test accuracy by division of the data and local steps."),
        ("*drift*", "Client drift by division of the data and local steps."),
        ("accuracy*", "Test accuracy by division of the data and local steps: mean ± sd, and every seed."),
    ),
    "sparsity": (
        ("*rule*", "Mask rules at equal density: mean ± sd, and every seed."),
        ("*densit*", "Density: mean ± sd, and every seed."),
        ("*calibration*", "Calibration rounds: mean ± sd, and every seed."),
    ),
}
LIMIT = 2
COLUMN = 252.0  # points (1/72 inch) up to which a figure fits one column


@dataclass(frozen=True)
class Figure:
    """A PDF of a study; `name` is that of its copy, without ending; `wide` ones span both columns."""

    name: Latex
    source: Path
    caption: str
    wide: bool


def figures_of(section: str, studies: Sequence[StudyFolder]) -> list[Figure]:
    """The figures of a section, from the study of its name."""
    found: list[Figure] = []
    for study in (study for study in studies if study.name == section):
        drawn = sorted(study.folder.glob("*.pdf"))
        for pattern, caption in WANTED.get(section, ()):
            for path in drawn:
                if fnmatch(path.name, f"{pattern}.pdf") and path not in [figure.source for figure in found]:
                    found.append(
                        Figure(Latex(_plain_name(f"{section}-{path.stem}")), path, caption, _width(path) > COLUMN)
                    )
                    break
    return found[:LIMIT]


def _width(path: Path) -> float:
    """Of the first page, in points; 0 where the PDF does not say it in plain."""
    box = re.search(rb"/MediaBox\s*\[\s*([\d.]+)\s+[\d.]+\s+([\d.]+)", path.read_bytes())
    return float(box[2]) - float(box[1]) if box else 0.0


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
