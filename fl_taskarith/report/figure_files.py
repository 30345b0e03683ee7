"""Which of a study's figures go into the report: PDFs that the study drew, at their own size where it fits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fl_taskarith.report.latex import Latex
from fl_taskarith.report.read_results import StudyFolder

# Of each section: patterns of file names, first choice first, with the caption; at most LIMIT of them are shown.
WANTED: dict[str, tuple[tuple[str, str], ...]] = {
    "centralized": (("curves-schedule", "Schedules: accuracy and loss against epochs; bands: one sd over seeds."),),
    "fedavg-iid": (("curves", "FedAvg, iid: accuracy and loss against rounds and bytes; bands: one sd over seeds."),),
    "heterogeneity": (
        ("heat-map", "Test accuracy by division of the data and local steps, mean ± sd."),
        ("drift", "Norm and pairwise cosine of the clients' task vectors."),
        ("accuracy*", "Test accuracy by division of the data and local steps: mean ± sd, and every seed."),
    ),
    "sparsity": (
        ("density", "Test accuracy against density, mean ± sd."),
        ("calibration-rounds", "Test accuracy against calibration rounds, mean ± sd."),
        ("accuracy*", "Masks: mean ± sd, and every seed."),
    ),
}
LIMIT = 2
COLUMN = 310.0  # points (1/72 inch) up to which a figure stays readable in one column of 84 mm


@dataclass(frozen=True)
class Figure:
    """A PDF of a study; `name` is that of its copy, without ending; `wide` ones span both columns."""

    name: Latex
    source: Path
    caption: str
    wide: bool


def figures_of(section: str, studies: Sequence[StudyFolder]) -> list[Figure]:
    """The figures of a section, from the study of its name."""
    wanted = WANTED.get(section, ())
    drawn = [path for study in studies if study.name == section for path in sorted(study.folder.glob("*.pdf"))]
    found: dict[Path, tuple[int, int, str]] = {}
    for order, (pattern, caption) in enumerate(wanted):
        for place, path in enumerate(path for path in drawn if fnmatch(path.name, f"{pattern}.pdf")):
            found.setdefault(path, (place, order, caption))  # one of each kind comes before a second of any
    return [
        Figure(Latex(_plain_name(f"{section}-{path.stem}")), path, caption, _width(path) > COLUMN)
        for path, (_, _, caption) in sorted(found.items(), key=lambda item: item[1])[:LIMIT]
    ]


def _width(path: Path) -> float:
    """Of the first page, in points; 0 where the PDF does not say it in plain."""
    box = re.search(rb"/MediaBox\s*\[\s*([\d.]+)\s+[\d.]+\s+([\d.]+)", path.read_bytes())
    return float(box[2]) - float(box[1]) if box else 0.0


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
