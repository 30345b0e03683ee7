"""Ctrl-C and SIGTERM: the round under way is finished and saved."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_processes import command
from conftest import numbers

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.server.interruption import Interrupted, finishing_rounds
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.checkpoint import list_checkpoints
from fl_taskarith.storage.run_folder import read_rounds

SLOW = ["num-rounds=150", "evaluate-every=150", "checkpoint-every=150", "train-subset=200", "num-clients=10",
        "mask-rule=none", "learning-rate=0.001", "validation-size=60", "test-subset=60",
        "draw-curves=false"]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_the_last_whole_round_and_says_which(number: int, tmp_path: Path) -> None:
    with command(["simulate", *SLOW, f"results-dir={tmp_path}", "run-name=cut"], tmp_path) as process:
        rounds = tmp_path / "cut" / "rounds.csv"
        while not rounds.exists() or rounds.read_text().count("\n") < 4:
            assert process.is_alive()
            time.sleep(0.02)
        os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == 128 + number
    printed, errors = ((tmp_path / f"{name}.txt").read_text() for name in ("printed", "errors"))
    rows, record = read_rounds(tmp_path / "cut"), json.loads((tmp_path / "cut" / "run.json").read_text())
    last = rows[-1]["round"]
    assert 2 <= last < 150 and record["status"] == "interrupted"
    assert f"Interrupted; saved after round {last}" in printed and f"Stopped after round {last} of 150" in errors
    assert (tmp_path / "cut" / "run.log").read_text().startswith(printed[:200])
    assert list_checkpoints(tmp_path / "cut" / "checkpoints")[0][0] == last


def test_an_interrupted_run_goes_on_to_the_same_numbers(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, num_rounds=4, checkpoint_every=4)
    whole = simulate(config, run_name="whole")

    def interrupt(server_round: int, *_: object) -> None:
        if server_round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    from fl_taskarith.client.app import app

    with pytest.raises(Interrupted, match="after round 2 of 4"):
        run_federation(dataclasses.replace(config, run_name="cut"), app, progress=interrupt)
    assert numbers(simulate(config, run_name="cut").folder) == numbers(whole.folder)


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell runs in its background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_a_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.server.interruption.ECHO", 600.0)
    with finishing_rounds():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same one, by another way
        monkeypatch.setattr("fl_taskarith.server.interruption.ECHO", 0.0)
        with pytest.raises(Interrupted, match="in the middle") as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.exit_status == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_first_round_a_signal_ends_a_run_at_once(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fl_taskarith.server.federated.FederatedRun.ridge_statistics", interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate(quick_config, run_name="early")
    record = json.loads((Path(quick_config.results_dir) / "early" / "run.json").read_text())
    assert record["status"] == "interrupted"


STUDY = """
name = "cut"
seeds = [0, 1]
[settings]
mask-rule = "none"
learning-rate = 0.003
num-clients = 10
train-subset = 200
validation-size = 60
test-subset = 60
num-rounds = 3000
checkpoint-every = 3000
evaluate-every = 3000
[[arm]]
name = "dense"
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_every_run_of_a_study_saves_its_round_when_the_study_is_stopped(number: int, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    words = ["study", str(tmp_path / "study.toml"), "--jobs", "2", "--results-dir", str(tmp_path)]
    runs = tmp_path / "cut" / "runs"
    with command(words, tmp_path) as process:
        while sum(path.read_text().count("\n") > 3 for path in runs.glob("*/rounds.csv")) < 2:
            assert process.is_alive(), (tmp_path / "errors.txt").read_text()
            time.sleep(0.05)
        os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.time() + 30  # after SIGKILL the workers are on their own
    while any(json.loads(path.read_text())["status"] == "running" for path in runs.glob("*/run.json")):
        assert time.time() < deadline
        time.sleep(0.1)
    for folder in runs.iterdir():
        assert list_checkpoints(folder / "checkpoints")[0][0] == read_rounds(folder)[-1]["round"] >= 2


def test_a_signal_in_the_last_round_is_told_after_it(quick_config: Config) -> None:
    def interrupt(server_round: int, num_rounds: int, *_: object) -> None:
        if server_round == num_rounds:
            os.kill(os.getpid(), signal.SIGINT)

    from fl_taskarith.client.app import app

    with pytest.raises(Interrupted, match="the run is finished"):
        run_federation(dataclasses.replace(quick_config, run_name="last"), app, progress=interrupt)
    record = json.loads((Path(quick_config.results_dir) / "last" / "run.json").read_text())
    assert record["status"] == "finished"
