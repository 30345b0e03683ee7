"""Whole runs: what they write, what they cannot depend on, and how they fail."""

import csv
import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import augmented, final_weights, numbers, same_bits, take_ridge_head
from flwr.app import Context, Message, MessageType

from fl_taskarith import simulate
from fl_taskarith.client import app as client
from fl_taskarith.client.local_work import draw_local_steps
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.batches import batch_positions
from fl_taskarith.engine.records import payload_bytes, to_record, to_tensors
from fl_taskarith.errors import ClientFailure, ConfigError, Divergence
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.heads import DiscriminantSolver, RidgeSolver, RidgeStatistics, nearest_class_mean
from fl_taskarith.seeding import random_generator, torch_seed
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.run_folder import COLUMNS
from fl_taskarith.training.local import extract_features, set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.workspace import Workspace, workspace


@pytest.mark.figures
def test_a_run_writes_its_results(quick_config: Config) -> None:
    history = simulate(quick_config)
    with open(history.folder / "rounds.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    assert tuple(rows[0]) == COLUMNS[:-1]
    assert float(rows[0]["test_accuracy"]) > 0.8, "the ridge head on the frozen backbone, before any training"
    assert all(0 < float(row["train_loss"]) < 5 for row in rows[1:])
    assert {row["clients"] for row in rows} == {"10", "2"}
    record = json.loads((history.folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"] == quick_config.to_run_config()
    assert record["parameters"]["trained"] < record["parameters"]["total"]
    assert record["head"]["ridge_lambda"] > 0
    assert {"torch", "flwr", "timm", "python"} <= record["versions"].keys()
    assert (history.folder / "curves.png").stat().st_size > 1000
    assert (history.folder / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert list(history.frame()["round"]) == [0, 1, 2, 3]


def test_the_rounds_equal_federated_averaging_written_out(quick_config: Config) -> None:
    """Two rounds recomputed with nothing of the engine, the strategy or the client: the same bits."""
    config = dataclasses.replace(quick_config, num_rounds=2)
    history = simulate(config)

    home = Workspace(config)
    take_ridge_head(home, history.folder)

    names = [name for name in home.parameters if not name.startswith("head.")]
    for server_round in (1, 2):
        before = {name: home.parameters[name].detach().clone() for name in names}
        sums = {name: torch.zeros_like(value) for name, value in before.items()}
        chosen = random_generator(config.seed, "participation", server_round).choice(10, 2, replace=False)
        sizes = {int(partition): len(home.shards[partition]) for partition in chosen}
        for partition in sorted(sizes):
            with torch.no_grad():
                for name in names:
                    home.parameters[name].copy_(before[name])
            generator = random_generator(config.seed, "local training", server_round, partition)
            torch_seed(generator)
            positions = batch_positions(sizes[partition], config.batch_size, config.local_steps, generator)
            optimizer = torch.optim.SGD(set_trained(home.model, names), config.learning_rate, momentum=0.9)
            for batch in positions:
                examples = home.data.train.take(home.shards[partition][torch.from_numpy(batch)])
                inputs = augmented(home.preprocessing, examples.images, generator)
                loss = torch.nn.functional.cross_entropy(home.model(inputs), examples.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for name in names:
                sums[name] += sizes[partition] * (home.parameters[name].detach() - before[name])
        with torch.no_grad():
            for name in names:
                home.parameters[name].copy_(before[name] + sums[name] / sum(sizes.values()))

    weights = final_weights(history.folder)
    for name in names:
        assert torch.allclose(weights[name], home.parameters[name], rtol=1e-5, atol=1e-7), name


def test_the_federated_head_equals_the_pooled_one(quick_config: Config) -> None:
    history = simulate(quick_config, num_rounds=1, ridge_lambda=10.0, logit_scale=1.0, trainable_blocks=1)
    home = Workspace(quick_config)
    features = extract_features(home.model, home.data.train, home.preprocessing, batch_size=512, precision="fp32")
    pooled = RidgeSolver(RidgeStatistics.of(features, home.data.train.labels, 10)).solve(10.0)
    weights = final_weights(history.folder)
    assert torch.allclose(weights["head.weight"], pooled.weight.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skew", [{"classes_per_client": 1}, {"sharding": "iid"}], ids=["Nc = 1", "iid"])
@pytest.mark.parametrize("head", ["lda", "ncm"])
def test_other_heads_equal_the_pooled_ones_and_are_trained_above(
    head: str, skew: dict[str, object], quick_config: Config
) -> None:
    settings = {"lda_shrinkage": 0.3} if head == "lda" else {}
    history = simulate(quick_config, head=head, num_rounds=1, logit_scale=0.5, **settings, **skew)
    home = Workspace(quick_config)
    features = extract_features(home.model, home.data.train, home.preprocessing, batch_size=512, precision="fp32")
    pooled = RidgeStatistics.of(features, home.data.train.labels, 10)
    expected = (DiscriminantSolver(pooled).solve(0.3) if head == "lda" else nearest_class_mean(pooled)).scaled(0.5)
    weights = final_weights(history.folder)
    assert torch.allclose(weights["head.weight"], expected.weight.float(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(weights["head.bias"], expected.bias.float(), rtol=1e-4, atol=1e-4)
    facts = json.loads((history.folder / "run.json").read_text())["head"]
    assert facts == {"kind": head, "logit_scale": 0.5, **settings}
    assert history.rows[0]["test_accuracy"] > 0.8
    assert history.rows[1]["task_vector_norm"] > 0


@pytest.mark.parametrize("engine_seed", [0, 1])
def test_a_run_is_a_function_of_its_configuration(quick_config: Config, engine_seed: int) -> None:
    first = simulate(quick_config, seed=engine_seed, run_name="first")
    torch.manual_seed(1234)
    np.random.seed(99)
    second = simulate(quick_config, seed=engine_seed, run_name="second")
    assert numbers(first.folder) == numbers(second.folder)
    assert same_bits(final_weights(first.folder), final_weights(second.folder))


def test_seeds_differ(quick_config: Config) -> None:
    losses = {simulate(quick_config, seed=seed, num_rounds=1).rows[1]["train_loss"] for seed in (0, 1, 2)}
    assert len(losses) == 3


@pytest.mark.slow
def test_rays_simulation_gives_the_same_bits_as_the_sequential_engine(quick_config: Config) -> None:
    """Under a mask that the clients choose, so that every kind of message travels."""
    settings = {"num_clients": 8, "participation": 0.5, "num_rounds": 2, "local_steps_min": 1, "local_steps_max": 3,
                "mask_rule": "least-sensitive", "mask_source": "clients", "calibration_rounds": 2,
                "calibration_per_client": 4}  # fmt: skip
    in_process = simulate(quick_config, run_name="sequential", **settings)
    on_ray = simulate(quick_config, run_name="ray", engine="flower", **settings)
    assert numbers(in_process.folder) == numbers(on_ray.folder)
    assert same_bits(final_weights(in_process.folder), final_weights(on_ray.folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "linear", "trainable": "head"},
        {"head": "linear", "trainable": "all"},
        {"head": "linear", "trainable": "backbone", "head_rounds": 2},
        {"trainable": "all", "schedule": "cosine", "warmup_rounds": 1, "nesterov": True},
        {"trainable_blocks": 2, "sharding": "iid", "weight_decay": 1e-3},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_only_what_is_trainable_changes_and_travels(quick_config: Config, settings: dict[str, object]) -> None:
    history = simulate(quick_config, **settings)
    config = dataclasses.replace(quick_config, **settings)
    home = workspace(dataclasses.replace(config, results_dir="", threads=1))
    weights = {name: final_weights(history.folder)[name] for name in home.federated_names()}
    trained = set(home.trained_names(1)) | set(home.trained_names(config.num_rounds))
    for name, value in weights.items():
        if name.startswith("head.") and config.head == "ridge":
            continue
        changed = not torch.equal(value, home.pretrained[name])
        assert changed == (name in trained), name
    for row in history.rows[1:]:
        travelling = payload_bytes(to_record({name: weights[name] for name in home.trained_names(row["round"])}))
        once = 0
        if row["round"] == config.head_rounds and config.trainable == "backbone":
            head = Frozen({name: weights[name] for name in HEAD_PARAMETERS})
            once = config.num_clients * payload_bytes(to_record(head.tensors()))
        assert row["uplink_bytes"] == row["clients"] * travelling
        assert row["downlink_bytes"] == row["clients"] * travelling + once


def test_clients_draw_their_own_steps_within_the_bounds() -> None:
    config = load(overrides={"local_steps_min": 2, "local_steps_max": 5})
    drawn = [draw_local_steps(config, server_round, 3) for server_round in range(200)]
    assert set(drawn) == {2, 3, 4, 5}
    assert drawn == [draw_local_steps(config, server_round, 3) for server_round in range(200)]
    assert draw_local_steps(load(), 1, 3) == load().local_steps


def test_a_server_step_scales_the_first_update(quick_config: Config) -> None:
    def moved(server_lr: float) -> torch.Tensor:
        history = simulate(quick_config, num_rounds=1, server_lr=server_lr)
        home = workspace(dataclasses.replace(quick_config, num_rounds=1, server_lr=server_lr))
        return final_weights(history.folder)["blocks.0.mlp.fc1.weight"] - home.pretrained["blocks.0.mlp.fc1.weight"]

    assert torch.allclose(moved(0.5), 0.5 * moved(1.0), rtol=1e-3, atol=1e-7)


def test_evaluation_can_be_rarer_and_the_last_round_is_always_evaluated(quick_config: Config) -> None:
    rows = simulate(quick_config, num_rounds=3, evaluate_every=2).rows
    assert [row.get("test_accuracy") is not None for row in rows] == [True, False, True, True]


# failures


def test_divergence_is_an_error_and_not_a_finished_run(quick_config: Config) -> None:
    with pytest.raises(ClientFailure, match="Lower learning-rate"):
        simulate(quick_config, learning_rate=1e6, weight_decay=1e6, local_steps=8)


def test_an_infeasible_request_leaves_no_folder(quick_config: Config) -> None:
    with pytest.raises(ConfigError, match="classes-per-client"):
        simulate(quick_config, classes_per_client=11)
    assert not Path(quick_config.results_dir).exists()


CONF = Path(__file__).parents[2] / "conf"
SIX_MODELS = sorted([*CONF.glob("centralized*.toml"), *CONF.glob("fedavg-*.toml")])
SWEEPS = {"density": "density", "calibration-rounds": "calibration-rounds", "rules": "mask-rule"}
SWEPT = sorted(path for folder in SWEEPS for path in (CONF / folder).glob("*.toml"))
OTHERS = [CONF / f"{stem}.toml" for stem in ("scaffold-one-class", "not-true-distillation", "feature-anchoring")]


QUICKLY_RUN = ("fedavg-noniid-sparse",)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in QUICKLY_RUN else pytest.mark.slow)
        for path in [*SIX_MODELS, *OTHERS, *SWEPT]
    ],
    ids=lambda path: "-".join(path.with_suffix("").relative_to(CONF).parts),
)
def test_every_conf_file_runs(path: Path, cifar100_folder: Path, tmp_path: Path) -> None:
    """One round, with the tiny backbone and few images in place of what needs a GPU."""
    history = simulate(
        path, data_dir=str(cifar100_folder), download=False, model="vit_glyph", input_size=16, num_rounds=1,
        train_subset=1200, validation_size=100, calibration_size=100, test_subset=100, head_rounds=0,
        warmup_rounds=0, results_dir=str(tmp_path), threads=1, learning_rate=0.001,
    )  # fmt: skip
    assert [row["round"] for row in history.rows] == [0, 1]
    assert history.rows[0]["test_accuracy"] > 0.02, "twice chance, from the head alone"
    assert history.rows[1]["train_loss"] > 0
    assert (history.folder / "mask.safetensors").exists() == load(path).masked


def test_there_is_a_conf_file_for_each_of_the_six_models() -> None:
    models = {(load(path).strategy, load(path).sharding, load(path).masked) for path in SIX_MODELS}
    assert len(SIX_MODELS) == len(models) == 6


@pytest.mark.parametrize("folder", SWEEPS)
def test_the_files_of_a_sweep_differ_in_one_setting(folder: str) -> None:
    base = load(CONF / "fedavg-noniid-sparse.toml")
    values = {}
    for path in sorted((CONF / folder).glob("*.toml")):
        config = load(path)
        assert set(config.differing_keys(base.to_run_config())) <= {SWEEPS[folder]}, path
        values[path.stem] = str(config.to_run_config()[SWEEPS[folder]])
    assert all(name == value for name, value in values.items()), "a file is named after its value"
    assert len(values) == {"density": 5, "calibration-rounds": 4, "rules": 9}[folder]


def test_clients_that_drop_out_are_a_function_of_the_seed_and_one_always_stays(quick_config: Config) -> None:
    settings = {"participation": 0.5, "dropout": 0.5, "num_rounds": 4}
    first, second = (simulate(quick_config, run_name=name, **settings) for name in ("first", "second"))
    assert numbers(first.folder) == numbers(second.folder)
    whole = simulate(quick_config, run_name="whole", **{**settings, "dropout": 0.0})
    answered = [row["clients"] for row in first.rows[1:]]
    assert [row["clients"] for row in whole.rows[1:]] == [5] * 4
    assert 1 <= min(answered) < 5 and sum(answered) < 20
    assert [row["downlink_bytes"] for row in first.rows[1:]] == [row["downlink_bytes"] for row in whole.rows[1:]]
    alone = simulate(quick_config, run_name="alone", **{**settings, "dropout": 0.99})
    assert all(row["clients"] == 1 for row in alone.rows[1:])


def test_the_logged_cosine_is_that_of_the_clients_task_vectors(quick_config: Config) -> None:
    seen: list[list[torch.Tensor]] = []

    def recording(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            if context.node_config["partition-id"] == min(partitions):
                seen.append([])
            tensors = to_tensors(reply.content.array_records["arrays"], torch.device("cpu"))
            seen[-1].append(torch.cat([value.flatten() for value in tensors.values()]).double())
        return reply

    partitions = range(10)
    history = run_federation(dataclasses.replace(quick_config, participation=1.0, num_rounds=2), recording)
    for row, vectors in zip(history.rows[1:], seen, strict=True):
        assert len(vectors) == 10
        pairs = [(i, j) for i in partitions for j in partitions if i != j]
        inner = sum(float(vectors[i] @ vectors[j]) for i, j in pairs)
        lengths = sum(float(vectors[i].norm() * vectors[j].norm()) for i, j in pairs)
        assert row["client_cosine"] == pytest.approx(inner / lengths, abs=0.02)  # shards differ in size by one example


def test_a_client_that_diverges_in_half_precision_ends_the_run_as_divergence(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_taskarith.training.local.LOSS_SCALE", 2.0**60)
    with pytest.raises(Divergence, match=r"Client \d+ diverged.*fp16"):
        simulate(quick_config, precision="fp16", local_steps=1)


@pytest.mark.parametrize("settings", [{"strategy": "fedprox", "proximal_mu": 0.1}, {"strategy": "scaffold"}])
@pytest.mark.parametrize("phases", [{"trainable": "all"}, {"trainable": "head"}, {"head_rounds": 1}])
def test_corrections_of_gradients_reach_a_solved_head(
    quick_config: Config, settings: dict[str, object], phases: dict[str, object]
) -> None:
    history = simulate(quick_config, num_rounds=2, **settings, **phases)
    assert len(history.rows) == 3


@pytest.mark.parametrize("strategy", ["fedavg", "centralized"])
def test_a_finished_run_is_freed_without_the_garbage_collector(quick_config: Config, strategy: str) -> None:
    """Else a study's process holds the models and data of many runs until it happens to collect."""

    def residents() -> int:
        return sum(isinstance(each, Workspace) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        simulate(quick_config, strategy=strategy, num_rounds=1, run_name="first")
        one = residents()
        simulate(quick_config, strategy=strategy, num_rounds=1, learning_rate=0.02, run_name="second")
        assert residents() == one
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", ["fedavg", "centralized"])
def test_the_squared_loss_is_that_of_the_ridge_heads_own_scores(strategy: str, quick_config: Config) -> None:
    """At a rate that changes nothing, over all examples: the residuals of the head in its own scale."""
    config = dataclasses.replace(
        quick_config, strategy=strategy, local_loss="squared", learning_rate=1e-12, num_rounds=1, local_steps=1,
        batch_size=300, participation=1.0, augmentation="none", clients_at_once=1,
    )  # fmt: skip
    history = simulate(config, run_name="squared")
    home = Workspace(config)
    take_ridge_head(home, history.folder)
    scale = json.loads((history.folder / "run.json").read_text())["head"]["logit_scale"]
    assert scale > 2
    with torch.no_grad():
        scores = home.model(home.preprocessing.evaluation_inputs(home.data.train.images)) / scale
    residuals = scores - torch.nn.functional.one_hot(home.data.train.labels, 10)
    expected = 0.5 * residuals.square().sum(1).mean().item()
    assert history.rows[1]["train_loss"] == pytest.approx(expected, rel=1e-3)
