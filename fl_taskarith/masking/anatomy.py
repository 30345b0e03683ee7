"""Where in a vision transformer a mask lies: its density by layer and by kind of tensor."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask

KINDS = ("q", "k", "v", "proj", "mlp", "norm", "scale", "patch", "position", "token", "other")
"""Query, key and value thirds of attention; its output projection; MLP; LayerNorm; LayerScale; patch embedding;
positional embedding; class and register tokens."""

OUTSIDE = ("embedding", "norm")  # layers beside the blocks, before and after them

_KIND_PATTERNS = (
    (r"\.attn\.proj\.", "proj"),
    (r"\.mlp\.", "mlp"),
    (r"\.ls\d?\.|\.gamma", "scale"),
    (r"norm", "norm"),
    (r"^patch_embed\.", "patch"),
    (r"pos_embed", "position"),
    (r"_token$", "token"),
)


@dataclass(frozen=True)
class Part:
    """Entries of a part of the model: how many are updated, of how many."""

    updated: int
    size: int

    @property
    def density(self) -> float:
        """updated / size."""
        return self.updated / self.size

    def __add__(self, other: "Part") -> "Part":
        return Part(self.updated + other.updated, self.size + other.size)


def parts(mask: Mask) -> dict[tuple[str, str], Part]:
    """By (layer, kind): layers are "embedding", "block 0", ..., "norm"; kinds are among `KINDS`."""
    found: dict[tuple[str, str], Part] = {}
    for name, tensor in mask.tensors.items():
        layer = layer_of(name)
        for kind, entries in _by_kind(name, tensor).items():
            part = Part(int(entries.sum()), entries.numel())
            found[layer, kind] = found[layer, kind] + part if (layer, kind) in found else part
    return found


def density_by_kind(mask: Mask) -> dict[str, Part]:
    """Over all layers, in the order of `KINDS`."""
    return _grouped({kind: [] for kind in KINDS}, {key: part for key, part in parts(mask).items()}, 1)


def density_by_layer(mask: Mask) -> dict[str, Part]:
    """Over all kinds, in the model's order."""
    found = parts(mask)
    layers = {layer for layer, _ in found}
    blocks = sorted((layer for layer in layers if layer.startswith("block ")), key=lambda layer: int(layer[6:]))
    order = [layer for layer in ("embedding", *blocks, "norm") if layer in layers]
    return _grouped({layer: [] for layer in order}, found, 0)


def layer_of(name: str) -> str:
    """The layer of a parameter of timm's VisionTransformer, by its name."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return f"block {block[1]}"
    return "norm" if re.match(r"(fc_)?norm\.", name) else "embedding"


def _by_kind(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """The tensor by kind: a qkv weight [3d, d] or bias [3d] in thirds, anything else whole."""
    if ".attn.qkv." in name:
        return dict(zip("qkv", tensor.chunk(3), strict=True))
    for pattern, kind in _KIND_PATTERNS:
        if re.search(pattern, name):
            return {kind: tensor}
    return {"other": tensor}


def _grouped(groups: Mapping[str, list[Part]], found: Mapping[tuple[str, str], Part], position: int) -> dict[str, Part]:
    for key, part in found.items():
        groups[key[position]].append(part)
    return {group: sum(members, Part(0, 0)) for group, members in groups.items() if members}


def key_biases(mask: Mask) -> int:
    """Updated entries among the key biases: their gradient is zero, so a least-sensitive rule takes all of them."""
    biases = [tensor.chunk(3)[1] for name, tensor in mask.tensors.items() if name.endswith(".attn.qkv.bias")]
    return int(torch.cat(biases).sum()) if biases else 0
