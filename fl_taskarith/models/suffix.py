"""A vision transformer cut in two: a frozen prefix, computed once per image, and the suffix that is trained."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Suffix(nn.Module):
    """The last blocks of a model, its final norm and head, on tokens in place of images.

    Shares the model's modules under the model's own names ("blocks.10.attn.qkv.weight"), so parameters set, trained or
    replaced by name in one are those of the other. Offers what training, evaluation and scoring use of a model.
    """

    def __init__(self, model: VisionTransformer, first_block: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {str(number): block for number, block in enumerate(model.blocks) if number >= first_block}
        )
        self.norm, self.fc_norm, self.head_drop, self.head = model.norm, model.fc_norm, model.head_drop, model.head
        self.num_features = model.num_features
        self._pool = model.pool

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, d] as they enter the first block of the suffix, to normalised tokens [B, T, d]."""
        for block in self.blocks.values():
            tokens = block(tokens)
        normalised: Tensor = self.norm(tokens)
        return normalised

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's: pooled and normalised features [B, d], or logits [B, classes]."""
        features: Tensor = self.head_drop(self.fc_norm(self._pool(tokens)))
        if pre_logits:
            return features
        logits: Tensor = self.head(features)
        return logits

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, d] to logits [B, classes]."""
        return self.forward_head(self.forward_features(tokens))


@torch.no_grad()
def prefix_tokens(model: VisionTransformer, inputs: Tensor, first_block: int) -> Tensor:
    """What enters block `first_block` for model inputs [B, 3, S, S]: tokens [B, T, d]."""
    model.eval()
    tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(inputs))))
    for block in model.blocks[:first_block]:
        tokens = block(tokens)
    return tokens


def prefix_parameters(model: VisionTransformer, first_block: int) -> dict[str, Tensor]:
    """The parameters that `prefix_tokens` depends on, by name."""
    suffix = {f"blocks.{number}." for number in range(first_block, len(model.blocks))}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not name.startswith((*suffix, "norm.", "fc_norm.", "head."))
    }
