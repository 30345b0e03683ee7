"""Files of one-shot benchmarks: sound ones with one or two values, of any type and size, where they do not belong."""

import copy
import random
from pathlib import Path
from typing import Any

from extremes import WORDS, disturb, file_of

from fl_taskarith.one_shot.benchmark_file import BENCHMARK, DATA, TASKS, TRAINING, load_one_shot
from fl_taskarith.study.search import MOST_RUNS

FAULT = "one-shot files with extreme values"
KEYS = (*BENCHMARK, *TASKS, *DATA, *TRAINING, "from", "to", "per-decade", "local-steps", "seed", "a\x1bb", "")
SOUND: dict[str, Any] = {
    "title": "A benchmark",
    "name": "tiny",
    "seeds": [0, 1],
    "methods": ["task-arithmetic", "ties"],
    "tasks": {"family": "inversions", "number": 4, "heads": "shared"},
    "settings": {"local-steps": 4, "batch-size": 8, "validation-size": 60, "calibration-size": 0},
    "search": {"from": 1e-5, "to": 0.1, "per-decade": 1},
    "data": [{"name": "low", "overlap": 1.0}, {"name": "high", "overlap": 0.0}],
    "training": [{"name": "low"}, {"name": "high", "steps-spread": 4, "batch-size-spread": 2.0}],
}


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    document, path = copy.deepcopy(SOUND), folder / "benchmark.toml"
    for table in (document, *document["data"], *document["training"]):
        if drawn.random() < 0.3:
            table["title" if table is document else "name"] = drawn.choice(WORDS)
    for _ in range(drawn.choice([0, 0, 1, 1, 2])):
        disturb(document, drawn, KEYS)
    path.write_bytes(file_of(document, drawn))
    one_shot = load_one_shot(path)
    assert 0 < len(one_shot.cells) <= MOST_RUNS
    assert all(len(one_shot.fingerprint(cell)) == 8 for cell in one_shot.cells[:3])
    assert all(0 <= cell.overlap <= 1 and cell.spread.steps >= 1 for cell in one_shot.cells)
    assert one_shot.reference in one_shot.methods
    return "accepted"
