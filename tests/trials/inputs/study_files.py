"""Study files: sound ones with one or two values, of any type and size, in a place where they do not belong."""

import copy
import csv
import random
import re
from pathlib import Path
from typing import Any

from extremes import WORDS, disturb, file_of

from fl_taskarith.storage.csv_text import plain_words
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.search import MOST_RUNS
from fl_taskarith.study.study_file import ARM, GROUP, SEARCH, STUDY, load_study
from fl_taskarith.study.tables import write_tables

FAULT = "study files with extreme values"
KEYS = (*STUDY, *GROUP, *ARM, *SEARCH, "local-steps", "num_rounds", "learning-rate", "model", "a\x1bb", "")
SOUND: dict[str, Any] = {
    "title": "A study",
    "name": "family/part",
    "seeds": [0, 1],
    "reference": "dense",
    "settings": {"num-clients": 10, "num-rounds": 4, "mask-rule": "none"},
    "search": {"from": 1e-3, "to": 10.0, "per-decade": 1, "rounds": [1, 2], "keep": 2, "seed": 0},
    "grid": {"local-steps": [4, 8]},
    "group": [{"name": "iid", "settings": {"sharding": "iid"}}, {"name": "Nc = 2"}],
    "arm": [
        {"name": "dense"},
        {"name": "half", "settings": {"participation": 0.1}, "same-rate-as": "dense", "group": ["iid"]},
        {"name": "clipped", "settings": {"clip-norm": 1.0}, "search": {"to": 100.0}},
    ],
}


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    document, path = copy.deepcopy(SOUND), folder / "study.toml"
    for table in (document["arm"][0], document["arm"][2], *document["group"][1:]):
        if drawn.random() < 0.5:
            table["name"] = drawn.choice(WORDS)
    document["reference"] = document["arm"][1]["same-rate-as"] = document["arm"][0]["name"]
    for _ in range(drawn.choice([0, 0, 1, 1, 2])):
        disturb(document, drawn, KEYS)
    path.write_bytes(file_of(document, drawn))
    study = load_study(path)
    assert 0 < len(study.arms) * len(study.seeds) <= MOST_RUNS
    assert len({arm.title for arm in study.arms}) == len(study.arms)
    if drawn.random() < 0.15:
        _check_tables(StudyResults(study, folder))
        return "accepted, with tables"
    return "accepted"


def _check_tables(results: StudyResults) -> None:
    write_tables(results)
    with open(results.folder / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [plain_words(row["arm"]) for row in rows] == [arm.label for arm in results.study.arms]
    assert not any(re.match(r"[=+@\t-]", row[name]) for row in rows for name in ("arm", "group"))
    written = (results.folder / "README.md").read_text(encoding="utf-8")
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(lines) == len(results.study.arms) + len(results.study.groups)
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1
