"""`flwr run .` as a user calls it, with a SuperLink of its own that is stopped afterwards."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import final_weights, numbers, power_cut, same_bits

from fl_taskarith import simulate
from fl_taskarith.config.fields import kebab
from fl_taskarith.storage.run_folder import read_rounds

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def flwr_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("flwr-home")
    yield {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": free_port(),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    subprocess.run(["pkill", "-f", str(home)], check=False)


def flwr_run(environment: dict[str, str], working_directory: Path, settings: str, *options: str) -> tuple[str, str]:
    """(status, streamed log) of one run; the exit status of `flwr run` says nothing."""
    streamed = subprocess.run(
        ["flwr", "run", str(ROOT), "--stream", "--run-config", settings, *options],
        env=environment, cwd=working_directory, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    for _ in range(60):
        listed = subprocess.run(
            ["flwr", "list", "--format", "json"], env=environment, capture_output=True, text=True, check=True
        )
        newest = max(json.loads(listed.stdout)["runs"], key=lambda run: run["pending-at"])
        if newest["status"].startswith("finished"):
            break
        time.sleep(1)
    return newest["status"], streamed.stdout + streamed.stderr


QUICK = "num-clients=4 classes-per-client=5 participation=0.5 num-rounds=2 local-steps=2"


def test_results_land_in_the_installed_checkout_whatever_the_working_directory(
    flwr_environment: dict[str, str], tmp_path: Path
) -> None:
    name = f"flwr-run-test-{os.getpid()}"
    folder = ROOT / "results" / name
    try:
        status, log = flwr_run(flwr_environment, tmp_path, f"{QUICK} run-name='{name}'")
        assert status == "finished:completed", log
        assert str(folder / "rounds.csv") in log
        assert [row["round"] for row in read_rounds(folder)] == [0, 1, 2]
        assert (folder / "curves.png").exists()
        assert not list(tmp_path.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_flwr_run_continues_what_was_interrupted(flwr_environment: dict[str, str], tmp_path: Path) -> None:
    settings = {"num_clients": 4, "classes_per_client": 5, "num_rounds": 3, "checkpoint_every": 1, "threads": 2}
    whole = simulate(**settings, results_dir=str(tmp_path), run_name="whole")
    with power_cut(1):
        simulate(**settings, results_dir=str(tmp_path), run_name="cut")
    words = " ".join(f"{kebab(name)}={value}" for name, value in settings.items())
    status, log = flwr_run(flwr_environment, tmp_path, f"{words} run-name='cut' results-dir='{tmp_path}'")
    assert status == "finished:completed", log
    assert "after round 1" in log
    assert not (tmp_path / "cut-2").exists()
    assert numbers(tmp_path / "cut") == numbers(whole.folder)
    assert same_bits(final_weights(tmp_path / "cut"), final_weights(whole.folder))


def test_flowers_engine_runs_one_supernode_per_client(flwr_environment: dict[str, str], tmp_path: Path) -> None:
    settings = f"{QUICK} engine='flower' run-name='ray' results-dir='{tmp_path}'"
    status, log = flwr_run(flwr_environment, tmp_path, settings, "--federation-config", "num-supernodes=4")
    assert status == "finished:completed", log
    assert len(read_rounds(tmp_path / "ray")) == 3


def test_a_failed_run_shows_as_failed_with_its_cause(flwr_environment: dict[str, str], tmp_path: Path) -> None:
    status, log = flwr_run(flwr_environment, tmp_path, f"{QUICK} weights='/nonexistent.pth' results-dir='{tmp_path}'")
    assert status == "finished:failed"
    assert "There is no weights file /nonexistent.pth" in log


def test_a_wrong_setting_is_one_line_near_the_end_of_the_log(flwr_environment: dict[str, str], tmp_path: Path) -> None:
    status, log = flwr_run(flwr_environment, tmp_path, f"{QUICK} run-name=123 density=2.5 results-dir='{tmp_path}'")
    assert status == "finished:failed"
    (line,) = (line for line in log.splitlines() if "ConfigError" in line)
    assert line.endswith("ConfigError: density = 2.5 is not accepted: expected a number above 0 up to 1.")
    assert "Traceback" not in log


def test_too_few_supernodes_fail_within_a_minute_with_the_command(
    flwr_environment: dict[str, str], tmp_path: Path
) -> None:
    status, log = flwr_run(flwr_environment, tmp_path, f"{QUICK} engine='flower' results-dir='{tmp_path}'")
    assert status == "finished:failed"
    assert 'flwr run . --stream --federation-config "num-supernodes=4"' in log
