"""Losses with a second term: against loops over classes and steps, in their limits, and at one class per client."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import final_weights, numbers, power_cut, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.data.batches import Preprocessing, batch_positions
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.seeding import torch_seed
from fl_taskarith.training.local import set_trained, train_locally
from fl_taskarith.training.local_loss import ANCHORED, NOT_TRUE, LocalLoss, not_true_divergence

PLAIN = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, crop_padding=0, flip=False)
STEPS, BATCH, RATE = 3, 8, 0.02


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 5), classes=st.integers(2, 6), temperature=st.floats(0.3, 5.0), seed=st.integers(0, 99))
def test_the_divergence_is_the_sum_over_the_classes_that_are_not_the_label(
    batch: int, classes: int, temperature: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    scores, reference = chance.normal(size=(2, batch, classes)) * 3
    labels = chance.integers(0, classes, batch)
    expected = 0.0
    for row, label in enumerate(labels):
        others = [each for each in range(classes) if each != label]
        now = [math.exp(scores[row, each] / temperature) for each in others]
        then = [math.exp(reference[row, each] / temperature) for each in others]
        expected += sum(
            q / sum(then) * math.log((q / sum(then)) / (p / sum(now))) for q, p in zip(then, now, strict=True)
        )
    found = not_true_divergence(*map(torch.from_numpy, (scores, reference, labels)), temperature)
    assert found.item() == pytest.approx(expected / batch, rel=1e-6, abs=1e-12)


def start() -> Backbone:
    model = build_model("vit_glyph", 10, 16, "pretrained", download=False, seed=0)
    nn.init.normal_(model.get_parameter("head.weight"), std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def moved(model: Backbone) -> Backbone:
    """Another model: a global one that has left the pretrained one, or the other way round."""
    other = copy.deepcopy(model)
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if name not in HEAD_PARAMETERS:
                value.add_(0.02 * torch.randn(value.shape, generator=chance))
    return other


@pytest.fixture(scope="module")
def one_class() -> ImageSet:
    chance = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=chance)
    return ImageSet(images, torch.full((20,), 7))


def trained(model: Backbone, examples: ImageSet, loss: LocalLoss) -> tuple[float, list[Tensor]]:
    """The mean loss, and the parameters of `model` afterwards."""
    names = [name for name, _ in model.named_parameters() if name not in HEAD_PARAMETERS]
    parameters = set_trained(model, names)
    mean = train_locally(
        model, examples, torch.arange(len(examples)), torch.optim.SGD(parameters, RATE), PLAIN, local_steps=STEPS,
        batch_size=BATCH, precision="fp32", generator=np.random.default_rng(0), loss=loss,
    )  # fmt: skip
    return mean, [parameter.detach() for parameter in parameters]


def by_hand(model: Backbone, reference: Backbone, examples: ImageSet, name: str) -> tuple[float, list[Tensor]]:
    """The steps with a second model beside the first, β = μ = 0.7 and τ = 2."""
    model, chance, losses = copy.deepcopy(model), np.random.default_rng(0), []
    torch_seed(chance)
    parameters = [value for key, value in model.named_parameters() if key not in HEAD_PARAMETERS]
    optimizer = torch.optim.SGD(parameters, RATE)
    for chosen in torch.from_numpy(batch_positions(len(examples), BATCH, STEPS, chance)):
        inputs, labels = PLAIN.evaluation_inputs(examples.images[chosen]), examples.labels[chosen]
        features, anchors = (each.forward_features(inputs)[:, 0] for each in (model, reference))
        loss = functional.cross_entropy(model.head(features), labels)
        if name == ANCHORED:
            loss = loss + 0.35 * ((features - anchors.detach()) ** 2).sum() / len(labels)
        else:
            keep = functional.one_hot(labels, 10) == 0
            now, then = (
                each[keep].view(-1, 9).div(2).softmax(1) for each in (model(inputs), reference(inputs).detach())
            )
            loss = loss + 0.7 * 4 * (then * (then / now).log()).sum() / len(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / STEPS, [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", [NOT_TRUE, ANCHORED])
def test_steps_are_those_with_a_second_model_at_hand(name: str, one_class: ImageSet) -> None:
    pretrained = start()
    model = moved(pretrained)
    reference = pretrained if name == ANCHORED else copy.deepcopy(model)
    expected, ends = by_hand(model, reference, one_class, name)

    @contextmanager
    def pretrained_weights() -> Iterator[None]:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(pretrained.state_dict())
        yield
        model.load_state_dict(before)

    loss = LocalLoss(name, weight=0.7, temperature=2.0)
    if name == ANCHORED:
        loss = dataclasses.replace(loss, reference_weights=pretrained_weights)
    found, parameters = trained(model, one_class, loss)
    assert found == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(parameters, ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [NOT_TRUE, ANCHORED])
def test_without_weight_it_is_the_cross_entropy_bit_for_bit_and_with_it_another(name: str, one_class: ImageSet) -> None:
    plain = trained(start(), one_class, LocalLoss())
    without = trained(start(), one_class, LocalLoss(name, weight=0.0, temperature=2.0))
    assert without[0] == plain[0]
    assert all(map(torch.equal, without[1], plain[1]))
    assert trained(start(), one_class, LocalLoss(name, weight=1.0))[0] != plain[0]


@pytest.mark.parametrize("name", [NOT_TRUE, ANCHORED])
def test_there_is_a_gradient_at_one_class_and_it_holds_the_model_back(name: str, one_class: ImageSet) -> None:
    """A softmax over the client's own class alone is 1 whatever the scores are, and has none."""
    model = start()
    restricted = model(PLAIN.evaluation_inputs(one_class.images))[:, 7:8].log_softmax(1).sum()
    assert all(not bool(each.any()) for each in torch.autograd.grad(restricted, list(model.parameters())))
    before = [value.detach().clone() for key, value in model.named_parameters() if key not in HEAD_PARAMETERS]

    def distance(weight: float) -> float:
        ends = trained(copy.deepcopy(model), one_class, LocalLoss(name, weight=weight))[1]
        return math.sqrt(sum(float((end - at).square().sum()) for end, at in zip(ends, before, strict=True)))

    assert 0 < distance(1.0 if name == NOT_TRUE else 0.02) < distance(0.0)


RUNS: dict[str, dict[str, object]] = {
    "not true, masked, cached": {
        "local_loss": NOT_TRUE, "distillation_weight": 2.0, "distillation_temperature": 2.0, "mask_rule": "random",
        "trainable_blocks": 2, "prefix_cache": "float32", "augmentation": "flip",
    },
    "anchored, masked": {"local_loss": ANCHORED, "anchoring_mu": 0.1, "mask_rule": "random"},
}  # fmt: skip
RUNS_TOO: dict[str, dict[str, object]] = {
    "not true": {"local_loss": NOT_TRUE},
    "anchored, own norms": {"local_loss": ANCHORED, "strategy": "fedbn"},
    "anchored, SCAFFOLD": {"local_loss": ANCHORED, "strategy": "scaffold"},
    "not true, own masks": {
        "local_loss": NOT_TRUE, "mask_source": "own", "mask_rule": "least-sensitive", "calibration_rounds": 1,
        "calibration_per_client": 10,
    },
    "anchored, cached": {"local_loss": ANCHORED, "trainable_blocks": 1, "prefix_cache": "float32", "num_rounds": 2},
}  # fmt: skip


@pytest.fixture
def skewed(quick_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = str(tmp_path_factory.mktemp("data"))
    return dataclasses.replace(quick_config, classes_per_client=1, participation=0.2, num_rounds=3, data_dir=folder)


@pytest.mark.parametrize("change", [*RUNS, *(pytest.param(each, marks=pytest.mark.slow) for each in RUNS_TOO)])
def test_a_run_is_resumed_bit_for_bit_and_the_second_term_changes_it(change: str, skewed: Config) -> None:
    config = dataclasses.replace(skewed, **(RUNS | RUNS_TOO)[change])
    whole = simulate(config, run_name="whole")
    with power_cut(1):
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut")
    assert numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))
    plain = simulate(config, run_name="plain", distillation_weight=0.0, anchoring_mu=0.0)
    assert numbers(plain.folder) != numbers(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("change", RUNS)
def test_both_engines_give_the_same_bits(change: str, skewed: Config) -> None:
    config = dataclasses.replace(skewed, num_clients=4, classes_per_client=5, participation=0.5, num_rounds=2,
                                 **(RUNS | RUNS_TOO)[change])  # fmt: skip
    ours = simulate(config, run_name="ours")
    flowers = simulate(config, run_name="flowers", engine="flower")
    assert numbers(ours.folder) == numbers(flowers.folder)
    assert same_bits(final_weights(ours.folder), final_weights(flowers.folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", [NOT_TRUE, ANCHORED])
def test_without_weight_a_run_has_the_bits_of_one_under_the_cross_entropy(name: str, skewed: Config) -> None:
    runs = [
        simulate(skewed, run_name="plain"),
        simulate(skewed, run_name="zero", local_loss=name, distillation_weight=0.0, anchoring_mu=0.0),
    ]
    assert numbers(runs[0].folder) == numbers(runs[1].folder)
    assert same_bits(*(final_weights(run.folder) for run in runs))


def test_features_that_never_move_are_not_anchored() -> None:
    with pytest.raises(ConfigError, match="feature-anchoring"):
        Config(local_loss=ANCHORED, trainable="head", mask_rule="none")
