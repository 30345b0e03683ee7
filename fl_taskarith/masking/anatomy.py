"""Where in a vision transformer a mask lies: its density by layer and by kind of tensor, and masks made by kind."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask

KINDS = ("q", "k", "v", "proj", "mlp", "norm", "scale", "patch", "position", "token", "other")
"""Query, key and value thirds of attention; its output projection; MLP; LayerNorm; LayerScale; patch embedding;
positional embedding; class and register tokens."""

_KIND_PATTERNS = (
    (r"\.attn\.q_", "q"),  # timm's Eva: q_bias, q_proj.weight; q_norm.weight
    (r"\.attn\.k_", "k"),
    (r"\.attn\.v_", "v"),
    (r"\.attn\.proj\.", "proj"),
    (r"\.mlp\.", "mlp"),
    (r"\.ls\d?\.|\.gamma", "scale"),
    (r"norm", "norm"),
    (r"^patch_embed\.", "patch"),
    (r"pos_embed|^rope\.", "position"),
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
    """Return the entries by (layer, kind): layers are "embedding", "block 0", ..., "norm"; kinds are among `KINDS`."""
    entries: dict[tuple[str, str], Part] = {}
    for name, tensor in mask.tensors.items():
        layer = layer_of(name)
        for kind, part in by_kind(name, tensor).items():
            entries[layer, kind] = entries.get((layer, kind), Part(0, 0)) + Part(int(part.sum()), part.numel())
    return entries


def density_by_kind(mask: Mask) -> dict[str, Part]:
    """Return the entries of each kind over all layers, in the order of `KINDS`."""
    entries = parts(mask).items()
    totals = {kind: sum((part for (_, of), part in entries if of == kind), Part(0, 0)) for kind in KINDS}
    return {kind: part for kind, part in totals.items() if part.size}


def density_by_layer(mask: Mask) -> dict[str, Part]:
    """Return the entries of each layer over all kinds, in the model's order."""
    totals: dict[str, Part] = {}
    for (layer, _), part in parts(mask).items():
        totals[layer] = totals.get(layer, Part(0, 0)) + part
    blocks = sorted((layer for layer in totals if layer.startswith("block ")), key=lambda layer: int(layer[6:]))
    return {layer: totals[layer] for layer in ("embedding", *blocks, "norm") if layer in totals}


def of_kinds(mask: Mask, kinds: Collection[str]) -> Mask:
    """Return the mask with those entries alone that are of one of `kinds`, in the same shapes."""
    chosen = {name: tensor.clone() for name, tensor in mask.tensors.items()}
    for name, tensor in chosen.items():
        for kind, part in by_kind(name, tensor).items():
            part.logical_and_(torch.tensor(kind in kinds, device=part.device))
    return Mask(chosen)


def redrawn_by_kind(mask: Mask, generator: np.random.Generator) -> Mask:
    """Return a mask of the same shapes that updates as many entries of each kind over all layers, drawn at random."""
    drawn = {name: torch.zeros_like(tensor) for name, tensor in mask.tensors.items()}
    gathered: defaultdict[str, list[tuple[Tensor, int]]] = defaultdict(list)
    for name, tensor in drawn.items():
        updated = by_kind(name, mask.tensors[name])
        for kind, part in by_kind(name, tensor).items():
            gathered[kind].append((part, int(updated[kind].sum())))
    for pieces in gathered.values():
        entries = torch.zeros(sum(part.numel() for part, _ in pieces), dtype=torch.bool)
        count = sum(updated for _, updated in pieces)
        entries[torch.from_numpy(generator.choice(len(entries), count, replace=False, shuffle=False))] = True
        for (part, _), values in zip(pieces, entries.split([part.numel() for part, _ in pieces]), strict=True):
            part.copy_(values.view(part.shape))
    return Mask(drawn)


def layer_of(name: str) -> str:
    """Return the layer of a parameter of a timm vision transformer, by its name."""
    block = re.match(r"blocks\.([0-9]{1,9})\.", name)
    if block:
        return f"block {block[1]}"
    return "norm" if re.match(r"(fc_)?norm\.", name) else "embedding"


def by_kind(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """Return the tensor by kind: a qkv weight [3d, d] or bias [3d] in thirds, any other tensor whole."""
    if ".attn.qkv." in name and tensor.dim() and len(tensor) % 3 == 0:
        return dict(zip("qkv", tensor.chunk(3), strict=True))
    return {next((kind for pattern, kind in _KIND_PATTERNS if re.search(pattern, name)), "other"): tensor}


def key_biases(mask: Mask) -> int:
    """Return the number of updated key biases: their gradient is zero, so a least-sensitive rule keeps all of them."""
    thirds = [by_kind(name, tensor) for name, tensor in mask.tensors.items() if name.endswith(".attn.qkv.bias")]
    return sum(int(kinds["k"].sum()) for kinds in thirds if "k" in kinds)
