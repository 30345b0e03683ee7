"""A study that is killed at random and started again makes the tables of one that was left alone."""

import random
import time
from pathlib import Path

import pytest
from child_processes import command
from conftest import numbers

from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.study_file import load_study

STUDY = """
name = "killed"
seeds = [0, 1, 2]
[settings]
num-clients = 10
train-subset = 400
validation-size = 60
test-subset = 60
calibration-size = 20
num-rounds = 6
local-steps = 2
checkpoint-every = 1
threads = 1
[search]
from = 1e-3
to = 10.0
per-decade = 1
rounds = [1, 6]
keep = 2
[[arm]]
name = "dense"
settings = { mask-rule = "none" }
[[arm]]
name = "sparse"
settings = { mask-rule = "least-sensitive" }
"""
TABLES = ("table.csv", "search.csv", "curves.csv", "settings.json")


def rounds_done(results: Path) -> int:
    # Not rglob: it would walk into folders of checkpoints, which go as it walks.
    return sum(path.read_text().count("\n") for path in (results / "killed" / "runs").glob("*/rounds.csv"))


@pytest.mark.slow
def test_a_study_killed_three_times_gives_the_same_tables(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_studies([load_study(path)], whole)
    instants = random.Random(0)
    total = rounds_done(whole)
    words = ["study", str(path), "--results-dir", str(cut), "--jobs", "2"]  # two processes that train
    for kill in range(3):
        with command(words, tmp_path) as study:
            wanted = int(total * (kill + instants.uniform(0.3, 0.9)) / 3)
            while study.is_alive() and rounds_done(cut) < wanted:
                time.sleep(0.01)
            time.sleep(instants.uniform(0.0, 0.2))
            assert study.is_alive(), "it ended before it was killed"
    with command(words, tmp_path) as study:
        study.join(300)
        assert study.exitcode == 0
    for name in TABLES:
        assert (cut / "killed" / name).read_bytes() == (whole / "killed" / name).read_bytes(), name
    folders = sorted(folder.name for folder in (whole / "killed" / "runs").iterdir())
    assert folders == sorted(folder.name for folder in (cut / "killed" / "runs").iterdir())
    for name in folders:
        assert numbers(cut / "killed" / "runs" / name) == numbers(whole / "killed" / "runs" / name)
