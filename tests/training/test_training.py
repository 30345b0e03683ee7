import math

import numpy as np
import pytest
import torch
from conftest import augmented
from torch.nn import functional

from fl_taskarith.config.settings import load
from fl_taskarith.data.batches import Preprocessing, batch_positions
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import Divergence
from fl_taskarith.models.backbone import build_model
from fl_taskarith.seeding import torch_seed
from fl_taskarith.training import local as training
from fl_taskarith.training.local import evaluate, extract_features, set_trained, train_locally
from fl_taskarith.training.local_loss import local_loss
from fl_taskarith.training.sparse_sgdm import SparseSGDM
from fl_taskarith.workspace.workspace import Workspace, workspace

PREPROCESSING = Preprocessing(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def examples() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (40,), generator=generator)
    images = torch.randint(0, 120, (40, 3, 8, 8), generator=generator) + 30 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels)


def model_with_random_head(seed: int = 0) -> torch.nn.Module:
    model = build_model("vit_glyph", 4, 16, "none", download=False, seed=seed)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def test_local_steps_equal_a_plain_loop(examples: ImageSet) -> None:
    shard = torch.arange(5, 35)
    ours, plain = model_with_random_head(), model_with_random_head()
    optimizer = torch.optim.SGD(set_trained(ours, [name for name, _ in ours.named_parameters()]), 0.05, momentum=0.9)
    loss = train_locally(
        ours, examples, shard, optimizer, PREPROCESSING,
        local_steps=5, batch_size=8, precision="fp32", generator=np.random.default_rng(3),
    )  # fmt: skip

    generator = np.random.default_rng(3)
    torch_seed(generator)
    positions = batch_positions(30, 8, 5, generator)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    losses = []
    for batch in positions:
        inputs = augmented(PREPROCESSING, examples.images[shard[batch]], generator)
        step_loss = functional.cross_entropy(plain(inputs), examples.labels[shard[batch]])
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
        losses.append(step_loss.item())
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_only_the_named_parameters_move(examples: ImageSet) -> None:
    model = model_with_random_head()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = ["blocks.3.mlp.fc2.weight", "norm.bias"]
    optimizer = torch.optim.SGD(set_trained(model, trained), 0.1)
    train_locally(
        model, examples, torch.arange(40), optimizer, PREPROCESSING,
        local_steps=2, batch_size=8, precision="fp32", generator=np.random.default_rng(0),
    )  # fmt: skip
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(trained)


def test_tf32_is_for_runs_that_ask_for_it() -> None:
    """torch multiplies in float32 and convolves in TF32 unless told otherwise."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    torch.set_float32_matmul_precision("medium")  # somebody's own setting before
    single, faster = (load(overrides={"precision": precision}) for precision in ("fp32", "tf32"))
    for build, config, expected in (
        (Workspace, faster, True), (workspace, single, False), (Workspace, faster, True), (workspace, single, False),
    ):  # fmt: skip
        build(config)
        assert [switch.allow_tf32 for switch in switches] == [expected] * 2, config.precision
    assert torch.get_float32_matmul_precision() == "highest", "torch is not left with settings that contradict"


def trained_loss(examples: ImageSet, precision: str = "fp32", rate: float = 0.05, fused: bool | None = None) -> float:
    """Mean loss of 12 steps at one precision; later steps see what earlier ones did."""
    model = model_with_random_head()
    names = [name for name, _ in model.named_parameters()]
    named = zip(names, set_trained(model, names), strict=True)
    return train_locally(
        model, examples, torch.arange(40), SparseSGDM(named, rate, momentum=0.9, fused=fused), PREPROCESSING,
        local_steps=12, batch_size=16, precision=precision, generator=np.random.default_rng(0),
    )  # fmt: skip


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
def test_half_precision_follows_fp32_within_its_resolution(
    examples: ImageSet, precision: str, tolerance: float
) -> None:
    exact, half = trained_loss(examples), trained_loss(examples, precision)
    assert half != exact
    assert half == pytest.approx(exact, rel=tolerance)
    assert abs(trained_loss(examples, rate=0.0) - exact) > 5 * tolerance * exact  # it did learn


def test_fused_kernels_follow_the_others_in_fp32_and_under_a_loss_scale(examples: ImageSet) -> None:
    assert trained_loss(examples, fused=True) == pytest.approx(trained_loss(examples), rel=1e-5)
    assert trained_loss(examples, "fp16", fused=True) == pytest.approx(trained_loss(examples, "fp16"), rel=1e-3)


def test_steps_that_overflow_fp16_are_reported_and_none_at_all_is_an_error(
    examples: ImageSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "LOSS_SCALE", 2.0**22)
    scaled = trained_loss(examples, "fp16")
    assert "steps were left out" in caplog.text
    assert math.isfinite(scaled)
    monkeypatch.setattr(training, "LOSS_SCALE", 2.0**60)
    with pytest.raises(Divergence, match="fp16"):
        trained_loss(examples, "fp16")


@pytest.mark.parametrize("batch_size", [1, 7, 40, 1000])
def test_evaluation_does_not_depend_on_its_batches(examples: ImageSet, batch_size: int) -> None:
    model = model_with_random_head()
    model.eval()
    with torch.no_grad():
        logits = model(PREPROCESSING.evaluation_inputs(examples.images))
    measured = evaluate(model, examples, PREPROCESSING, batch_size=batch_size, precision="fp32")
    assert measured.loss == pytest.approx(functional.cross_entropy(logits, examples.labels).item(), rel=1e-5)
    assert measured.accuracy == (logits.argmax(1) == examples.labels).double().mean().item()
    assert measured.examples == 40


def test_evaluation_of_nothing_is_nan() -> None:
    empty = ImageSet(torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    assert math.isnan(evaluate(model_with_random_head(), empty, PREPROCESSING, batch_size=4, precision="fp32").loss)


def test_the_head_on_the_features_gives_the_models_logits(examples: ImageSet) -> None:
    model = model_with_random_head()
    features = extract_features(model, examples, PREPROCESSING, batch_size=16, precision="fp32")
    model.eval()
    with torch.no_grad():
        logits = model(PREPROCESSING.evaluation_inputs(examples.images))
        assert features.shape == (40, 64)
        assert torch.allclose(model.head(features), logits, atol=1e-6)


def test_the_squared_loss_against_its_sum() -> None:
    scores, labels, scale = np.random.default_rng(0).normal(size=(6, 4)), np.array([0, 3, 1, 1, 2, 0]), 7.0
    expected = np.mean([
        sum((scores[row, each] / scale - (labels[row] == each)) ** 2 for each in range(4)) / 2 for row in range(6)
    ])  # fmt: skip
    found = local_loss(torch.from_numpy(scores).float(), torch.from_numpy(labels), "squared", scale)
    assert found.item() == pytest.approx(expected, rel=1e-6)
