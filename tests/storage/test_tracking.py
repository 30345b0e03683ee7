"""What trackers hold is what rounds.csv holds, whatever happened on the way."""

import builtins
import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import numbers, power_cut

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.storage.run_folder import Logbook, read_rounds

Points = dict[str, list[tuple[int, float]]]


def rows_as_points(folder: Path) -> Points:
    points: Points = {}
    for row in read_rounds(folder):
        for name, value in row.items():
            if name != "round" and value is not None:
                points.setdefault(name, []).append((row["round"], value))
    return points


def board(folder: Path) -> Points:
    """Every scalar of every event file, in the order written: nothing is sampled or purged."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points: Points = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return points


def assert_equal_points(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let imports of `package` and of what needs it fail as they do where it is not installed."""
    real = builtins.__import__

    def importing(name: str, *rest: Any, **more: Any) -> ModuleType:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return real(name, *rest, **more)

    for name in [name for name in sys.modules if package in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(builtins, "__import__", importing)


class FakeWandb:
    """Weights & Biases as far as we use it: steps only rise, and what a killed process sent is partly lost."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.settings: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def init(self, *, id: str, resume: str, config: dict[str, Any], **_: Any) -> SimpleNamespace:
        assert resume == "allow"
        sent = self.runs.setdefault(id, [])
        self.settings = config

        def log(measured: dict[str, Any], step: int) -> None:
            assert not sent or step > sent[-1][0], "W&B drops a step that does not rise"
            sent.append((step, dict(measured)))

        first = sent[-1][0] + 1 if sent else 0
        return SimpleNamespace(log=log, finish=lambda exit_code: self.exit_codes.append(exit_code), starting_step=first)

    def points(self) -> Points:
        (sent,) = self.runs.values()
        points: Points = {}
        for step, measured in sent:
            for name, value in measured.items():
                points.setdefault(name, []).append((step, value))
        return points


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_tensorboard_holds_every_number_of_the_table(quick_config: Config) -> None:
    history = simulate(quick_config, tensorboard=True, evaluate_every=2)
    points = rows_as_points(history.folder)
    assert {len(points[name]) for name in ("train_loss", "test_accuracy")} == {3}
    assert_equal_points(board(history.folder), points)


@pytest.mark.parametrize("before_checkpoint", [False, True])
def test_a_resumed_run_has_each_point_once(quick_config: Config, wandb: FakeWandb, before_checkpoint: bool) -> None:
    on = {"tensorboard": True, "wandb": True, "run_name": "cut"}
    with power_cut(2, before_checkpoint=before_checkpoint):
        simulate(quick_config, **on)
    history = simulate(quick_config, **on)
    assert_equal_points(board(history.folder), rows_as_points(history.folder))
    without_times = {name: points for name, points in wandb.points().items() if not name.endswith("_seconds")}
    assert_equal_points(without_times, {name: points for name, points in rows_as_points(history.folder).items()
                                        if not name.endswith("_seconds")})  # fmt: skip
    assert wandb.exit_codes == [1, 0]
    assert wandb.settings["num-clients"] == quick_config.num_clients


def test_trackers_switched_on_in_the_middle_receive_the_earlier_rounds(quick_config: Config, wandb: FakeWandb) -> None:
    with power_cut(1):
        simulate(quick_config, run_name="cut")
    history = simulate(quick_config, run_name="cut", tensorboard=True, wandb=True)
    assert_equal_points(board(history.folder), rows_as_points(history.folder))
    assert_equal_points(wandb.points(), rows_as_points(history.folder))


def test_tracking_changes_no_number_and_no_fingerprint(quick_config: Config) -> None:
    tracked = dataclasses.replace(quick_config, tensorboard=True)
    assert tracked.fingerprint() == quick_config.fingerprint()
    plain, logged = simulate(quick_config, run_name="plain"), simulate(tracked, run_name="logged")
    assert numbers(plain.folder) == numbers(logged.folder)
    assert not (plain.folder / "tensorboard").exists()


@pytest.mark.parametrize(
    ("setting", "command"), [("tensorboard", "pip install tensorboard"), ("wandb", "pip install wandb")]
)
def test_a_missing_package_is_named_before_anything_runs(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch, setting: str, command: str
) -> None:
    missing(monkeypatch, setting)
    with pytest.raises(ConfigError) as caught:
        simulate(quick_config, **{setting: True})
    assert f"{setting} = true" in str(caught.value)
    assert command in str(caught.value)
    assert not Path(quick_config.results_dir).exists()


def test_a_tracker_that_does_not_start_frees_the_folder(quick_config: Config, wandb: FakeWandb) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no login")

    wandb.init = refuse  # type: ignore[method-assign, assignment]
    config = dataclasses.replace(quick_config, wandb=True)
    with pytest.raises(ConfigError, match=r"no login.*WANDB_MODE=offline"):
        simulate(config)
    with Logbook(dataclasses.replace(config, wandb=False)) as logbook:
        assert logbook.rows == []
