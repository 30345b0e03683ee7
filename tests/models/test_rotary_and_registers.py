"""Every feature of a run, on models with rotary positions, biases without a key's, and register tokens."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny_backbones
import torch
from conftest import final_weights, numbers
from masking.test_sensitivity import as_inputs, backbone, brute_force, examples
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from fl_taskarith import simulate
from fl_taskarith.client import cohort
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import WeightsError
from fl_taskarith.masking.anatomy import density_by_kind, key_biases
from fl_taskarith.masking.mask import Mask
from fl_taskarith.masking.per_example import plain_attention
from fl_taskarith.masking.sensitivity import sensitivity_sums
from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.class_token_block import ClassTokenBlock
from fl_taskarith.models.exported import read_exported
from fl_taskarith.models.suffix import Backbone, Suffix, prefix_parameters, prefix_tokens
from fl_taskarith.models.weights import load_weights
from fl_taskarith.training.stacked import train_stacked

DINO = ("tiny_rope", "tiny_rope_biased", "tiny_registers")  # whose last block computes the class token alone
every_model = pytest.mark.parametrize("name", tiny_backbones.NAMES)
few_models = pytest.mark.parametrize(
    "name",
    [
        "tiny_rope_biased",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiny_rope", "tiny_rope_mixed", "tiny_registers")),
    ],
)


def randomised(model: nn.Module) -> None:
    """Give norms, scales and biases other values than ones and zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))


def built(name: str) -> Backbone:
    model = build_model(name, 4, 16, "none", download=False, seed=0)
    randomised(model)
    return model.eval()


def of_timm(name: str, model: nn.Module) -> nn.Module:
    whole = timm.create_model(name, num_classes=4, img_size=16, global_pool="token")
    whole.load_state_dict(model.state_dict())
    return whole.eval()


@pytest.mark.parametrize(("name", "fused"), list(itertools.product(tiny_backbones.NAMES, [True, False])))
def test_scores_and_gradients_are_those_of_timms_model(name: str, fused: bool) -> None:
    model = built(name)
    assert isinstance(model.blocks[-1], ClassTokenBlock) == (name in DINO)
    whole = of_timm(name, model)
    images, labels, gradients = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 3]), []
    for each in (whole, model):
        for module in each.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        scores = each(images)
        nn.functional.cross_entropy(scores, labels).backward()
        gradients.append({key: value.grad for key, value in each.named_parameters()} | {"scores": scores.detach()})
    assert list(gradients[0]) == list(gradients[1]), "parameters keep their names and their order"
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-3, atol=1e-5, msg=key)


def test_the_positions_of_patches_matter() -> None:
    model, image = built("tiny_rope"), torch.randn(1, 3, 16, 16)
    swapped = torch.cat([image[..., 4:8], image[..., :4], image[..., 8:]], -1)
    assert not torch.allclose(model(image), model(swapped), atol=1e-4)


@every_model
def test_prefix_and_suffix_are_the_model(name: str) -> None:
    model, inputs = built(name), torch.randn(3, 3, 16, 16)
    for first in range(4):
        suffix = Suffix(model, first)
        tokens = prefix_tokens(model, inputs, first)
        assert torch.equal(suffix(tokens), model(inputs))
        assert not prefix_parameters(model, first).keys() & dict(suffix.named_parameters()).keys()
    assert suffix.state_dict().keys() <= model.state_dict().keys()


@every_model
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "suffix"])
def test_scores_of_a_batch_equal_one_backward_pass_per_example(name: str, cached: bool) -> None:
    model = built(name)
    images, targets = examples(5)
    expected = brute_force(model, images, targets, "true", "log-prob", np.zeros(5))
    network, weights, inputs_of = model, backbone(model), as_inputs
    if cached:
        network = Suffix(model, 2)
        names = [key for key, _ in network.named_parameters() if not key.startswith("head")]
        weights, inputs_of = {key: weights[key] for key in names}, lambda part: prefix_tokens(model, as_inputs(part), 2)
    found = sensitivity_sums(
        network, weights, images, targets, inputs_of,
        labels="true", score="log-prob", generator=np.random.default_rng(0), memory=1e-3,
    )  # fmt: skip
    assert found.keys() == weights.keys()
    for key, value in found.items():
        scale = expected[key].max().item()
        assert (value - expected[key]).abs().max().item() <= 2e-5 * scale + 1e-12, key
        assert scale > 0, key


def test_a_layer_whose_product_timm_takes_itself_is_scored_too() -> None:
    model = built("tiny_rope_biased")
    for block in model.blocks[:-1]:
        block.attn.qkv_bias_separate = False
    images, targets = examples(3)
    found = sensitivity_sums(
        model, backbone(model), images, targets, as_inputs,
        labels="true", score="log-prob", generator=np.random.default_rng(0), memory=1.0,
    )  # fmt: skip
    expected = brute_force(model, images, targets, "true", "log-prob", np.zeros(3))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key].float(), rtol=1e-4, atol=1e-10, msg=key)


def test_kinds_of_tensors_are_told() -> None:
    weights = backbone(built("tiny_rope_biased"))
    mask = Mask({name: torch.ones(value.shape, dtype=torch.bool) for name, value in weights.items()})
    sizes = {kind: part.size for kind, part in density_by_kind(mask).items()}
    assert sizes["q"] == sizes["v"] == 3 * (32 * 32 + 32)
    assert sizes["k"] == 3 * 32 * 32
    assert key_biases(mask) == 0
    assert sizes["scale"] == 3 * 2 * 32
    assert sizes["token"] == 5 * 32
    assert not {"other", "position"} & sizes.keys()


@pytest.fixture
def federation(quick_config: Config, tmp_path: Path) -> Config:
    return dataclasses.replace(
        quick_config, weights="none", num_rounds=2, train_subset=100, participation=0.4, density=0.3,
        mask_rule="least-sensitive", calibration_size=10, calibration_rounds=1, trainable_blocks=2,
        data_dir=str(tmp_path / "data"), augmentation="none", learning_rate=0.1, ridge_lambda=100.0,
        logit_scale=1.0,
    )  # fmt: skip


def close(mine: list[dict[str, object]], theirs: list[dict[str, object]]) -> None:
    for row, other in zip(mine, theirs, strict=True):
        for column in ("train_loss", "val_loss", "test_loss"):
            if other[column] is not None:
                assert row[column] == pytest.approx(other[column], rel=1e-5), (row["round"], column)


@few_models
def test_cached_tokens_and_clients_at_once_change_no_number(
    name: str, federation: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts: list[int] = []

    def counted(*given: object, **named: object) -> list[float]:
        losses = train_stacked(*given, **named)
        cohorts.append(len(losses))
        return losses

    monkeypatch.setattr(cohort, "train_stacked", counted)
    plain = simulate(federation, model=name)
    cached = simulate(federation, model=name, prefix_cache="float32")
    assert not cohorts
    together = simulate(federation, model=name, clients_at_once=0)
    assert cohorts == [4, 4]
    close(numbers(cached.folder), numbers(plain.folder))
    close(numbers(together.folder), numbers(plain.folder))


def test_inputs_of_all_layers_are_seen(federation: Config) -> None:
    """The strategies that weigh entries by them need those of a layer whose biases timm adds apart."""
    run = simulate(federation, model="tiny_rope_biased", strategy="gram-anchored", num_rounds=1)
    assert run.rows[-1]["test_loss"] is not None


@few_models
def test_an_exported_model_has_the_bits_of_the_run(name: str, federation: Config) -> None:
    run = simulate(federation, model=name)
    exported, transform, classes = run.model()
    state = final_weights(run.folder)
    assert exported.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in exported.state_dict().items())
    model = build_model(name, len(classes), 16, str(run.folder / "model.safetensors"), download=False, seed=1)
    with torch.no_grad():
        model.head.load_state_dict({"weight": state["head.weight"], "bias": state["head.bias"]})
    images = transform(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    torch.testing.assert_close(exported(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    assert read_exported(run.folder / "model.safetensors").classes == classes


def dinov3_state(model: Eva, key_bias: float) -> dict[str, Tensor]:
    """Spell as Meta's files do."""
    state: dict[str, Tensor] = {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 32)}
    for name, value in model.state_dict().items():
        name = name.replace("gamma_", "ls").replace("reg_token", "storage_tokens")
        if name.endswith("q_bias"):
            other = model.state_dict()[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.full((32,), key_bias), other])
            state[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(96)
        elif not name.endswith("v_bias") and not name.startswith("head"):
            state[f"{name}.gamma" if ".ls" in name else name] = value
    return state


HUGGING_FACE = {
    r"^(cls_token|reg_token)$": r"embeddings.\1", "reg_token": "register_tokens", r"^blocks": "layer",
    r"patch_embed\.proj": "embeddings.patch_embeddings", r"gamma_([12])": r"layer_scale\1.lambda1",
    r"attn\.([qv])_bias": r"attention.\1_proj.bias", r"attn\.proj": "attention.o_proj",
    "fc1": "up_proj", "fc2": "down_proj",
}  # fmt: skip


def hugging_face_state(model: Eva) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {"embeddings.mask_token": torch.zeros(1, 1, 32)}
    for name, value in backbone(model).items():
        for pattern, replacement in HUGGING_FACE.items():
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {name.replace("attn.qkv", f"attention.{letter}_proj"): part for letter, part in parts}
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("spelling", ["timm", "Meta", "Hugging Face"])
@pytest.mark.parametrize("name", ["tiny_rope", "tiny_rope_biased"])
def test_weights_are_read_as_others_write_them(name: str, spelling: str, tmp_path: Path) -> None:
    source = built(name)
    spelt = {"Meta": dinov3_state(source, 3.0), "Hugging Face": hugging_face_state(source)}
    state = spelt.get(spelling, source.state_dict())
    if spelling == "Meta" and name == "tiny_rope":
        state |= {f"blocks.{number}.attn.qkv.bias": torch.zeros(96) for number in range(3)}
    save_file({key: value.contiguous().clone() for key, value in state.items()}, tmp_path / "weights.safetensors")
    model = build_model(name, 4, 16, "none", download=False, seed=5)
    load_weights(model, tmp_path / "weights.safetensors")
    for key, value in source.state_dict().items():
        assert key.startswith("head") or torch.equal(model.state_dict()[key], value), key


def test_biases_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    save_file(dinov3_state(built("tiny_rope_biased"), 0.0), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected: blocks\.0\.attn\.qkv\.bias"):
        load_weights(build_model("tiny_rope", 4, 16, "none", False, 0), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="vit_small_patch16_dinov3"):
        load_weights(build_model("tiny_registers", 4, 16, "none", False, 0), tmp_path / "weights.safetensors")


def test_the_models_that_are_meant_are_built() -> None:
    for name in (
        "vit_small_patch16_dinov3",
        "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
        "vit_small_patch14_reg4_dinov2",
    ):
        if not timm.is_model(name):
            pytest.skip(f"this timm knows no {name}")
        size = 28 if "14" in name else 32
        model = build_model(name, 3, size, "none", download=False, seed=0)
        assert isinstance(model.blocks[-1], ClassTokenBlock)
        with plain_attention(model), torch.no_grad():
            assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)
