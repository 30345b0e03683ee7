"""Clients that raise, hang or send what cannot be used are named; the run stops, or goes on without them and counts."""

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import final_weights, numbers, power_cut, same_bits
from faults import FAULTS, FaultyApp, with_fault
from flwr.app import Context, Error, Message, RecordDict

from fl_taskarith import simulate
from fl_taskarith.client import app as client
from fl_taskarith.client.local_work import Work
from fl_taskarith.config.fields import STRATEGIES
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.time_limit import limited
from fl_taskarith.errors import ClientFailure, ConfigError, Divergence
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.run_folder import read_rounds

AT_FAULT = (1, 6)


@pytest.fixture
def one_round(quick_config: Config) -> Config:
    """A round of five masked clients, all sampled."""
    return dataclasses.replace(
        quick_config, num_clients=8, classes_per_client=5, participation=1.0, num_rounds=1, mask_rule="random"
    )


SHORT = ("raises", "hangs", "sends no loss", "sends infinity", "uses another mask", "leaves the process")


@pytest.mark.parametrize(
    "fault", [fault if fault in SHORT else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_by_stop_a_run_names_the_client_and_fails(one_round: Config, fault: str) -> None:
    config = with_fault(one_round, fault, "stop")
    with pytest.raises(ClientFailure, match=f"^Client 1 .*{re.escape(FAULTS[fault][1])}"):
        run_federation(config, FaultyApp(fault, AT_FAULT))
    record = json.loads((Path(config.results_dir) / config.run_name / "run.json").read_text())
    assert record["status"] == "failed"
    assert "Client 1 " in record["cause"]


@pytest.mark.parametrize(
    "faults",
    [["raises", "sends wrong shapes", "sends huge numbers"], pytest.param(list(FAULTS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_by_skip_a_run_goes_on_as_if_they_had_not_answered(
    one_round: Config, faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the fault, the round is that of the other clients, bit for bit."""
    weights, rows = {}, {}
    for fault in faults:
        history = run_federation(with_fault(one_round, fault, "skip"), FaultyApp(fault, AT_FAULT))
        said = capsys.readouterr().out
        assert all(f"Client {client} " in said for client in AT_FAULT), said
        assert FAULTS[fault][1] in said
        row = read_rounds(history.folder)[1]
        assert (row["clients"], row["failed_clients"]) == (6, 2), fault
        weights[fault], rows[fault] = final_weights(history.folder), numbers(history.folder)
    assert all(same_bits(each, weights["raises"]) for each in weights.values())
    assert all(each == rows["raises"] for each in rows.values()), "traffic, losses and norms too"
    sound = simulate(one_round, run_name="sound")
    assert sound.rows[1]["failed_clients"] == 0
    assert not same_bits(final_weights(sound.folder), weights["raises"])


ON_IMAGES = sorted(set(STRATEGIES) - {"fed-em"})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ON_IMAGES)
def test_every_strategy_goes_on_as_if_they_had_not_answered(one_round: Config, strategy: str) -> None:
    """Nothing of a refused reply is left in what the server or the client keeps."""
    settings = {"strategy": strategy, "num_clusters": 1} if strategy == "br-ifca" else {"strategy": strategy}
    weights, rows = {}, {}
    for fault in ("raises", "sends NaN", "sends wrong shapes"):
        config = dataclasses.replace(with_fault(one_round, fault, "skip"), num_rounds=2, **settings)
        app = (ClusterFaultyApp if strategy == "br-ifca" else FaultyApp)(fault, AT_FAULT)
        history = run_federation(config, app)
        weights[fault], rows[fault] = final_weights(history.folder), numbers(history.folder)
        assert [row["failed_clients"] for row in rows[fault]] == [0, 2, 2]
    assert same_bits(weights["raises"], weights["sends NaN"])
    assert same_bits(weights["raises"], weights["sends wrong shapes"])
    assert rows["raises"] == rows["sends NaN"] == rows["sends wrong shapes"]


def test_a_bank_keeps_nothing_of_a_refused_reply(one_round: Config) -> None:
    runs = [run_federation(dataclasses.replace(with_fault(one_round, fault, "skip"), num_rounds=2, bank_decay=0.5,
                                               task_vector_bank="float32"), FaultyApp(fault, AT_FAULT))
            for fault in ("raises", "sends NaN")]  # fmt: skip
    assert same_bits(*(final_weights(run.folder) for run in runs))


class ClusterFaultyApp(FaultyApp):
    """The same for messages to clients that choose a cluster."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train.cluster":
            return client.app(message, context)
        if int(context.node_config["partition-id"]) not in self.partitions:
            return client.app(message, context)
        if self.fault == "raises":
            return Message(Error(100, "a bug in client code"), reply_to=message)
        reply = client.app(message, context)
        name, array = next(iter(reply.content.array_records["arrays"].items()))
        tensor = array.tensor.clone()
        tensor = tensor * torch.nan if self.fault == "sends NaN" else tensor[..., :-1]
        reply.content.array_records["arrays"][name] = type(array)(tensor)
        return reply


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_round_without_any_reply_ends_the_run(one_round: Config, policy: str) -> None:
    config = with_fault(one_round, "raises", policy)
    with pytest.raises(
        ClientFailure, match="Client 0 failed" if policy == "stop" else "Round 1 got no reply .* a bug in"
    ):
        run_federation(config, FaultyApp("raises", tuple(range(8))))


def test_a_class_of_failed_clients_only_is_named(one_round: Config, capsys: pytest.CaptureFixture[str]) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.ridge" and int(context.node_config["partition-id"]) == 3:
            return Message(Error(100, "out of memory"), reply_to=message)
        return client.app(message, context)

    config = dataclasses.replace(one_round, num_clients=10, classes_per_client=1, on_client_failure="skip")
    run_federation(config, app)
    assert "the head cannot predict them" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "settings"), [("query.ridge", {}), ("query.frozen", {}),
                                                ("query.sensitivity", {"mask_rule": "least-sensitive",
                                                                       "mask_source": "clients"})])  # fmt: skip
def test_round_zero_can_do_without_a_client_too(one_round: Config, kind: str, settings: dict[str, object]) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == kind and int(context.node_config["partition-id"]) == 2:
            return Message(Error(100, "out of memory"), reply_to=message)
        return client.app(message, context)

    config = dataclasses.replace(one_round, run_name="stop", calibration_rounds=1, **settings)
    with pytest.raises(ClientFailure, match="Client 2 failed: out of memory"):
        run_federation(config, app)
    rows = run_federation(dataclasses.replace(config, run_name="skip", on_client_failure="skip"), app).rows
    assert [row["failed_clients"] for row in rows] == [1, 0]


def test_a_client_at_fault_keeps_its_earlier_state(one_round: Config) -> None:
    """SCAFFOLD's variate of a refused reply is not taken over: the next round starts from the one before."""
    config = dataclasses.replace(one_round, strategy="scaffold", num_rounds=2, on_client_failure="skip")

    def app(message: Message, context: Context) -> Message:
        partition, server_round = int(context.node_config["partition-id"]), _round(message)
        reply = client.app(message, context)
        if partition == 3 and server_round == 2:
            assert message.content.config_records["config"]["round.state_name"].startswith("round-000001")
            reply.content.metric_records["metrics"]["num-examples"] = -1
        return reply

    history = run_federation(config, app)
    assert [row["failed_clients"] for row in history.rows] == [0, 0, 1]
    names = {path.name[:12] for path in (history.folder / "client-states" / "000003").iterdir()}
    assert names == {"round-000001"}


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["round.number"])


@pytest.mark.slow
def test_a_skipped_fault_changes_nothing_after_an_interruption(one_round: Config) -> None:
    """Failures are in checkpoints with the rows that count them."""
    config = dataclasses.replace(one_round, num_rounds=3, on_client_failure="skip")
    app = FaultyApp("sends NaN", AT_FAULT)
    whole = run_federation(dataclasses.replace(config, run_name="whole"), app)
    with power_cut(1):
        run_federation(dataclasses.replace(config, run_name="cut"), app)
    resumed = run_federation(dataclasses.replace(config, run_name="cut"), app)
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert [row["failed_clients"] for row in numbers(whole.folder)] == [0, 2, 2, 2]
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))


def test_cohorts_fail_as_a_whole_and_cannot_be_skipped() -> None:
    with pytest.raises(ConfigError, match="clients-at-once"):
        Config(dataset="linear-regression", strategy="fed-em", clients_at_once=0, on_client_failure="skip")


def test_of_clients_that_train_together_the_one_at_fault_is_named(
    one_round: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Work.trained_reply

    def leaves(work: Work, *trained: object) -> RecordDict:
        return raises_exit() if work.partition == 3 else sound(work, *trained)

    def raises_exit() -> RecordDict:
        raise SystemExit(0)

    monkeypatch.setattr(Work, "trained_reply", leaves)
    with pytest.raises(ClientFailure, match=r"^Client 3 failed: SystemExit: 0 \("):
        simulate(one_round, clients_at_once=0)


def regression_fault(change: Callable[[RecordDict], None]) -> Callable[[Message, Context], Message]:
    def app(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if int(context.node_config["partition-id"]) == 2:
            change(reply.content)
        return reply

    return app


def _nan_arrays(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    for name, array in arrays.items():
        arrays[name] = type(array)(array.tensor * torch.nan)


def _other_client(content: RecordDict) -> None:
    content.metric_records["metrics"]["partitions"] = [5]


def _no_such_cluster(content: RecordDict) -> None:
    content.metric_records["metrics"]["clusters"] = [3]


def _nan_loss(content: RecordDict) -> None:
    content.metric_records["metrics"]["losses"] = [float("nan")]


@pytest.mark.parametrize("change", [_nan_arrays, _other_client, _no_such_cluster, _nan_loss])
@pytest.mark.parametrize("strategy", ["fed-em", "br-ifca"])
def test_regression_clients_are_checked_alike(
    tmp_path: Path, strategy: str, change: Callable[[RecordDict], None]
) -> None:
    config = Config(
        dataset="linear-regression", strategy=strategy, num_clients=12, participation=1.0, num_rounds=2,
        dimension=4, learning_rate=0.01, results_dir=str(tmp_path), run_name="stop", mask_rule="none", tolerance=0.0,
    )  # fmt: skip
    app = regression_fault(change)
    with pytest.raises(ClientFailure, match="Client 2 "):
        run_federation(config, app)
    rows = run_federation(dataclasses.replace(config, run_name="skip", on_client_failure="skip"), app).rows
    assert [row.get("failed_clients") for row in rows] == [None, 1, 1]
    assert [row["clients"] for row in rows] == [0, 11, 11]


# the time limit


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_limit_interrupts_within_its_time() -> None:
    started = time.monotonic()
    with pytest.raises(ClientFailure, match=r"client-timeout = 0\.1 s"):
        limited(lambda: spin(60), 0.1)
    assert time.monotonic() - started < 30


def test_what_tolerates_errors_does_not_tolerate_the_limit() -> None:
    def tolerant() -> None:
        while True:
            with contextlib.suppress(Exception):
                spin(1)

    with pytest.raises(ClientFailure):
        limited(tolerant, 0.1)


def test_work_that_swallows_everything_is_asked_again() -> None:
    heard: list[BaseException] = []

    def stubborn() -> None:
        while True:
            try:
                spin(60)
            except BaseException as error:
                heard.append(error)
                if len(heard) == 2:
                    raise

    with pytest.raises(ClientFailure):
        limited(stubborn, 0.1)


def test_a_limit_that_strikes_in_a_library_is_told_when_it_returns() -> None:
    for _ in range(5):  # sleeping hears no exception
        with pytest.raises(ClientFailure):
            limited(lambda: time.sleep(0.3), 0.05)


def test_work_that_ends_in_time_is_left_alone() -> None:
    for _ in range(200):  # at the very moment, too: nothing may be raised later on
        with contextlib.suppress(ClientFailure):
            limited(lambda: spin(0.002), 0.002)
    spin(0.05)
    assert limited(lambda: 7, 0.0) == limited(lambda: 7, 5.0) == 7
    with pytest.raises(KeyError):
        limited(lambda: {}["an error of the work's own"], 5.0)


def test_a_limit_holds_in_a_thread_of_its_own() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            limited(lambda: spin(60), 0.1)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert [type(each) for each in caught] == [ClientFailure]


def test_loading_does_not_count(one_round: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a limit, what all messages need is there before the clock starts."""
    order: list[str] = []
    load, limit = client.load, client.limited
    monkeypatch.setattr(client, "load", lambda message: (order.append("load"), load(message))[1])
    monkeypatch.setattr(
        client, "limited", lambda work, seconds: (order.append(f"{seconds:g}"), limit(work, seconds))[1]
    )
    simulate(one_round, num_clients=2, client_timeout=60.0, run_name="limited")
    assert len(order) >= 2 * 6, "ridge, frozen and training of two clients"
    assert order == ["load", "60"] * (len(order) // 2)
    order.clear()
    simulate(one_round, num_clients=2, run_name="free")
    assert set(order) == {"0"}


# Flower's engine


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raises", "hangs", "sends NaN", "sends wrong shapes", "sends a wrong example count",
                                   "uses another mask", "leaves the process", "sends huge numbers"])  # fmt: skip
def test_the_same_on_flowers_engine(one_round: Config, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_fault(one_round, fault, "skip")
    expected = run_federation(config, FaultyApp(fault, AT_FAULT))
    monkeypatch.setattr("fl_taskarith.server.simulate.client_app", FaultyApp(fault, AT_FAULT))
    stopped = dataclasses.replace(with_fault(one_round, fault, "stop"), engine="flower", run_name="stopped")
    with pytest.raises(ClientFailure, match=r"^Client 1 "):
        simulate(stopped)
    history = simulate(dataclasses.replace(config, engine="flower", run_name="on-flower"))
    assert history.rows[1]["failed_clients"] == 2
    assert same_bits(final_weights(history.folder), final_weights(expected.folder))


def test_divergence_stays_divergence(one_round: Config) -> None:
    """A search tells it from other failures."""
    with pytest.raises(Divergence, match="Round 1 got no reply"):
        run_federation(with_fault(one_round, "sends NaN", "skip"), FaultyApp("sends NaN", tuple(range(8))))
    with pytest.raises(Divergence):
        run_federation(with_fault(one_round, "sends no loss", "stop"), FaultyApp("sends no loss", AT_FAULT))
    with pytest.raises(Divergence):
        run_federation(with_fault(one_round, "sends NaN", "stop"), FaultyApp("sends NaN", AT_FAULT))
