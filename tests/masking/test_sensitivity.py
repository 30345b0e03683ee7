"""Sensitivity: per-example gradients against one backward pass per example, and against closed forms."""

import itertools

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

import fl_taskarith.models.vit_glyph
from fl_taskarith.config.fields import rules
from fl_taskarith.masking.sensitivity import saliency_sums, sensitivity_sums
from fl_taskarith.models.backbone import HEAD_PARAMETERS

assert fl_taskarith.models.vit_glyph  # registers the model with timm


def small_model(num_classes: int = 4, **architecture: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_glyph", num_classes=num_classes, embed_dim=16, depth=2, num_heads=2, init_values=0.1, **architecture
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def as_inputs(images: Tensor) -> Tensor:
    return images.float() / 128 - 1


def examples(count: int, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, num_classes, (count,), generator=generator)


def backbone(model: VisionTransformer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if name not in HEAD_PARAMETERS}


def brute_force(
    model: VisionTransformer, images: Tensor, targets: Tensor, labels: str, score: str, draws: np.ndarray
) -> dict[str, Tensor]:
    """One example, one label and one backward pass at a time."""
    model.eval()
    names = [name for name, _ in model.named_parameters() if name not in HEAD_PARAMETERS]
    sums = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.float64) for name in names}
    for image, target, draw in zip(images, targets, draws, strict=True):
        logits = model(as_inputs(image[None]))[0]
        probabilities = logits.detach().double().softmax(0)
        sampled = int(np.searchsorted(probabilities.cumsum(0).numpy(), draw, side="right"))
        chosen = {
            "sampled": {sampled: 1.0},
            "true": {int(target): 1.0},
            "expected": {label: float(share) for label, share in enumerate(probabilities)},
        }[labels]
        for label, share in chosen.items():
            objective = logits[label] if score == "logit" else logits.log_softmax(0)[label]
            gradients = torch.autograd.grad(objective, [model.get_parameter(name) for name in names], retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] += share * gradient.double() ** 2
    return sums


@pytest.mark.parametrize(
    ("labels", "score"), list(itertools.product(rules()["fisher-labels"].choices, rules()["fisher-score"].choices))
)
def test_sensitivity_equals_one_backward_pass_per_example(labels: str, score: str) -> None:
    model = small_model()
    images, targets = examples(7)
    found = sensitivity_sums(
        model, backbone(model), images, targets, as_inputs,
        labels=labels, score=score, generator=np.random.default_rng(3), memory=1e-3,
    )  # fmt: skip
    expected = brute_force(model, images, targets, labels, score, np.random.default_rng(3).random(7))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.max().item()
        assert (found[name] - value).abs().max().item() <= 1e-5 * max(scale, 1e-12) + 1e-12, name
        assert scale > 0 or name.endswith("qkv.bias"), name


@pytest.mark.parametrize("memory", [1e-9, 1.0], ids=["an example at a time", "all at once"])
def test_saliency_is_the_size_of_the_mean_gradient_of_true_labels_times_the_weight(memory: float) -> None:
    model = small_model()
    images, targets = examples(7)
    weights = backbone(model)
    found = saliency_sums(model, weights, images, targets, as_inputs, memory)
    loss = functional.cross_entropy(model.eval()(as_inputs(images)), targets)
    expected = torch.autograd.grad(loss, [model.get_parameter(name) for name in weights])
    for (name, value), gradient in zip(weights.items(), expected, strict=True):
        assert torch.allclose(found[name] / 7, (gradient * value).abs(), rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    "architecture",
    [{"norm_layer": "rmsnorm"}, {"qk_norm": True}, {"reg_tokens": 2, "global_pool": "avg"}],
    ids=lambda architecture: next(iter(architecture)),
)
def test_other_architectures_are_scored_as_exactly(architecture: dict[str, object]) -> None:
    """RMSNorm has no rule of its own and goes through vmap; the others have parameters of other shapes."""
    model = small_model(**architecture)
    images, targets = examples(5)
    found = sensitivity_sums(
        model, backbone(model), images, targets, as_inputs,
        labels="expected", score="log-prob", generator=np.random.default_rng(3), memory=1.0,
    )  # fmt: skip
    expected = brute_force(model, images, targets, "expected", "log-prob", np.random.default_rng(3).random(5))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.max().item()
        assert (found[name] - value).abs().max().item() <= 2e-5 * max(scale, 1e-12) + 1e-12, name


@pytest.mark.parametrize("left_out", ["bias", "weight"])
def test_scoring_a_part_of_the_parameters_scores_the_same_model(left_out: str) -> None:
    """A LayerNorm whose bias (or weight) is not scored is still the same function."""
    model = small_model()
    images, targets = examples(4)
    weights = {name: value for name, value in backbone(model).items() if not name.endswith(left_out)}
    found = sensitivity_sums(
        model, weights, images, targets, as_inputs,
        labels="sampled", score="log-prob", generator=np.random.default_rng(3), memory=1.0,
    )  # fmt: skip
    expected = brute_force(model, images, targets, "sampled", "log-prob", np.random.default_rng(3).random(4))
    for name, value in found.items():
        scale = expected[name].max().item()
        assert (value - expected[name]).abs().max().item() <= 1e-5 * max(scale, 1e-12) + 1e-12, name


def test_the_square_of_a_batch_gradient_is_something_else() -> None:
    """What the definition warns of: the two rank weights differently, so the test above can tell them apart."""
    model = small_model()
    images, targets = examples(16)
    weights = backbone(model)
    fisher = sensitivity_sums(
        model, weights, images, targets, as_inputs,
        labels="true", score="log-prob", generator=np.random.default_rng(0), memory=1.0,
    )  # fmt: skip
    model.eval()
    loss = functional.cross_entropy(model(as_inputs(images)), targets)
    batch = torch.autograd.grad(loss, [model.get_parameter(name) for name in weights])
    flat = torch.cat([fisher[name].flatten() for name in weights])
    squared = torch.cat([gradient.flatten() ** 2 for gradient in batch])
    kept = [set(values.topk(len(flat) // 2).indices.tolist()) for values in (flat, squared)]
    assert len(kept[0] & kept[1]) < 0.9 * len(kept[0])


class SoftmaxRegression(torch.nn.Module):
    """Scores = flattened inputs · weightᵀ + bias."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(features, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.flatten(1))


@pytest.mark.parametrize("labels", ["true", "expected"])
def test_softmax_regression_has_a_closed_form(labels: str) -> None:
    """∂ log p_y / ∂W_cj = (1[c = y] − p_c) x_j, so F_cj = Σ_x x_j² p_c (1 − p_c) when y is drawn from p."""
    torch.manual_seed(0)
    model = SoftmaxRegression(3 * 16 * 16, 5)
    images, targets = examples(9, num_classes=5)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = sensitivity_sums(
        model, weights, images, targets, as_inputs,
        labels=labels, score="log-prob", generator=np.random.default_rng(0), memory=1.0,
    )  # fmt: skip
    inputs = as_inputs(images).flatten(1).double()
    p = model(as_inputs(images)).detach().double().softmax(1)
    share = p * (1 - p) if labels == "expected" else (functional.one_hot(targets, 5) - p) ** 2
    assert torch.allclose(found["layer.weight"].double(), share.T @ inputs**2, rtol=1e-4)
    assert torch.allclose(found["layer.bias"].double(), share.sum(0), rtol=1e-4)


def test_sampled_labels_average_to_the_expected_ones() -> None:
    model = small_model()
    image, target = (part.repeat(600, *[1] * (part.ndim - 1)) for part in examples(1))
    weights = {"norm.weight": backbone(model)["norm.weight"]}

    def scored(labels: str, count: int) -> Tensor:
        sums = sensitivity_sums(
            model, weights, image[:count], target[:count], as_inputs,
            labels=labels, score="log-prob", generator=np.random.default_rng(5), memory=1.0,
        )  # fmt: skip
        return sums["norm.weight"] / count

    assert torch.allclose(scored("sampled", 600), scored("expected", 1), rtol=0.25)


def test_memory_sets_the_chunk_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    images, targets = examples(12)
    chunks: list[list[int]] = []
    results = []
    for memory in (1e-9, 1.0):
        chunks.append([])

        def noted(part: Tensor) -> Tensor:
            chunks[-1].append(len(part))
            return as_inputs(part)

        sums = sensitivity_sums(
            model, backbone(model), images, targets, noted,
            labels="sampled", score="log-prob", generator=np.random.default_rng(1), memory=memory,
        )  # fmt: skip
        results.append(sums)
    assert max(chunks[0]) == 1
    assert max(chunks[1]) == 12
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-10), name


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = small_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = [block.attn.fused_attn for block in model.blocks]
    images, targets = examples(3)
    sensitivity_sums(
        model, backbone(model), images, targets, as_inputs,
        labels="true", score="logit", generator=np.random.default_rng(0), memory=1.0,
    )  # fmt: skip
    assert model.training
    assert [block.attn.fused_attn for block in model.blocks] == fused
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
