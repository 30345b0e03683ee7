import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.storage.checkpoint import Checkpoint, list_checkpoints, load_latest_checkpoint, save_checkpoint
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.folder_choice import run_name
from fl_taskarith.storage.run_folder import COLUMNS, Logbook, read_rounds


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(results_dir=str(tmp_path / "results"))


def abandon(logbook: Logbook) -> None:
    """What remains of a logbook whose process was killed: its files, and no lock."""
    assert logbook._lock is not None
    logbook._lock.release()


def test_rows_come_back_to_the_bit(config: Config) -> None:
    with Logbook(config) as logbook:
        logbook.write_round({"round": 0, "test_accuracy": 0.1 + 0.2, "uplink_bytes": 12})
        logbook.write_round({"round": 1, "train_loss": 1e-300})
    rows = read_rounds(logbook.folder)
    assert rows[0]["test_accuracy"] == 0.1 + 0.2
    assert rows[0]["uplink_bytes"] == 12
    assert rows[0]["train_loss"] is None
    assert rows[1]["train_loss"] == 1e-300


def test_rows_of_another_machine_on_the_same_drive_are_gone_when_the_run_ends(config: Config) -> None:
    with Logbook(config) as logbook:
        logbook.write_round({"round": 0, "test_accuracy": 0.5})
        with open(logbook.rounds_csv, "a") as file:
            file.write(",".join(["0", *[""] * (len(COLUMNS) - 2)]) + "\n")  # which holds no lock here
        logbook.write_round({"round": 1, "test_accuracy": 0.6})
    assert [row["test_accuracy"] for row in read_rounds(logbook.folder)] == [0.5, 0.6]


def test_an_unknown_column_is_refused(config: Config) -> None:
    with Logbook(config) as logbook, pytest.raises(ValueError, match="acuracy"):
        logbook.write_round({"acuracy": 1.0})


def test_a_finished_run_is_never_overwritten(config: Config) -> None:
    folders = []
    for _ in range(3):
        with Logbook(config) as logbook:
            folders.append(logbook.folder.name)
    name = run_name(config)
    assert folders == [name, f"{name}-2", f"{name}-3"]


def test_an_unfinished_run_is_continued_from_its_checkpoint(config: Config) -> None:
    logbook = Logbook(config)
    logbook.note(head={"ridge_lambda": 3.0})
    logbook.write_round({"round": 0, "test_accuracy": 0.5})
    logbook.save_checkpoint(Checkpoint(0, {"w": torch.arange(3.0)}, {"f": torch.zeros(1)}, {"momentum": torch.ones(2)}))
    logbook.write_round({"round": 1, "test_accuracy": 0.6})
    with open(logbook.rounds_csv, "a") as file:
        file.write("2,0.01,0.7")  # killed in the middle of a line
    abandon(logbook)

    with Logbook(config) as again:
        assert again.folder == logbook.folder
        assert again.restored is not None
        assert again.restored.round == 0
        assert torch.equal(again.restored.trained["w"], torch.arange(3.0))
        assert torch.equal(again.restored.frozen["f"], torch.zeros(1))
        assert torch.equal(again.restored.strategy_state["momentum"], torch.ones(2))
        assert [row["round"] for row in read_rounds(again.folder)] == [0]
    assert json.loads((again.folder / "run.json").read_text())["head"] == {"ridge_lambda": 3.0}


def test_resume_false_begins_a_new_run_beside_the_unfinished_one(config: Config) -> None:
    logbook = Logbook(config)
    abandon(logbook)
    with Logbook(dataclasses.replace(config, resume=False)) as fresh:
        assert fresh.folder.name == f"{logbook.folder.name}-2"


def test_other_settings_cannot_continue_a_run_and_the_keys_are_named(config: Config) -> None:
    named = dataclasses.replace(config, run_name="mine", learning_rate=1.0)
    abandon(Logbook(named))
    with pytest.raises(CheckpointError) as caught:
        Logbook(dataclasses.replace(named, seed=1, learning_rate=0.5))
    assert "seed was 0, now 1" in str(caught.value)
    assert "learning-rate was 1.0, now 0.5" in str(caught.value)
    with Logbook(dataclasses.replace(named, checkpoint_every=3)) as logbook:
        assert logbook.folder.name == "mine"


def test_a_run_killed_before_its_first_write_is_taken_over(config: Config) -> None:
    folder = Path(config.results_dir) / run_name(config)
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / f".run.json.{os.getpid()}.tmp").touch()
    with Logbook(config) as logbook:
        assert logbook.folder == folder
        assert not list(folder.glob(".*.tmp")), "what a killed process left half written is swept up"


def test_a_file_in_the_place_of_a_run_is_named(config: Config) -> None:
    folder = Path(config.results_dir) / run_name(config)
    folder.parent.mkdir()
    folder.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        Logbook(config)


def test_two_processes_cannot_write_one_run(config: Config) -> None:
    with Logbook(config), pytest.raises(CheckpointError, match="Another process"):
        Logbook(config)


def test_a_failure_is_recorded(config: Config) -> None:
    with pytest.raises(RuntimeError), Logbook(config) as logbook:
        raise RuntimeError("the disk is on fire")
    record = json.loads((logbook.folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert "on fire" in record["cause"]


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "a/b", "..", ".hidden", "a b", "x" * 200])
def test_a_run_name_cannot_leave_the_results_folder(config: Config, name: str) -> None:
    with pytest.raises(ConfigError, match="run-name"):
        Logbook(dataclasses.replace(config, run_name=name))


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", None])
def test_an_unreadable_table_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "rounds.csv").write_text(content)
    with pytest.raises(CheckpointError, match=r"rounds\.csv"):
        read_rounds(tmp_path)


def test_a_table_cut_short_is_an_error(config: Config) -> None:
    with Logbook(config) as logbook:
        logbook.write_round({"round": 0, "test_accuracy": 0.5})
    logbook.rounds_csv.write_text(logbook.rounds_csv.read_text()[:-6])
    with pytest.raises(CheckpointError, match="has changed since its run ended"):
        read_rounds(logbook.folder)
    (logbook.folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="cut short"):
        read_rounds(logbook.folder)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "results").glob("*/rounds.csv")), ids=str)
def test_committed_runs_can_still_be_read(path: Path) -> None:
    rounds = [row["round"] for row in read_rounds(path.parent)]
    assert rounds == list(range(len(rounds)))


# checkpoints


def checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(server_round, {"w": torch.full((50,), float(server_round))}, {}, {}, {"rows": []})


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for server_round in (0, 10, 20, 30):
        save_checkpoint(tmp_path, checkpoint(server_round))
    assert [found for found, _ in list_checkpoints(tmp_path)] == [30, 20]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}, "no temporary file is left"


def test_a_damaged_checkpoint_is_detected_wherever_it_is_hit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, checkpoint(10))
    newest = save_checkpoint(tmp_path, checkpoint(20))
    whole = newest.read_bytes()
    for position in [*range(0, len(whole), 37), len(whole) - 1]:
        newest.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = load_latest_checkpoint(tmp_path)
        assert found is not None
        assert found.round == 10
        newest.write_bytes(whole[:position])
        found = load_latest_checkpoint(tmp_path)
        assert found is not None
        assert found.round == 10
    assert newest.name in caplog.text
    newest.write_bytes(whole)
    found = load_latest_checkpoint(tmp_path)
    assert found is not None
    assert found.round == 20


def test_a_damaged_checkpoint_takes_no_place_among_the_kept_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(10))
    save_checkpoint(tmp_path, checkpoint(20)).write_bytes(b"damaged")
    assert load_latest_checkpoint(tmp_path) is not None
    save_checkpoint(tmp_path, checkpoint(20))
    assert [found for found, _ in list_checkpoints(tmp_path)] == [20, 10]
    assert len(list(tmp_path.glob("*.damaged"))) == 1


def test_the_checkpoint_just_written_is_kept_whatever_later_ones_lie_beside_it(tmp_path: Path) -> None:
    for number in (20, 30):
        save_checkpoint(tmp_path, checkpoint(number))
    assert save_checkpoint(tmp_path, checkpoint(10)).exists(), "of a run that began again from before"
    assert [found for found, _ in list_checkpoints(tmp_path)] == [30, 10]


def test_only_damaged_checkpoints_is_an_error_and_none_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_latest_checkpoint(tmp_path / "none") is None
    save_checkpoint(tmp_path, checkpoint(1)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load_latest_checkpoint(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"run\.json.*No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
