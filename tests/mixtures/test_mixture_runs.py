"""Whole runs on regression data, through Flower's messages: what they equal, what they cannot depend on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import PowerCutError, final_weights, numbers, power_cut, same_bits

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.errors import ConfigError, Divergence
from fl_taskarith.mixtures.expectation_maximisation import expectation, federated_em
from fl_taskarith.mixtures.robust_clustering import Server, br_ifca
from fl_taskarith.server import regression_run as mixture_run
from fl_taskarith.server.history import History
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.workspace.regression_data import adversary_of, mixture_of

CONF = Path(__file__).parents[2] / "conf"
COMMON = {"dataset": "linear-regression", "participation": 1.0, "checkpoint-every": 1}
FED_EM = {"strategy": "fed-em", "num-clients": 30, "examples-per-client": 6, "dimension": 4, "num-rounds": 8, **COMMON}
BR_IFCA = {
    "strategy": "br-ifca", "num-clients": 24, "num-clusters": 2, "examples-per-client": 20, "dimension": 5,
    "cluster-centres": "bernoulli", "cluster-sizes": "equal", "byzantine-fraction": 0.2, "trimmed-share": 0.2,
    "learning-rate": 0.1, "schedule": "constant", "num-rounds": 6, **COMMON,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., History]:
    def simulated(settings: dict[str, object], **changes: object) -> History:
        config = load(overrides=settings | {"results-dir": str(tmp_path), "run-name": "run"})
        return simulate(config, **changes)

    return simulated


def config_of(settings: dict[str, object]) -> Config:
    return load(overrides=settings)


@pytest.mark.parametrize("together", [0, 1, 7])
def test_a_run_of_federated_em_equals_the_vectorised_loop(run: Callable[..., History], together: int) -> None:
    config = config_of(FED_EM)
    mixture = mixture_of(config)
    points, start = mixture.all_points(), mixture.start("ball", 0.25)
    found = federated_em(points, start, config.noise, config.tolerance, config.num_rounds)
    history = run(FED_EM, clients_at_once=together)
    assert torch.allclose(final_weights(history.folder)["theta"], found.thetas[-1], rtol=0, atol=1e-9)
    losses = [float(expectation(points, theta, config.noise)[1].mean()) for theta in found.thetas[:-1]]
    assert [row["train_loss"] for row in history.rows[1:]] == pytest.approx(losses, abs=1e-9)


@pytest.mark.parametrize("together", [0, 1, 7])
@pytest.mark.parametrize("attack", ["scaled-model", "alie"])
def test_a_run_of_br_ifca_equals_the_vectorised_loop(run: Callable[..., History], together: int, attack: str) -> None:
    config = config_of(BR_IFCA | {"attack": attack})
    mixture, adversary = mixture_of(config), adversary_of(config)
    expected = br_ifca(
        adversary.points_of(range(24)), [Server("trimmed-mean", 0.2, mixture.start("ball", 0.25))], adversary,
        scale=config.attack_scale, step=0.1, rounds=6,
    )[0]  # fmt: skip
    history = run(BR_IFCA, attack=attack, clients_at_once=together)
    assert torch.allclose(final_weights(history.folder)["theta"], expected, rtol=0, atol=1e-9)


def test_traffic_is_what_clients_would_send_however_they_are_computed(run: Callable[..., History]) -> None:
    for settings in (FED_EM, BR_IFCA):
        one, all_ = (run(settings, clients_at_once=together, run_name=f"at-once-{together}") for together in (1, 0))
        for row, other in zip(one.rows, all_.rows, strict=True):
            for column in ("clients", "uplink_bytes", "downlink_bytes"):
                assert row[column] == other[column], column
        assert one.rows[1]["uplink_bytes"] % one.rows[1]["clients"] == 0


@pytest.mark.figures
def test_a_run_writes_its_results_and_stops_when_converged(run: Callable[..., History]) -> None:
    history = run(FED_EM, num_rounds=300, noise=0.1)
    record = json.loads((history.folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["converged"] is True
    assert record["rounds"] == history.rows[-1]["round"] < 300
    assert record["mixture"]["least_separation"] == pytest.approx(1.0)
    assert history.rows[-1]["update_norm"] < 1e-5
    assert history.rows[-1]["matched_distance"] < 0.5 * history.rows[0]["matched_distance"]
    assert history.rows[-1]["cluster_accuracy"] > 0.9
    assert all(row["largest_distance"] >= row["matched_distance"] >= row["nearest_distance"] for row in history.rows)
    assert (history.folder / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("settings", [FED_EM, BR_IFCA], ids=["fed-em", "br-ifca"])
@pytest.mark.parametrize("before_checkpoint", [False, True])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    run: Callable[..., History], settings: dict[str, object], before_checkpoint: bool
) -> None:
    whole = run(settings, run_name="whole")
    with power_cut(3, before_checkpoint=True) if before_checkpoint else power_cut_after(3):
        run(settings, run_name="cut")
    resumed = run(settings, run_name="cut")
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))


def test_a_run_cut_after_it_converged_does_not_go_on(run: Callable[..., History]) -> None:
    settings = FED_EM | {"num-rounds": 300, "noise": 0.1}
    whole = run(settings, run_name="whole")
    with power_cut_after(whole.rows[-1]["round"]):
        run(settings, run_name="cut")
    assert numbers(run(settings, run_name="cut").folder) == numbers(whole.folder)


@contextmanager
def power_cut_after(server_round: int) -> Iterator[None]:
    """Interrupt a regression run once the checkpoint of a round is written."""
    record_round = mixture_run.record_round

    def cut_later(logbook: Logbook, config: Config, row: Row, *others: object, **named: object) -> None:
        record_round(logbook, config, row, *others, **named)
        if row["round"] == server_round:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCutError):
        patched.setattr(mixture_run, "record_round", cut_later)
        yield


def test_partial_participation_trains_on_the_sampled_clients(run: Callable[..., History]) -> None:
    rows = run(FED_EM, participation=0.5, num_rounds=4).rows
    assert {row["clients"] for row in rows[1:]} == {15}
    assert rows[-1]["matched_distance"] < rows[0]["matched_distance"]


def test_a_step_that_diverges_is_an_error(run: Callable[..., History]) -> None:
    with pytest.raises(Divergence):
        run(BR_IFCA, learning_rate=1e5, num_rounds=200)


@pytest.mark.parametrize("name", ["fed-em", "br-ifca"])
def test_the_conf_files_run(name: str, tmp_path: Path) -> None:
    history = simulate(CONF / f"{name}.toml", num_rounds=3, results_dir=str(tmp_path))
    assert history.rows[-1]["matched_distance"] < history.rows[0]["matched_distance"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "fed-em"}, "linear-regression"),
        ({"dataset": "linear-regression"}, "fed-em"),
        (FED_EM | {"num-clusters": 5}, "dimension"),
        (FED_EM | {"start": "random"}, "cluster-centres"),
        (FED_EM | {"engine": "flower", "clients-at-once": 0}, "clients-at-once"),
        (FED_EM | {"byzantine-fraction": 0.1}, "byzantine-fraction"),
        (FED_EM | {"farthest-separation": 0.5}, "separation"),
    ],
)
def test_contradictions_are_named(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config_of(settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [FED_EM, BR_IFCA], ids=["fed-em", "br-ifca"])
def test_flowers_supernodes_give_the_same_bits(run: Callable[..., History], settings: dict[str, object]) -> None:
    small = settings | {"num-clients": 8, "num-rounds": 2}
    in_process, on_ray = (run(small, engine=engine, run_name=engine) for engine in ("sequential", "flower"))
    assert numbers(in_process.folder) == numbers(on_ray.folder)
    assert same_bits(final_weights(in_process.folder), final_weights(on_ray.folder))
