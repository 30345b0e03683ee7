import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.class_token_block import ClassTokenBlock, compute_class_token_only
from fl_taskarith.models.suffix import prefix_tokens

MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "LayerScale, no class token in the position embedding": ("vit_small_patch14_dinov2", {"init_values": 0.1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "normalised queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}),
}
PLAIN = [(name, fused) for name in MODELS for fused in (True, False)]


def model_of(architecture: str, **settings: object) -> VisionTransformer:
    torch.manual_seed(0)
    size = 56 if "14" in architecture else 64
    model: VisionTransformer = timm.create_model(architecture, num_classes=5, img_size=size, depth=3, **settings)
    for parameter in model.parameters():  # norms, scales and biases too, which start as ones and zeros
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(("name", "fused"), PLAIN)
def test_scores_and_gradients_are_those_of_the_whole_block(name: str, fused: bool) -> None:
    architecture, settings = MODELS[name]
    whole, cut = (model_of(architecture, **settings) for _ in range(2))
    compute_class_token_only(cut)
    assert isinstance(cut.blocks[-1], ClassTokenBlock)
    cut.blocks[-1].attn.fused_attn = fused
    images, labels = torch.randn(4, 3, *whole.patch_embed.img_size), torch.tensor([0, 1, 2, 4])
    gradients = []
    for model in (whole, cut):
        scores = model(images)
        nn.functional.cross_entropy(scores, labels).backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()} | {"scores": scores.detach()})
    assert list(gradients[0]) == list(gradients[1]), "parameters keep their names and their order"
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-3, atol=1e-5, msg=key)


def test_a_head_on_the_mean_of_all_tokens_gets_all_of_them() -> None:
    model = model_of("vit_tiny_patch16_224", global_pool="avg", class_token=False)
    compute_class_token_only(model)
    assert not isinstance(model.blocks[-1], ClassTokenBlock)


def test_a_kind_of_block_or_attention_that_is_not_known_stays_as_it_is() -> None:
    for change in ("block", "attention"):
        model = model_of("vit_tiny_patch16_224")
        changed = model.blocks[-1] if change == "block" else model.blocks[-1].attn
        changed.__class__ = type("Other", (type(changed),), {})
        compute_class_token_only(model)
        assert not isinstance(model.blocks[-1], ClassTokenBlock), change


def test_a_built_model_computes_one_token_in_its_last_block_and_exports_as_timm_has_it(tmp_path) -> None:
    model = build_model("vit_glyph", 10, 16, "pretrained", download=False, seed=0)
    images = torch.randn(2, 3, 16, 16)
    assert prefix_tokens(model, images, 3).shape == (2, 17, 64)
    assert prefix_tokens(model, images, 4).shape == (2, 1, 64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model("vit_glyph", num_classes=10, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    torch.testing.assert_close(model.eval().forward_features(images)[:, 0], loaded.forward_features(images)[:, 0])
