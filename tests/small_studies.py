"""Small studies for tests, and training that takes no time."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fl_taskarith.config.settings import Config
from fl_taskarith.server.history import History
from fl_taskarith.server.round_zero_cache import Starts
from fl_taskarith.storage.correctness import CORRECT, HEAD_CORRECT, packed
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.study.definition import Study
from fl_taskarith.study.study_file import load_study

STUDY = """
title = "A study"
name = "tiny"
seeds = [0, 1, 2]
reference = "dense"

[settings]
num-clients = 10
num-rounds = 2
mask-rule = "none"
local-steps = 1

[[arm]]
name = "dense"
settings = { learning-rate = 0.01 }

[[arm]]
name = "head alone"
settings = { learning-rate = 0.1, trainable = "head" }
"""

SEARCHED = """
name = "searched"
seeds = [0, 1]
[settings]
num-clients = 10
num-rounds = 2
mask-rule = "none"
[search]
from = 1e-3
to = 10.0
per-decade = 1
rounds = [1, 2]
keep = 2
[[arm]]
name = "dense"
[[arm]]
name = "half"
settings = { participation = 0.1 }
same-rate-as = "dense"
"""

IMAGES = 200  # of the test split of `KnowingTraining`


def study_of(text: str, tmp_path: Path) -> Study:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return load_study(path)


class FakeTraining:
    """Stands for `simulate`: writes a run's folder through the real logbook, with accuracies from formulas.

    Attributes:
        accuracy: of a run on the validation images.
        test: what that is on the test images: by default the best run is the worst one there, so that a choice on test
            shows.
        loss: what that is as a validation loss: by default it tells no runs apart.
    """

    def __init__(
        self, accuracy: Callable[[Config], float], test: Callable[[float], float] = lambda value: 1.0 - value
    ) -> None:
        self.accuracy = accuracy
        self.test = test
        self.loss: Callable[[float], float] = lambda value: 1.0
        self.runs: list[Config] = []

    def facts(self, config: Config) -> dict[str, object]:
        """What run.json holds beside the settings."""
        return {"data": {"train": 1000}}

    def __call__(self, config: Config, deadline: float | None = None, starts: Starts | None = None) -> History:
        self.runs.append(config)
        with Logbook(config) as logbook:
            logbook.note(**self.facts(config))
            logbook.write_round({"round": 0, "val_accuracy": 0.5, "test_accuracy": 0.5, "uplink_bytes": 7})
            value = self.accuracy(config)
            for server_round in range(1, config.num_rounds + 1):
                logbook.write_round(
                    {
                        "round": server_round,
                        "learning_rate": config.learning_rate,
                        "val_accuracy": value,
                        "val_loss": self.loss(value),
                        "test_accuracy": self.test(value),
                        "uplink_bytes": 2_000_000 * server_round,
                        "train_seconds": 3.0,
                        "task_vector_norm": 0.5 * server_round,
                    }
                )
        return History(logbook.folder, logbook.rows)


class KnowingTraining(FakeTraining):
    """Notes of each run which of 200 test images it has right: the easiest ones, some at random; 100 by its head."""

    def facts(self, config: Config) -> dict[str, object]:
        chance = np.random.default_rng([config.seed, config.shard_seed, config.trainable == "head"])
        ease = np.linspace(1, 0, IMAGES) + 0.05 * chance.normal(size=IMAGES)
        right = np.argsort(np.argsort(-ease)) < round(IMAGES * self.test(self.accuracy(config)))
        head = np.arange(IMAGES) < IMAGES // 2
        return {"data": {"train": 1000, "test": IMAGES}, CORRECT: [packed(right)], HEAD_CORRECT: [packed(head)]}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
