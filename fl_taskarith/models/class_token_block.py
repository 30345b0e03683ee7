"""The last block of a vision transformer whose head reads the class token alone.

The output projection and the MLP of every other token change no score and no gradient, so they are not computed: three
quarters of the block's arithmetic. timm makes queries, keys and values in one product, so the other tokens' queries are
computed and dropped.
"""

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat  # type: ignore[attr-defined]
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import (  # type: ignore[attr-defined]  # Attention: from timm.layers in later ones
    Attention,
    Block,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional


class ClassTokenBlock(nn.Module):
    """timm's `Block` or `EvaBlock` on tokens [B, T, d] with the class token's output alone, [B, 1, d], to rounding.

    It shares the block's modules and parameters under their own names, so parameters keep theirs.
    """

    norm1: nn.Module
    attn: Any  # timm's, of either kind
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Block | EvaBlock) -> None:
        super().__init__()
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in block.named_children():
            self.add_module(name, module)

    def forward(
        self, tokens: Tensor, rope: Tensor | None = None, attn_mask: None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the block's output for the first of the tokens [B, T, d]: [B, 1, d].

        Args:
            rope: rotary positions of the patches as timm's `EvaBlock` takes them, [patches, 2 · head_dim] in its shape.
            attn_mask, is_causal: which timm passes and leaves unset.
        """
        first = tokens[:, :1] + self.drop_path1(self._scaled(1, self._attention(self.norm1(tokens), rope)))
        output: Tensor = first + self.drop_path2(self._scaled(2, self.mlp(self.norm2(first))))
        return output

    def _scaled(self, branch: int, tokens: Tensor) -> Tensor:
        """Return the branch's tokens [B, 1, d] times its LayerScale: a module in `Block`, a parameter in `EvaBlock`."""
        if isinstance(self.attn, Attention):
            scaled: Tensor = getattr(self, f"ls{branch}")(tokens)
            return scaled
        gamma: Tensor | None = getattr(self, f"gamma_{branch}", None)
        return tokens if gamma is None else gamma * tokens

    def _attention(self, tokens: Tensor, rope: Tensor | None) -> Tensor:
        """Attend from the class token to all tokens [B, T, d], as timm's attention does: [B, 1, d]."""
        layer = self.attn
        batch, count, _ = tokens.shape
        parts = _projected(layer, tokens).view(batch, count, 3, layer.num_heads, layer.head_dim)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, head_dim] each
        query, key = layer.q_norm(query[:, :, :1]), layer.k_norm(key)
        if rope is not None:  # the class token has no position
            before, patches = key.split([layer.num_prefix_tokens, count - layer.num_prefix_tokens], dim=2)
            key = torch.cat([before, apply_rot_embed_cat(patches, rope, half=layer.rotate_half)], 2).type_as(value)
        if layer.fused_attn:
            dropout = layer.attn_drop.p if self.training else 0.0
            mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            mixed = layer.attn_drop(((query * layer.scale) @ key.transpose(-2, -1)).softmax(-1)) @ value
        output: Tensor = layer.proj_drop(layer.proj(mixed.transpose(1, 2).reshape(batch, 1, -1)))
        return output


def _projected(layer: Any, tokens: Tensor) -> Tensor:
    """Return queries, keys and values of tokens [B, T, d] side by side, [B, T, 3d]."""
    if layer.qkv is None:
        return torch.cat([layer.q_proj(tokens), layer.k_proj(tokens), layer.v_proj(tokens)], -1)
    projected: Tensor = layer.qkv(tokens)
    if getattr(layer, "q_bias", None) is None:
        return projected
    return projected + torch.cat([layer.q_bias, layer.k_bias, layer.v_bias])


def compute_class_token_only(model: VisionTransformer | Eva) -> None:
    """Cut the model's last block down to the class token where the head reads that alone; else change nothing."""
    last: Any = model.blocks[-1]
    kinds = (type(last), type(last.attn))
    if model.global_pool == "token" and kinds in KNOWN and _is_plain(last.attn):
        model.blocks[-1] = ClassTokenBlock(last)


KNOWN = ((Block, Attention), (EvaBlock, EvaAttention))


def _is_plain(attention: nn.Module) -> bool:
    """Whether timm's own attention is without the gate and norm that some releases and models have."""
    added = [getattr(attention, name, None) for name in ("norm", "gate")]
    complete = isinstance(attention, Attention) or hasattr(attention, "rotate_half")  # it has from timm 1.0.20 on
    return complete and all(isinstance(module, nn.Identity | None) for module in added)
