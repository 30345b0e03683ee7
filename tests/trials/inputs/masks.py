"""Mask files: sound ones with bytes changed, and safetensors files of any names, types and shapes."""

import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from fl_taskarith.masking.mask import load_mask

FAULT = "mask files drawn at random"
TYPES = (torch.uint8, torch.bool, torch.int64, torch.float32, torch.float16, torch.float8_e4m3fn)
SHAPES = ((), (0,), (1,), (3, 4), (4, 3), (1, 0, 2), (16,))


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    path = folder / "mask.safetensors"
    tensors = {
        drawn.choice(["blocks.0.attn.qkv.weight", "a", "", "a b", "x" * 300]): torch.ones(drawn.choice(SHAPES)).to(
            drawn.choice(TYPES)
        )
        for _ in range(drawn.randint(0, 3))
    }
    metadata = drawn.choice([None, {}, {"format": "pt"}, {"sha256": "0"}, {"mask_density": "nan"}])
    save_file(tensors, path, metadata)
    content = bytearray(path.read_bytes())
    for _ in range(drawn.choice([0, 0, 1, 5])):
        content[drawn.randrange(len(content))] = drawn.randrange(256)
    path.write_bytes(content[: drawn.choice([len(content), len(content), drawn.randrange(len(content) + 1)])])
    mask = load_mask(path)
    assert all(chosen.dtype is torch.bool for chosen in mask.values())
    return "accepted"
