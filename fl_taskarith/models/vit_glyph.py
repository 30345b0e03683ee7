"""`vit_glyph`: a tiny ViT for 8x8 digits, shipped with weights pretrained on letters (see `glyph_pretraining`).

Importing this module adds the architecture to timm's registry, so that `timm.create_model("vit_glyph", ...)` works.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from fl_taskarith.storage.paths import shipped_file

VIT_GLYPH_WEIGHTS: Path = shipped_file("models/vit_glyph.safetensors")
"""The pretrained backbone, without a classifier head, in timm's key layout."""

# timm looks this up by its exact name. `file` makes pretrained=True read the shipped weights: there is no address to
# download from. `num_classes` 0 says that the file holds no head, so timm initialises one.
default_cfgs = generate_default_cfgs(
    {
        "vit_glyph.letters": {
            "file": str(VIT_GLYPH_WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 16, 16),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_glyph(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the ViT: 16x16 RGB in 4x4 patches, width 64, 4 blocks of 4 heads, class-token pooling, 0.2M parameters.

    Input is [N, 3, 16, 16] scaled to [-1, 1] (mean 0.5, std 0.5); output is [N, num_classes], or the normalised
    class token [N, 64] with `num_classes=0`. `kwargs` override the architecture, as for any timm model.

    Raises:
        FileNotFoundError: `pretrained` is true and the shipped weights are gone.
    """
    architecture = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 64, "depth": 4, "num_heads": 4}
    options: dict[str, Any] = {**architecture, "global_pool": "token", **kwargs}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_glyph", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options
    )
    return model
