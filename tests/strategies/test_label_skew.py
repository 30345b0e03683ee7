"""The methods against label skew: task-vector bank, cyclic turns, squared loss, refreshed head, Gram anchors."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import final_weights, numbers, power_cut, same_bits
from flwr.app import Context, Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fl_taskarith import simulate
from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.participation import sample_clients
from fl_taskarith.engine.question import shapes_of
from fl_taskarith.errors import ClientFailure, ConfigError
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.gram_matching import GramAnchoredSum, per_entry
from fl_taskarith.merging.task_vector_bank import TaskVectorBank
from fl_taskarith.models.backbone import linear_shapes
from fl_taskarith.models.heads import RidgeSolver, RidgeStatistics
from fl_taskarith.server.launch import run_federation
from fl_taskarith.training.local import input_square_sums
from fl_taskarith.training.local_loss import local_loss
from fl_taskarith.workspace.workspace import workspace

FULL = {"participation": 1.0, "num_clients": 8, "classes_per_client": 5}

# the bank


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_bank_against_its_definition(rounds: list[list[int]], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    like = {"b": torch.zeros(3), "a": torch.zeros(2, 2)}
    bank = TaskVectorBank(decay=decay)
    newest: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
    for number, clients in enumerate(rounds):
        bank.begin_round(shapes_of(like))
        for heard in clients:
            vector = {name: torch.randn(value.shape, generator=generator) for name, value in like.items()}
            newest[heard] = (number, vector)
            bank.put(heard, vector, 1.0 + heard)
        found = bank.mean()
        weights = {heard: (1.0 + heard) * decay ** (number - then) for heard, (then, _) in newest.items()}
        for name in like:
            terms = [weights[heard] * vector[name].double() for heard, (_, vector) in newest.items()]
            expected = torch.stack(terms).sum(0) / sum(weights.values())
            assert torch.allclose(found[name].double(), expected, atol=1e-5)
    assert list(found) == list(like), "in the weights' order"
    again = TaskVectorBank(decay=decay)
    again.load(dict(sorted(bank.tensors().items())))
    bank.begin_round(shapes_of(like))
    again.begin_round(shapes_of(like))
    assert list(again.mean()) == list(bank.mean()) == (list(like) if decay else []), "all are a round old by now"
    assert same_bits(bank.mean(), again.mean())


def test_a_bank_of_other_tensors_is_forgotten() -> None:
    bank = TaskVectorBank()
    bank.begin_round({"head": (2,)})
    bank.put(0, {"head": torch.ones(2)}, 1.0)
    bank.begin_round({"backbone": (3,)})
    assert len(bank) == 0
    assert bank.mean() == {}


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("fedadam", marks=pytest.mark.slow)])
def test_a_bank_under_full_participation_is_the_strategy_without(quick_config: Config, strategy: str) -> None:
    plain = simulate(quick_config, run_name="plain", strategy=strategy, mask_rule="random", **FULL)
    banked = simulate(
        quick_config, run_name="bank", strategy=strategy, mask_rule="random", task_vector_bank="float32",
        bank_decay=0.5, **FULL,
    )  # fmt: skip
    assert same_bits(final_weights(plain.folder), final_weights(banked.folder))


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedbn"])
def test_a_bank_holds_everybody_who_was_heard(quick_config: Config, strategy: str) -> None:
    def kept(rounds: int) -> int:
        run = simulate(quick_config, strategy=strategy, num_rounds=rounds, participation=0.2, sampling="cyclic",
                       task_vector_bank="float32", run_name=f"{rounds}")  # fmt: skip
        return json.loads((run.folder / "run.json").read_text())["server_state_bytes"]

    assert kept(3) == 3 * kept(1) > 0, "six clients against two"


RESUMED: list[dict[str, object]] = [
    {"local_loss": "squared", "ridge_refresh": 2, "mask_rule": "random", "task_vector_bank": "float32"},
]
RESUMED_TOO: list[dict[str, object]] = [
    {"mask_source": "own", "mask_rule": "least-sensitive", "calibration_rounds": 2, "calibration_per_client": 10},
    {"task_vector_bank": "bfloat16", "bank_decay": 0.9, "strategy": "fedadam", "server_lr": 0.01},
    {"task_vector_bank": "float32", "sampling": "cyclic", "mask_rule": "random"},
    {"strategy": "gram-anchored", "gram_anchor": 0.1, "gram_epsilon": 0.01, "mask_rule": "random"},
    {"local_loss": "squared", "ridge_refresh": 1, "strategy": "gram-anchored"},
    {"strategy": "gram-anchored", "head": "linear", "head_rounds": 3},
    {"strategy": "fedbn", "task_vector_bank": "float32"},
]


@pytest.mark.parametrize(
    "changed",
    [*RESUMED, *(pytest.param(each, marks=pytest.mark.slow) for each in RESUMED_TOO)],
    ids=lambda changed: " ".join(map(str, changed.values())),
)
def test_each_method_is_resumed_bit_for_bit(quick_config: Config, changed: dict[str, object]) -> None:
    config = dataclasses.replace(quick_config, participation=0.3, num_rounds=4, **changed)
    whole = simulate(config, run_name="whole")
    with power_cut(2):
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut")
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"task_vector_bank": "float32", "sampling": "cyclic"},
        {"strategy": "gram-anchored", "gram_anchor": 0.1},
        {"local_loss": "squared", "ridge_refresh": 1},
        {"mask_source": "own", "mask_rule": "least-sensitive", "calibration_rounds": 1, "calibration_per_client": 10},
    ],
    ids=lambda changed: " ".join(map(str, changed.values())),
)
def test_each_method_has_the_same_bits_on_flowers_engine(quick_config: Config, changed: dict[str, object]) -> None:
    settings = {"num_clients": 4, "classes_per_client": 5, "participation": 0.5, "num_rounds": 2, "mask_rule": "random"}
    config = dataclasses.replace(quick_config, **{**settings, **changed})
    ours = simulate(config, run_name="ours")
    flowers = simulate(config, run_name="flowers", engine="flower")
    assert numbers(ours.folder) == numbers(flowers.folder)
    assert same_bits(final_weights(ours.folder), final_weights(flowers.folder))


def test_a_bank_that_waits_moves_once_everybody_was_heard(quick_config: Config) -> None:
    settings = {"participation": 0.4, "num_rounds": 4, "task_vector_bank": "float32", "sampling": "cyclic"}
    rows = simulate(quick_config, bank_start="all-heard", **settings).rows
    assert [row["update_norm"] > 0 for row in rows[1:]] == [False, False, True, True], "4, 8 and then all of 10 clients"
    assert len({row["test_loss"] for row in rows[:3]}) == 1


def test_a_bank_is_for_strategies_that_take_a_mean() -> None:
    with pytest.raises(ConfigError, match="task-vector-bank replaces the mean"):
        Config(strategy="median", task_vector_bank="float32")


# turns


@given(st.integers(1, 30), st.floats(0.01, 1.0))
@settings(max_examples=30, deadline=None)
def test_cyclic_turns_come_to_everyone_equally_often(clients: int, participation: float) -> None:
    config = Config(num_clients=clients, participation=participation, sampling="cyclic", sharding="iid")

    counts = np.zeros(clients, dtype=int)
    for server_round in range(1, clients + 1):
        chosen = sample_clients(config, server_round, range(clients))
        assert chosen == sorted(set(chosen))
        assert len(chosen) == config.sampled_clients
        counts[chosen] += 1
        assert counts.max() - counts.min() <= 1
    assert set(counts) == {config.sampled_clients}


# squared loss and the refreshed head


def test_the_squared_loss_against_its_definition() -> None:
    scores, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 6, 3, 3, 1])
    expected = 0.0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        expected += sum((score - (place == label)) ** 2 for place, score in enumerate(row)) / 2
    assert local_loss(scores, labels, "squared").item() == pytest.approx(expected / 5)
    assert torch.equal(local_loss(scores, labels, "cross-entropy"), functional.cross_entropy(scores, labels))


def test_without_local_steps_a_refreshed_head_stays_the_ridge_head(quick_config: Config) -> None:
    """A learning rate of 0 is what no local steps are."""
    run = simulate(quick_config, learning_rate=0.0, local_loss="squared", ridge_refresh=1, classes_per_client=1)
    assert len({(row["test_accuracy"], row["test_loss"]) for row in run.rows}) == 1
    statistics = 8 * (64 * 64 + 64 + 64 * 10 + 10 + 1) * 10
    assert all(row["uplink_bytes"] > statistics for row in run.rows), "it was solved anew in every round"


def test_a_refreshed_head_is_the_ridge_head_of_the_trained_backbone(quick_config: Config) -> None:
    config = dataclasses.replace(
        quick_config, local_loss="squared", ridge_refresh=3, ridge_lambda=10.0, logit_scale=1.0
    )
    history = simulate(config)
    home = workspace(config)
    weights = final_weights(history.folder)
    home.load({name: value for name, value in weights.items() if name in home.parameters})
    statistics = RidgeStatistics.of(home.features(home.data.train), home.data.train.labels, 10)
    head = RidgeSolver(statistics).solve(10.0)
    assert torch.allclose(weights["head.weight"], head.weight.float(), atol=1e-4)
    assert torch.allclose(weights["head.bias"], head.bias.float(), atol=1e-4)
    assert len(list((history.folder / "client-states").glob("frozen-*"))) == 1, "of the refreshed head alone"
    moved = [row["uplink_bytes"] for row in history.rows[1:]]
    assert moved[2] > moved[1] == moved[0], "statistics went up in the round that refreshed"


@pytest.mark.parametrize("changed", [{"head": "linear", "head_rounds": 1}, {"trainable": "all", "mask_rule": "none"},
                                     {"strategy": "br-ifca"}])  # fmt: skip
def test_a_head_that_is_trained_is_not_refreshed(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="ridge-refresh"):
        Config(ridge_refresh=2, **changed)


# masks of each client's own


def test_the_own_mask_of_a_single_client_is_the_one_that_clients_choose(quick_config: Config) -> None:
    settings = {"num_clients": 1, "sharding": "iid", "participation": 1.0, "num_rounds": 2, "train_subset": 100,
                "mask_rule": "least-sensitive", "calibration_rounds": 2}  # fmt: skip
    shared = simulate(quick_config, mask_source="clients", **settings)
    own = simulate(quick_config, mask_source="own", **settings)
    assert same_bits(final_weights(shared.folder), final_weights(own.folder))
    assert own.rows[1]["client_update_norm"] == shared.rows[1]["client_update_norm"]


def test_own_masks_differ_and_travel_once(quick_config: Config) -> None:
    config = dataclasses.replace(
        quick_config, num_clients=4, participation=1.0, mask_source="own", mask_rule="least-sensitive",
        classes_per_client=5, calibration_rounds=1, calibration_per_client=20, num_rounds=2, density=0.1,
    )  # fmt: skip
    run = simulate(config)
    home = workspace(config)
    masks = []
    for file in sorted((run.folder / "client-states").glob("*/*.safetensors")):
        kept = safetensors.torch.load_file(file)
        packed = {name.removeprefix("mask/"): value for name, value in kept.items()}
        masks.append(Mask.unpacked({name: packed[name] for name in home.maskable()}, home.shapes))
    assert len(masks) == 4
    assert all(mask.updated == round(0.1 * mask.size) for mask in masks)
    assert masks[0].jaccard(masks[1]) < 0.9
    changed = Mask({name: value != home.pretrained[name] for name, value in final_weights(run.folder).items()
                    if name in masks[0].tensors})  # fmt: skip
    for name, moved in changed.tensors.items():
        assert not bool((moved & ~torch.stack([mask.tensors[name] for mask in masks]).any(0)).any())
    assert run.rows[1]["uplink_bytes"] > run.rows[2]["uplink_bytes"], "the masks went up with the first replies"


@pytest.mark.parametrize("changed", [{"mask_rule": "random"}, {"strategy": "scaffold"}, {"strategy": "fedbn"}])
def test_own_masks_are_for_scores_and_shared_weights(changed: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match='mask-source = "own"'):
        Config(mask_source="own", **changed)


# Gram-anchored averaging


@given(st.integers(1, 4), st.floats(0, 2), st.floats(0, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_gram_anchored_entries_minimise_what_they_are_to(
    clients: int, anchor: float, epsilon: float, masked: bool
) -> None:
    """Each entry is the minimiser of Σ_S g_k (w − w_k)² + (γ Σ_∉S g + ε ḡ) w², by hand."""
    generator = torch.Generator().manual_seed(clients)
    changes = torch.randn(clients, 3, 4, generator=generator)
    grams = torch.rand(clients, 4, generator=generator) + 0.1
    absent = torch.rand(4, generator=generator)
    indices = torch.tensor([0, 5, 6, 11]) if masked else None
    layer = GramAnchoredSum()
    for change, gram in zip(changes, grams, strict=True):
        sent = change.flatten()[indices] if indices is not None else change
        layer.add(sent, per_entry(gram, 3, indices))
    found = layer.result(per_entry(absent, 3, indices), anchor, epsilon)
    entries = indices.tolist() if indices is not None else list(range(12))
    spread = sum(float(grams[:, entry % 4].sum()) for entry in entries) / len(entries)
    for place, entry in enumerate(entries):
        row, column = divmod(entry, 4)
        divisor = float(grams[:, column].sum()) + anchor * float(absent[column]) + epsilon * spread
        expected = sum(float(changes[k, row, column] * grams[k, column]) for k in range(clients)) / divisor
        assert float(found.flatten()[place]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_equal_grams_without_anchor_are_fedavg() -> None:
    changes, gram = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2)), torch.rand(4) + 0.1
    layer, mean = GramAnchoredSum(), WeightedMean()
    for change in changes:
        layer.add(change, per_entry(gram, 5, None))
        mean.add({"w": change}, 1.0)
    assert torch.allclose(layer.result(torch.zeros(5, 4), 0.0, 0.0), mean.result()["w"], atol=1e-6)


def test_an_input_that_nobody_has_seen_is_left_alone() -> None:
    layer = GramAnchoredSum()
    layer.add(torch.ones(2, 2), per_entry(torch.tensor([1.0, 0.0]), 2, None))
    assert layer.result(torch.zeros(2, 2), 0.0, 0.0).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_input_squares_against_a_loop(quick_config: Config) -> None:
    home = workspace(quick_config)
    home.load(home.pretrained)
    shapes = linear_shapes(home.model, home.trained_names(1))
    name = "blocks.1.mlp.fc2.weight"
    assert shapes[name] == tuple(home.parameters[name].shape)
    few = home.data.train.take(torch.arange(5))
    found = input_square_sums(home.model, list(shapes), home.network, few, home.preprocessing, batch_size=2)
    module = home.model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(module, nn.Linear)
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for image in few.images:
            home.model(home.preprocessing.evaluation_inputs(image[None]))
    hook.remove()
    expected = sum((token.double() ** 2 for tokens in seen for token in tokens[0]), torch.zeros(shapes[name][1]))
    assert torch.allclose(found[name].double(), expected, rtol=1e-4)
    assert found.keys() == shapes.keys()


def test_a_client_without_grams_counts_as_the_mean_one(quick_config: Config) -> None:
    def app(failing: set[int]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            asked = message.metadata.message_type == "query.gram"
            if asked and int(context.node_config["partition-id"]) in failing:
                return Message(Error(100, "out of memory"), reply_to=message)
            return client.app(message, context)

        return answer

    config = dataclasses.replace(
        quick_config,
        strategy="gram-anchored",
        gram_anchor=0.5,
        num_rounds=1,
        on_client_failure="skip",
        participation=0.5,
    )
    sound = run_federation(dataclasses.replace(config, run_name="sound"), app(set()))
    missing = run_federation(dataclasses.replace(config, run_name="missing"), app({0, 1, 2}))
    assert [row["failed_clients"] for row in missing.rows] == [0, 3]
    assert missing.rows[1]["update_norm"] == pytest.approx(sound.rows[1]["update_norm"], rel=0.2)
    with pytest.raises(ClientFailure, match="question for Grams got no reply"):
        run_federation(dataclasses.replace(config, run_name="none"), app(set(range(10))))


def test_anchoring_to_absent_clients_shortens_the_step(quick_config: Config) -> None:
    def moved(**changed: object) -> float:
        run = simulate(quick_config, num_rounds=1, strategy="gram-anchored", participation=0.2, **changed)
        return run.rows[-1]["update_norm"]

    assert moved(gram_anchor=1.0) < moved(gram_anchor=0.1) < moved()


def test_masked_entries_only_are_moved(quick_config: Config, tmp_path: Path) -> None:
    run = simulate(quick_config, strategy="gram-anchored", mask_rule="random", num_rounds=1)
    mask, _ = load_mask(run.folder / "mask.safetensors")
    assert run.rows[1]["update_norm"] > 0
    home = workspace(dataclasses.replace(quick_config, strategy="gram-anchored", mask_rule="random", num_rounds=1))
    for name, value in final_weights(run.folder).items():
        if name in mask.tensors:
            changed = value != home.pretrained[name]
            assert not bool((changed & ~mask.tensors[name].view_as(changed)).any())
