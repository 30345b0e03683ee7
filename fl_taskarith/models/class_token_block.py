"""The last block of a vision transformer whose head reads the class token alone.

That block's query, projection and MLP of every other token change no score and no gradient, so they are not computed:
three quarters of the block's arithmetic.
"""

from timm.models.vision_transformer import (  # type: ignore[attr-defined]  # Attention: from timm.layers in later ones
    Attention,
    Block,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional


class ClassTokenBlock(nn.Module):
    """timm's `Block` on tokens [B, T, d] with the class token's output alone, [B, 1, d], equal to rounding.

    It shares the block's modules under their own names, so parameters keep theirs.
    """

    norm1: nn.Module
    attn: Attention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Block) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the block's output for the first of the tokens [B, T, d]: [B, 1, d]."""
        first = tokens[:, :1] + self.drop_path1(self.ls1(self._attention(self.norm1(tokens))))
        output: Tensor = first + self.drop_path2(self.ls2(self.mlp(self.norm2(first))))
        return output

    def _attention(self, tokens: Tensor) -> Tensor:
        """Attend from the class token to all tokens [B, T, d], as timm's `Attention` does: [B, 1, d]."""
        layer = self.attn
        batch, count, _ = tokens.shape
        parts = layer.qkv(tokens).view(batch, count, 3, layer.num_heads, layer.head_dim)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, T, head_dim] each
        query, key = layer.q_norm(query[:, :, :1]), layer.k_norm(key)
        if layer.fused_attn:
            dropout = layer.attn_drop.p if self.training else 0.0
            mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            mixed = layer.attn_drop(((query * layer.scale) @ key.transpose(-2, -1)).softmax(-1)) @ value
        output: Tensor = layer.proj_drop(layer.proj(mixed.transpose(1, 2).reshape(batch, 1, -1)))
        return output


def compute_class_token_only(model: VisionTransformer) -> None:
    """Cut the model's last block down to the class token where the head reads that alone; else change nothing."""
    last = model.blocks[-1]
    if model.global_pool == "token" and type(last) is Block and _is_plain(last.attn):
        model.blocks[-1] = ClassTokenBlock(last)


def _is_plain(attention: nn.Module) -> bool:
    """Whether it is timm's own attention without the gate and norm that releases after timm 1.0.15 may have."""
    added = [getattr(attention, name, None) for name in ("norm", "gate")]
    return type(attention) is Attention and all(isinstance(module, nn.Identity | None) for module in added)
