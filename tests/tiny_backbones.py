"""Tiny models of timm's kinds that `vit_glyph` is not, on 16 x 16 pixels; importing this file tells timm of them."""

from typing import Any

from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

NAMES = ("tiny_rope", "tiny_rope_biased", "tiny_rope_mixed", "tiny_registers")
SIZES = {"patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 3, "init_values": 0.5}
DINOV3 = SIZES | {  # but for sizes and the scale of its branches, timm's vit_small_patch16_dinov3
    "dynamic_img_size": True, "qkv_bias": False, "rope_type": "dinov3", "rope_temperature": 100,
    "rope_rotate_half": True, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4,
    "use_fc_norm": False, "norm_layer": LayerNorm,
}  # fmt: skip
default_cfgs = generate_default_cfgs({
    f"{name}.none": {"input_size": (3, 16, 16), "num_classes": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3,
                     "first_conv": "patch_embed.proj", "classifier": "head"} for name in NAMES
})  # fmt: skip


@register_model
def tiny_rope(pretrained: bool = False, **kwargs: Any) -> Eva:
    return build_model_with_cfg(Eva, "tiny_rope", pretrained, **(DINOV3 | kwargs))


@register_model
def tiny_rope_biased(pretrained: bool = False, **kwargs: Any) -> Eva:
    return build_model_with_cfg(Eva, "tiny_rope_biased", pretrained, **(DINOV3 | {"qkv_bias": True} | kwargs))


@register_model
def tiny_rope_mixed(pretrained: bool = False, **kwargs: Any) -> Eva:
    own = SIZES | {"use_rot_pos_emb": True, "rope_type": "mixed", "no_embed_class": True, "global_pool": "token"}
    return build_model_with_cfg(Eva, "tiny_rope_mixed", pretrained, **(own | {"attn_type": "rope"} | kwargs))


@register_model
def tiny_registers(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    own = SIZES | {"reg_tokens": 4, "no_embed_class": True}
    return build_model_with_cfg(VisionTransformer, "tiny_registers", pretrained, **(own | kwargs))
