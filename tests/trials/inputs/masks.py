"""Mask files: sound ones with a name, a shape, a type, the metadata or some bytes changed."""

import json
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fl_taskarith.cli.command import main
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.storage.tensor_file import sealed

FAULT = "mask files with something wrong"
SHAPES = {
    "blocks.0.attn.qkv.weight": (12, 4), "blocks.0.attn.qkv.bias": (12,), "norm.weight": (4,), "cls_token": (1, 1, 4),
}  # fmt: skip
SIDES = (0, -1, 1, 2**31, 2**63, 10**30, 1.5, True, None, "3", [3], {})
NAMES = ("", "blocks.", "blocks.0", "blocks.٣.x", "blocks." + "9" * 5000 + ".x", "x\x1b[31m", "norm.weight")

Content = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    path, chance = folder / "mask.safetensors", torch.Generator().manual_seed(drawn.randrange(2**31))
    mask = Mask({name: torch.rand(shape, generator=chance) < 0.5 for name, shape in SHAPES.items()})
    shapes: dict[str, Any] = {name: list(shape) for name, shape in SHAPES.items()}
    content: Content = mask.packed(), shapes, {"model": "m", "facts": '{"rule": "random"}'}
    changes = drawn.choices(CHANGES, k=drawn.choice([0, 1, 1, 2]))
    for change in changes:
        change(content, drawn)
    content[2].setdefault("shapes", json.dumps(shapes))
    if has_seal := drawn.random() < 0.5:
        path.write_bytes(sealed(content[0], content[2]))
    else:
        save_file(content[0], path, content[2])
    if drawn.random() < 0.2:
        changes.append(_change_bytes)
        _change_bytes(path, drawn)
    found, facts = load_mask(path)
    assert found.size < 1000 and all(tensor.dtype is torch.bool for tensor in found.tensors.values())
    assert "shapes" not in facts
    if not changes or (has_seal and changes == [_change_bytes]):
        assert all(torch.equal(found.tensors[name], mask.tensors[name]) for name in SHAPES)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(["mask", str(path)]) in (0, 1)
    return "accepted"


def _a_shape(content: Content, drawn: random.Random) -> None:
    name = drawn.choice(list(SHAPES))
    content[1][name] = drawn.choice([None, {}, 3, "4", [], [drawn.choice(SIDES) for _ in range(drawn.randint(1, 3))],
                                     [2] * 70, [4, 12], [48]])  # fmt: skip


def _a_name(content: Content, drawn: random.Random) -> None:
    tensors, shapes, _ = content
    old, new = drawn.choice(list(SHAPES)), drawn.choice(NAMES)
    for table in drawn.choice([(tensors, shapes), (tensors,), (shapes,)]):
        if old in table:
            table[new] = table.pop(old)  # type: ignore[attr-defined]


def _a_type(content: Content, drawn: random.Random) -> None:
    name = drawn.choice(list(content[0]))
    content[0][name] = content[0][name].to(drawn.choice([torch.bool, torch.int8, torch.float32, torch.float8_e4m3fn]))


def _a_tensor(content: Content, drawn: random.Random) -> None:
    name = drawn.choice(list(content[0]))
    content[0][name] = drawn.choice([torch.zeros(0, dtype=torch.uint8), torch.tensor(3, dtype=torch.uint8),
                                     torch.full((6,), 255, dtype=torch.uint8), content[0][name][None]])  # fmt: skip


def _the_metadata(content: Content, drawn: random.Random) -> None:
    key = drawn.choice(["shapes", "facts", "model", "sha256", "fl_taskarith.sha256"])
    content[2][key] = drawn.choice(["", "{}", "[]", "null", "nan", '{"a": 1}', "[" * 5000, "$x^$", "m\x1b[2J", "0" * 64,
                                    '{"rule": {"a": NaN}, "calibration_rounds": []}'])  # fmt: skip


def _change_bytes(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(drawn.choice([1, 1, 5])):
        content[drawn.randrange(len(content))] = drawn.randrange(256)
    path.write_bytes(content[: drawn.choice([len(content), len(content), drawn.randrange(len(content) + 1)])])


CHANGES: tuple[Callable[[Content, random.Random], None], ...] = (_a_shape, _a_name, _a_type, _a_tensor, _the_metadata)
