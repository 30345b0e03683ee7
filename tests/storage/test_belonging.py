"""What is read as a run's is that run's: checkpoints, masks, models and tables of others are found out."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kill import INSTANTS, differences_after_kill_at

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config, course_of
from fl_taskarith.errors import CheckpointError, ConfigError, WeightsError
from fl_taskarith.figures.run_groups import find_runs
from fl_taskarith.masking.mask import Mask, load_mask, save_mask
from fl_taskarith.one_shot.model_files import ModelFile
from fl_taskarith.storage import checkpoint as checkpoints
from fl_taskarith.storage import run_folder
from fl_taskarith.storage.checkpoint import Checkpoint, list_checkpoints
from fl_taskarith.storage.folder_choice import require_folder
from fl_taskarith.storage.run_folder import Logbook, read_rounds
from fl_taskarith.storage.tensor_file import sealed
from fl_taskarith.storage.verified_files import CHECKSUMS


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(results_dir=str(tmp_path / "results"), run_name="run", num_rounds=2, schedule="constant", threads=1)


def written(config: Config, last: int = 1, *, ended: bool = False) -> Path:
    """A run's folder after round `last`, as a killed process left it or as it ended."""
    logbook = Logbook(config)
    for number in range(len(logbook.rows), last + 1):
        logbook.write_round({"round": number, "test_accuracy": 0.5 + 0.1 * number})
        logbook.save_checkpoint(Checkpoint(number, {"w": torch.tensor([config.seed + 0.1 * number])}, {}, {}))
    if ended:
        tensors = {"w": torch.tensor([config.seed])}
        logbook.output("model.safetensors").write_bytes(sealed(tensors, logbook.owner))
        mask = Mask({"w": torch.tensor([True, config.seed > 0])})
        save_mask(logbook.output("mask.safetensors"), mask, {"model": "tiny", **logbook.owner})
        with logbook:
            pass
    elif logbook._lock is not None:
        logbook._lock.release()
    return logbook.folder


def resumed(config: Config) -> Logbook:
    with Logbook(config) as logbook:
        return logbook


def test_a_checkpoint_of_another_run_is_refused_by_name(config: Config) -> None:
    other = dataclasses.replace(config, run_name="other", seed=7)
    mine, foreign = written(config, 0), list_checkpoints(written(other, 1) / "checkpoints")[0][1]
    copied = shutil.copy(foreign, mine / "checkpoints")
    with pytest.raises(CheckpointError, match=rf"{foreign.name} is of another run \(seed was 7, now 0\): move it out"):
        Logbook(config)
    Path(copied).unlink()
    assert torch.equal(resumed(config).restored.trained["w"], torch.tensor([0.0]))  # type: ignore[union-attr]


def test_a_damaged_checkpoint_is_not_taken_for_another_runs(config: Config) -> None:
    run = written(config, 1)
    newest = list_checkpoints(run / "checkpoints")[0][1]
    newest.write_bytes(newest.read_bytes().replace(b'\\"seed\\": 0', b'\\"seed\\": 3'))
    restored = resumed(config).restored
    assert restored is not None and restored.round == 0


def test_a_checkpoint_of_the_version_before_is_taken_with_a_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints.save_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "save_checkpoint", lambda folder, each: saved(folder, dataclasses.replace(
            each, settings={}, notes=each.notes | {"record": {"started": "then"}})))  # fmt: skip
        run = written(config)
    with caplog.at_level(logging.WARNING):
        assert resumed(config).folder == run
    assert "did not say whose it is" in caplog.text
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["first_round"] for start in starts] == [0, 2] and starts[0]["last_round"] == 1


def test_without_run_json_the_checkpoints_say_whose_the_folder_is(config: Config) -> None:
    run = written(config)
    (run / "run.json").unlink()
    with pytest.raises(CheckpointError, match="under other settings: seed was 0, now 5"):
        Logbook(dataclasses.replace(config, seed=5))
    logbook = resumed(config)
    assert logbook.folder == run and [row["round"] for row in logbook.rows] == [0, 1]


def test_a_run_that_was_killed_before_its_checksums_is_completed(config: Config) -> None:
    run = written(config, 2, ended=True)
    (run / CHECKSUMS).unlink()
    other = dataclasses.replace(config, learning_rate=0.7)
    assert resumed(config).folder == run and (run / CHECKSUMS).exists()
    assert resumed(config).folder.name == "run-2", "it has ended now"
    (run / CHECKSUMS).unlink()
    assert resumed(other).folder.name == "run-3", "settings that it did not have are another run's"
    shutil.rmtree(run / "checkpoints")
    assert resumed(config).folder.name == "run-4", "there is nothing to complete it from"


@pytest.mark.parametrize("change", [lambda text: "", lambda text: text[: len(text) // 2], lambda text: text[:-30],
                                    lambda text: text.split("\n", 3)[3], lambda text: text[:-1],
                                    lambda text: text.replace("rounds.csv", "rownds.csv")])  # fmt: skip
def test_checksums_that_do_not_list_every_file_are_damaged(config: Config, change: Callable[[str], str]) -> None:
    run = written(config, 2, ended=True)
    text = (run / CHECKSUMS).read_text()
    assert [line.split()[1] for line in text.splitlines()] == [
        *("mask.safetensors", "model.safetensors", "rounds.csv", "run.json"),
    ]
    (run / CHECKSUMS).write_text(change(text))
    for read in (read_rounds, lambda folder: load_mask(folder / "mask.safetensors")):
        with pytest.raises(CheckpointError, match=CHECKSUMS):
            read(run)


def test_a_swapped_mask_or_model_of_a_finished_run_is_found_out(config: Config) -> None:
    run = written(config, 2, ended=True)
    other = written(dataclasses.replace(config, run_name="other", seed=1), 2, ended=True)
    for name in ("mask.safetensors", "model.safetensors"):
        shutil.copy(other / name, run)
    for word in ("SHA256SUMS beside it has another checksum", "it is another run's"):  # with it, and without it
        with pytest.raises(CheckpointError, match=word):
            load_mask(run / "mask.safetensors")
        with pytest.raises(WeightsError, match=word):
            ModelFile(run / "model.safetensors")
        (run / CHECKSUMS).unlink(missing_ok=True)
    shutil.copy(other / "model.safetensors", run.parent / "elsewhere.safetensors")
    (run.parent / CHECKSUMS).write_text("0 *elsewhere.safetensors\n")  # of somebody's own
    assert len(ModelFile(run.parent / "elsewhere.safetensors")) == 1


def test_files_of_the_version_before_are_read_as_they_were(config: Config) -> None:
    run = written(config, 2, ended=True)
    (run / CHECKSUMS).write_text("\n".join((run / CHECKSUMS).read_text().splitlines()[:1:-1]) + "\n")  # tables alone
    mask = load_mask(run / "mask.safetensors")[0]
    save_mask(run / "mask.safetensors", mask, {"model": "tiny"})
    assert load_mask(run / "mask.safetensors")[1] == {"model": "tiny"}
    assert len(read_rounds(run)) == 3


def test_the_course_of_a_run_does_not_depend_on_what_it_may_go_on_under(config: Config) -> None:
    course = course_of(config.to_run_config())
    for change in ({"num_rounds": 9}, {"evaluate_every": 3}, {"threads": 2}, {"run_name": "x"}, {"device": "cpu"}):
        assert course_of(dataclasses.replace(config, **change).to_run_config()) == course
    assert course_of(config.to_run_config() | {"seed": 1}) != course


def test_run_json_lists_the_starts_and_other_versions_are_warned_of(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written(config, 1)
    here = run_folder.environment()
    monkeypatch.setattr(run_folder, "environment", lambda: here | {"versions": here["versions"] | {"torch": "99.0"}})
    with caplog.at_level(logging.WARNING):
        run = written(config, 2, ended=True)
    assert f"torch {here['versions']['torch']}, now 99.0" in caplog.text
    record = json.loads((run / "run.json").read_text())
    assert [(start["first_round"], start["last_round"]) for start in record["starts"]] == [(0, 1), (2, 2)]
    assert [start["versions"]["torch"] for start in record["starts"]] == [here["versions"]["torch"], "99.0"]
    assert all(start.keys() >= {"started", "machine", "git_commit"} for start in record["starts"])


def test_a_seed_whose_table_is_gone_is_named_and_not_dropped(
    config: Config, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    runs = [written(dataclasses.replace(config, run_name=f"s{seed}", seed=seed), 2, ended=True) for seed in (0, 1)]
    (runs[1] / "rounds.csv").unlink()
    assert main(["plot", str(runs[0].parent)]) == 1
    assert "s1/rounds.csv" in capsys.readouterr().err
    shutil.rmtree(runs[1])
    written(dataclasses.replace(config, run_name="cut"), 1)
    assert [run.folder for run in find_runs([runs[0].parent])] == [runs[0]]
    assert "Left out, for they are not finished: " in caplog.text and "cut" in caplog.text


@pytest.mark.parametrize("problem", ["held", "settings", "file", "foreign", "name"])
def test_a_folder_that_cannot_be_used_is_told_before_data_are_read(
    config: Config, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_taskarith.server.launch.workspace", lambda _: pytest.fail("data were read"))
    monkeypatch.setattr("fl_taskarith.server.launch.speed_of", lambda *_: None)
    if problem == "file":
        Path(config.results_dir).write_text("")
    elif problem == "name":
        config = dataclasses.replace(config, run_name="../x")
    else:
        run = written(dataclasses.replace(config, seed=3 if problem != "held" else 0), 1)
        if problem == "foreign":
            (run / "run.json").unlink()
    with pytest.raises((CheckpointError, ConfigError), match=r"Another process|seed was 3|is a file|plain folder"):
        if problem == "held":
            with Logbook(config):
                simulate(config)
        else:
            simulate(config)


def test_a_folder_that_can_be_used_is_not_made_by_the_check(config: Config) -> None:
    require_folder(config)
    assert not Path(config.results_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_that_is_killed_at_any_of_these_instants_is_completed(instant: str, tmp_path: Path) -> None:
    assert differences_after_kill_at(instant, tmp_path) == []
