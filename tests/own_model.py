"""An architecture of one's own: `model = "own_model:vit_own"`."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer


@register_model
def vit_own(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    own = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "vit_own", pretrained, **own, **settings)
    return model
