"""A vision transformer cut in two: a frozen prefix, computed once per image, and the suffix that is trained."""

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Backbone = VisionTransformer | Eva
"""timm's vision transformers: Eva's blocks take rotary positions beside the tokens (EVA-02, DINOv3, EUPE)."""


class Suffix(nn.Module):
    """The last blocks of a model, its final norm and head, on tokens in place of images.

    It shares the model's modules under their own names ("blocks.10.attn.qkv.weight"), so parameters set, trained or
    replaced by name in one are those of the other.
    """

    def __init__(self, model: Backbone, first_block: int) -> None:
        super().__init__()
        with torch.no_grad():  # rotary positions are the same for all images
            image = torch.zeros(1, 3, *model.patch_embed.img_size, device=next(model.parameters()).device)
            for number, rope in enumerate(_embedded(model, image)[1]):
                self.register_buffer(f"rope{number}", rope, persistent=False)
        self.blocks = nn.ModuleDict(
            {str(number): block for number, block in enumerate(model.blocks) if number >= first_block}
        )
        self.norm, self.fc_norm, self.head_drop, self.head = model.norm, model.fc_norm, model.head_drop, model.head
        self.num_features = model.num_features
        self._pool = model.pool

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Return normalised tokens [B, T, d] from the tokens [B, T, d] that enter the first block of the suffix."""
        for number, block in self.blocks.items():
            rope = getattr(self, f"rope{number}")
            tokens = block(tokens) if rope is None else block(tokens, rope=rope)
        normalised: Tensor = self.norm(tokens)
        return normalised

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, classes], or as `pre_logits` the pooled features [B, d], as timm's models do."""
        features: Tensor = self.head_drop(self.fc_norm(self._pool(tokens)))
        if pre_logits:
            return features
        logits: Tensor = self.head(features)
        return logits

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, classes] of tokens [B, T, d]."""
        return self.forward_head(self.forward_features(tokens))


@torch.no_grad()
def prefix_tokens(model: Backbone, inputs: Tensor, first_block: int) -> Tensor:
    """Return the tokens [B, T, d] that enter block `first_block` for model inputs [B, 3, S, S]."""
    model.eval()
    tokens, positions = _embedded(model, inputs)
    for block, rope in zip(model.blocks[:first_block], positions, strict=False):
        tokens = block(tokens) if rope is None else block(tokens, rope=rope)
    return tokens


def _embedded(model: Backbone, inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Return the tokens [B, T, d] that enter the first block, and what each block takes as `rope`, in timm's shape."""
    embedded = model._pos_embed(model.patch_embed(inputs))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    if rope is not None and getattr(model, "rope_mixed", False):
        return model.norm_pre(tokens), list(rope)
    return model.norm_pre(tokens), [rope] * len(model.blocks)


def prefix_parameters(model: Backbone, first_block: int) -> dict[str, Tensor]:
    """Return the parameters that `prefix_tokens` depends on, by name, each of its own shape."""
    suffix = {f"blocks.{number}." for number in range(first_block, len(model.blocks))}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not name.startswith((*suffix, "norm.", "fc_norm.", "head."))
    }
