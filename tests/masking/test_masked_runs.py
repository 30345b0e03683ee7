"""Whole runs under a mask: only its entries move and travel, and the numbers are those of dense federated averaging."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import own_mask_rule
import pytest
import torch
from conftest import augmented, final_weights
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.batches import batch_positions
from fl_taskarith.engine.records import payload_bytes, to_record
from fl_taskarith.engine.sequential import ensure_run_identity
from fl_taskarith.errors import ConfigError
from fl_taskarith.masking.anatomy import KINDS
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.masking.rules import MaskRule
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.seeding import random_generator, torch_seed
from fl_taskarith.training.local import set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.make_mask import make_mask, server_sums
from fl_taskarith.workspace.workspace import Workspace, workspace


@pytest.fixture
def masked_config(quick_config: Config) -> Config:
    return dataclasses.replace(
        quick_config, mask_rule="least-sensitive", calibration_size=30, calibration_rounds=2, learning_rate=0.1
    )


def mask_of(folder: Path) -> Mask:
    return load_mask(folder / "mask.safetensors")[0]


def entries(mask: Mask) -> list[int]:
    return [int(tensor.sum()) for tensor in mask.tensors.values() if tensor.any()]


def travelling_bytes(mask: Mask) -> int:
    """The stated formula: 4 bytes per updated entry, and a 128-byte header and the name of each tensor that has any."""
    return sum(4 * int(tensor.sum()) + 128 + len(name) for name, tensor in mask.tensors.items() if tensor.any())


def test_only_masked_entries_move(masked_config: Config) -> None:
    history = simulate(masked_config)
    mask, weights = mask_of(history.folder), final_weights(history.folder)
    home = workspace(masked_config)
    moved = 0
    for name, tensor in mask.tensors.items():
        assert torch.equal(weights[name][~tensor], home.pretrained[name][~tensor]), name
        moved += int((weights[name][tensor] != home.pretrained[name][tensor]).sum())
    assert moved > 0.3 * mask.updated  # key biases and what no sampled client's gradient reached stay
    norm = sum(float(((weights[name] - home.pretrained[name]) ** 2).sum()) for name in mask.tensors) ** 0.5
    assert history.rows[-1]["task_vector_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_rounds_equal_dense_federated_averaging_of_masked_steps(masked_config: Config) -> None:
    """Recomputed with torch's own SGD, gradients zeroed outside of the mask, and whole models averaged."""
    config = dataclasses.replace(masked_config, num_rounds=2)
    history = simulate(config)
    mask, final = mask_of(history.folder), final_weights(history.folder)
    home = Workspace(config)
    home.load({name: final[name] for name in HEAD_PARAMETERS})
    names = home.trained_names(1)
    for row in history.rows[1:]:
        server_round = row["round"]
        before = {name: home.parameters[name].detach().clone() for name in names}
        chosen = random_generator(config.seed, "participation", server_round).choice(10, 2, replace=False)
        sizes = {int(partition): len(home.shards[partition]) for partition in chosen}
        models, norms = {}, {}
        for partition in sorted(sizes):
            home.load(before)
            generator = random_generator(config.seed, "local training", server_round, partition)
            torch_seed(generator)
            positions = batch_positions(sizes[partition], config.batch_size, config.local_steps, generator)
            parameters = set_trained(home.model, names)
            optimizer = torch.optim.SGD(parameters, config.learning_rate, momentum=0.9)
            for batch in positions:
                examples = home.data.train.take(home.shards[partition][torch.from_numpy(batch)])
                inputs = augmented(home.preprocessing, examples.images, generator)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(home.model(inputs), examples.labels).backward()
                for name, parameter in zip(names, parameters, strict=True):
                    parameter.grad = parameter.grad.where(mask.tensors[name], 0.0)
                optimizer.step()
            models[partition] = {name: home.parameters[name].detach().clone() for name in names}
            norms[partition] = distance(models[partition], before)
        total = sum(sizes.values())
        mean = {name: sum(sizes[each] / total * models[each][name] for each in sizes) for name in names}
        of_clients = sum(sizes[each] * norms[each] for each in sizes) / total
        assert row["client_update_norm"] == pytest.approx(of_clients, rel=1e-4)
        assert row["update_norm"] == pytest.approx(distance(mean, before), rel=1e-3)
        home.load(mean)
    for name in names:
        assert torch.allclose(final[name], home.parameters[name], rtol=1e-5, atol=1e-6), name


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum(float(((first[name] - second[name]) ** 2).sum()) for name in first) ** 0.5


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_traffic_follows_the_stated_formula(masked_config: Config, density: float) -> None:
    config = dataclasses.replace(masked_config, density=density, num_rounds=1)
    history = simulate(config)
    mask, home = mask_of(history.folder), workspace(config)
    first = history.rows[1]
    assert first["uplink_bytes"] == first["downlink_bytes"] == first["clients"] * travelling_bytes(mask)
    dense = payload_bytes(to_record(home.maskable()))
    assert travelling_bytes(mask) == pytest.approx(density * dense, abs=0.02 * dense)

    # Once, in round 0: the ridge sums up; down, to every client, the head and the mask with one bit per weight.
    zero = history.rows[0]
    head = {name: home.pretrained[name] for name in HEAD_PARAMETERS}
    bits = sum(-(-tensor.numel() // 8) + 128 + len("mask/" + name) for name, tensor in mask.tensors.items())
    heads = sum(4 * value.numel() + 128 + len("frozen/" + name) for name, value in head.items())
    assert zero["downlink_bytes"] == config.num_clients * (bits + heads)
    statistics = RidgeStatistics.of(torch.zeros(1, home.model.embed_dim), torch.zeros(1, dtype=torch.int64), 10)
    assert zero["uplink_bytes"] == config.num_clients * payload_bytes(to_record(statistics.tensors()))


def test_the_bytes_reported_are_those_that_flower_serialises(masked_config: Config) -> None:
    """A message's protocol buffer is the arrays' bytes and what frames them, under 100 bytes per tensor."""
    home = workspace(masked_config)
    generator = torch.Generator().manual_seed(0)
    mask = Mask({name: torch.rand(value.shape, generator=generator) < 0.1 for name, value in home.maskable().items()})
    for tensors in (mask.gather(home.pretrained), Frozen({}, mask).tensors(), home.maskable()):
        record = to_record(tensors)
        serialised = recorddict_to_proto(RecordDict({"arrays": record})).ByteSize()
        assert payload_bytes(record) <= serialised <= payload_bytes(record) + 100 * len(tensors)


def test_masks_of_clients_count_their_traffic(masked_config: Config) -> None:
    config = dataclasses.replace(masked_config, mask_source="clients", calibration_per_client=3, num_rounds=1)
    history = simulate(config)
    mask, home = mask_of(history.folder), workspace(config)
    scores = payload_bytes(to_record(home.maskable()))
    alive = payload_bytes(to_record(Frozen({name: home.pretrained[name] for name in HEAD_PARAMETERS}, mask).tensors()))
    statistics = RidgeStatistics.of(torch.zeros(1, home.model.embed_dim), torch.zeros(1, dtype=torch.int64), 10)
    once = payload_bytes(to_record(statistics.tensors()))
    zero = history.rows[0]
    assert zero["uplink_bytes"] == config.num_clients * (once + config.calibration_rounds * scores)
    assert zero["downlink_bytes"] == config.num_clients * (config.calibration_rounds + 1) * alive


def test_the_clients_mask_is_the_pooled_one(masked_config: Config) -> None:
    """With true labels nothing is drawn, so a threshold on added sums equals one on the union of the shards."""
    config = dataclasses.replace(
        masked_config, mask_source="clients", fisher_labels="true", num_rounds=1, train_subset=120
    )
    history = simulate(config)
    home = workspace(config)
    head = {name: final_weights(history.folder)[name] for name in HEAD_PARAMETERS}
    pooled = make_mask(
        home,
        lambda number, alive: (
            home.sensitivity_sums(head, alive, home.data.train, random_generator(0, "unused")), len(home.data.train)
        ),
    )  # fmt: skip
    assert pooled.mask.jaccard(mask_of(history.folder)) > 0.995
    facts = json.loads((history.folder / "run.json").read_text())["mask"]
    assert facts["source"] == "clients"
    assert facts["density"] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("rule", ["most-salient", "random-by-kind"])
def test_clients_can_score_for_every_rule_that_scores(rule: str, masked_config: Config) -> None:
    history = simulate(masked_config, mask_rule=rule, mask_source="clients", calibration_per_client=3, num_rounds=1)
    mask, facts = mask_of(history.folder), json.loads((history.folder / "run.json").read_text())["mask"]
    assert mask.updated == round(masked_config.density * mask.size)
    assert (facts["rule"], facts["source"]) == (rule, "clients")
    assert ("fisher_labels" in facts) == (rule == "random-by-kind")
    assert history.rows[1]["task_vector_norm"] > 0


def test_a_threshold_reproduces_the_density_it_was_reported_for(masked_config: Config) -> None:
    config = dataclasses.replace(masked_config, calibration_rounds=1, num_rounds=1)
    by_density = simulate(config)
    facts = json.loads((by_density.folder / "run.json").read_text())["mask"]
    by_threshold = simulate(config, sensitivity_threshold=facts["sensitivity_threshold"])
    assert mask_of(by_threshold.folder).jaccard(mask_of(by_density.folder)) == 1.0
    again = json.loads((by_threshold.folder / "run.json").read_text())["mask"]
    assert again["density"] == facts["density"]


def test_a_mask_from_a_file_is_used_as_it_is(masked_config: Config) -> None:
    first = simulate(masked_config, num_rounds=1)
    second = simulate(
        masked_config, num_rounds=1, mask_rule="file", mask_file=str(first.folder / "mask.safetensors"), seed=3
    )
    assert mask_of(second.folder).jaccard(mask_of(first.folder)) == 1.0
    with pytest.raises(ConfigError, match="masks other tensors"):
        simulate(
            masked_config, num_rounds=1, mask_rule="file", mask_file=str(first.folder / "mask.safetensors"),
            trainable_blocks=1,
        )  # fmt: skip


def test_a_centralized_run_can_be_masked(masked_config: Config) -> None:
    history = simulate(masked_config, strategy="centralized", train_subset=160, num_rounds=2)
    mask, weights = mask_of(history.folder), final_weights(history.folder)
    home = workspace(dataclasses.replace(masked_config, strategy="centralized", train_subset=160, num_rounds=2))
    assert mask.updated == round(0.1 * mask.size)
    for name, tensor in mask.tensors.items():
        assert torch.equal(weights[name][~tensor], home.pretrained[name][~tensor]), name
    assert history.rows[-1]["task_vector_norm"] > 0


def test_a_mask_of_the_last_blocks_trains_nothing_before_them(masked_config: Config) -> None:
    history = simulate(masked_config, trainable_blocks=1, num_rounds=1)
    assert {name.split(".")[0] for name in mask_of(history.folder).tensors} == {"blocks", "norm"}
    assert all(name.startswith(("blocks.3.", "norm.")) for name in mask_of(history.folder).tensors)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"trainable": "all"}, "trainable"),
     ({"mask_rule": "random", "sensitivity_threshold": 0.1}, "sensitivity-threshold"),
     ({"calibration_size": 0}, "calibration-size"),
     ({"mask_source": "clients", "strategy": "centralized"}, "mask-source"),
     ({"mask_rule": "none", "mask_exclude": "pos_embed"}, "mask-exclude"),
     ({"mask_rule": "file"}, "mask-file"),
     ({"mask_file": "x"}, "mask-file"),
     ({"density": 0.0}, "density"),
     ({"mask_rule": "sensitive"}, "mask-rule")],
)  # fmt: skip
def test_settings_that_contradict_a_mask_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(overrides={"mask_rule": "least-sensitive"} | settings)


def test_a_damaged_file_of_frozen_tensors_stops_the_run_with_its_path(masked_config: Config) -> None:
    from fl_taskarith.client import app as client
    from fl_taskarith.client import local_work
    from fl_taskarith.server.launch import run_federation

    def app(message: Message, context: object) -> Message:
        if message.metadata.message_type == "train":
            record: ConfigRecord = message.content.config_records["config"]
            path = Path(str(record["round.state_folder"])) / str(record["round.frozen_name"])
            path.write_bytes(path.read_bytes()[:-1])
            local_work._frozen.cache_clear()
        return client.app(message, context)

    ensure_run_identity()
    with pytest.raises(Exception, match=r"frozen-.*missing or damaged"):
        run_federation(masked_config, app)


def test_arrays_of_a_mask_travel_as_flower_arrays() -> None:
    mask = Mask({"a": torch.rand(5, 5) < 0.5})
    frozen = Frozen({"head.bias": torch.ones(3)}, mask)
    plain = ArrayRecord({name: value.numpy() for name, value in frozen.tensors().items()} and frozen.tensors())
    back = Frozen.of_tensors(
        {name: torch.from_numpy(array.numpy()) for name, array in plain.items()},
        {"head.bias": (3,), "a": (5, 5)},
        torch.device("cpu"),
    )
    assert back.mask is not None
    assert back.mask.jaccard(mask) == 1.0
    assert torch.equal(back.weights["head.bias"], torch.ones(3))


# a mask rule of one's own

Weights = dict[str, Tensor]


def made_by(monkeypatch: pytest.MonkeyPatch, config: Config, **given: Any) -> Mask:
    """The mask of a rule of one's own, made of its arguments."""
    monkeypatch.setattr(own_mask_rule, "GIVEN", MaskRule("a rule", "none", **given), raising=False)
    home = workspace(dataclasses.replace(config, mask_rule="own_mask_rule:GIVEN"))
    return make_mask(home, server_sums(home, {})).mask


def magnitudes(weights: Weights, generator: np.random.Generator) -> Weights:
    return {name: value.abs() for name, value in weights.items()}


def test_a_rule_cannot_change_the_pretrained_weights(masked_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(weights: Weights, generator: np.random.Generator) -> Weights:
        scores = magnitudes(weights, generator)
        for value in weights.values():
            value.mul_(0)
        return scores

    mask = made_by(monkeypatch, masked_config, scores=spoiling)
    home = workspace(dataclasses.replace(masked_config, mask_rule="own_mask_rule:GIVEN"))
    assert all(bool(value.any()) for name, value in home.maskable().items() if name.endswith("weight"))
    assert mask.jaccard(made_by(monkeypatch, masked_config, scores=magnitudes)) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_scores_of_every_real_type_are_ranked(
    dtype: torch.dtype, masked_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers without a sign too, whose negatives are none."""
    one_of_two = {"scores": lambda weights, _: {name: (value > 0).to(dtype) for name, value in weights.items()}}
    mask = made_by(monkeypatch, masked_config, keeps_largest=True, **one_of_two)
    home = workspace(dataclasses.replace(masked_config, mask_rule="own_mask_rule:GIVEN"))
    assert all(bool((value[mask.tensors[name]] > 0).all()) for name, value in home.maskable().items())


SPOILT = {
    "transposed": (lambda value: value.mT, "Tensor torch.float32 .* expected a tensor of real numbers in the weight's"),
    "flat": (lambda value: value.flatten(), "weight's shape"),
    "one number": (lambda value: value.mean(), r"torch.float32 \[\] as the scores of blocks.0.attn.qkv.weight"),
    "rows": (lambda value: value.mean(1), "weight's shape"),
    "kept dimension": (lambda value: value.mean(1, keepdim=True), "weight's shape"),
    "bool": (lambda value: value > 0, "returned Tensor torch.bool"),
    "complex": (lambda value: value.to(torch.complex64), "returned Tensor torch.complex64"),
    "numpy": (lambda value: value.numpy(), "returned ndarray float32"),
    "none": (lambda value: None, "returned NoneType as the scores"),
    "nan": (lambda value: value * math.nan, "NaN or infinite score of blocks.0.attn.qkv.weight"),
    "infinite": (lambda value: value / 0, "NaN or infinite score"),
    "raises": (lambda value: value.no_such, "raised AttributeError: .*test_masked_runs.py, line"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_scores_of_another_form_are_told_by_rule_and_tensor(
    spoil: str, masked_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt, message = SPOILT[spoil]
    name = "blocks.0.attn.qkv.weight"

    def scores(weights: Weights, generator: np.random.Generator) -> Weights:
        return magnitudes(weights, generator) | {name: spoilt(weights[name])}

    with pytest.raises(ConfigError, match=f'^mask-rule = "own_mask_rule:GIVEN" .*{message}'):
        made_by(monkeypatch, masked_config, scores=scores)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(lambda weights, _: None, "returned NoneType: expected a dictionary"),
     (lambda weights, _: {}, "returned scores of other tensors than it was given: .* patch_embed|blocks"),
     (lambda weights, _: magnitudes(weights, _) | {"more": torch.ones(1)}, "1 names are .*for example more"),
     (lambda weights: {}, "raised TypeError: .* 1 positional argument")],
)  # fmt: skip
def test_scores_of_other_tensors_are_told(
    scores: Any, message: str, masked_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f'^mask-rule = "own_mask_rule:GIVEN" .*({message})'):
        made_by(monkeypatch, masked_config, scores=scores)


def test_a_kind_that_there_is_not_is_told_with_those_there_are(
    masked_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f"chooses from attention, .* among {', '.join(KINDS)}"):
        made_by(monkeypatch, masked_config, scores=magnitudes, kinds=("q", "attention"))


@pytest.mark.slow
@pytest.mark.figures
def test_a_finished_run_is_shown_without_the_module_of_its_rule(
    masked_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as at_hand:
        at_hand.setitem(sys.modules, "left_at_home", own_mask_rule)
        config = dataclasses.replace(masked_config, mask_rule="left_at_home:FIRST", sensitivity_threshold=0.0)
        folder = simulate(config).folder
        other = simulate(dataclasses.replace(config, mask_rule="left_at_home:MIDDLING", mask_source="clients")).folder
    assert main(["plot", str(folder), f"--output={tmp_path / 'one'}"]) == 0
    assert main(["plot", str(folder), str(other), f"--output={tmp_path / 'both'}"]) == 0
    assert simulate(config).folder == folder, "it is finished"
    with pytest.raises(ConfigError, match=r'mask-rule = "left_at_home:FIRST" cannot be imported .*No module named'):
        simulate(config, seed=5)
