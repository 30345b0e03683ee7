"""Models to merge, sound or with something wrong, under options drawn at random."""

import json
import math
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fl_taskarith.cli.command import main
from fl_taskarith.merging.merge_rules import merge_rules
from fl_taskarith.storage.tensor_file import sealed

FAULT = "merges of files with something wrong"
SHAPES = {
    "blocks.0.weight": (4, 3), "norm.weight": (4,), "logit_scale": (), "bn.running_var": (3,), "head.weight": (2, 4),
}  # fmt: skip
TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
NUMBERS = ("0.5", "1", "0.3", "-1e-3", "nan", "inf", "-inf", "1e38", "1e39", "0", "-1", "1e400", "x", "")

State = dict[str, torch.Tensor]


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    states = [_model(drawn) for _ in range(drawn.choice([2, 3, 4]))]
    facts: list[dict[str, str]] = [{"classes": '["a", "b"]', "mean": "[0.5]"} for _ in states]
    for change in drawn.choices(CHANGES, k=drawn.choice([0, 0, 1, 2])):
        place = drawn.randrange(len(states))
        change(states[place], facts[place], drawn)
    names = ["base", *(f"m{number}" for number in range(1, len(states)))]
    paths = [folder / f"{name}.safetensors" for name in names]
    for path, state, metadata in zip(paths, states, facts, strict=True):
        _write(path, state, metadata, drawn)
    has_base, output = drawn.random() < 0.8, folder / "out.safetensors"
    words = ["--base", str(paths[0])] if has_base else []
    method = drawn.choice(list(merge_rules()))
    words += _options(method, len(paths) - 1, drawn)
    models = [str(path) for path in paths[1:]]
    words = words + models if drawn.random() < 0.5 else models[:1] + words + models[1:]
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(["merge", *words, "--method", method, "--output", str(output)])
    message = said.getvalue()
    assert code in (0, 1) and "Traceback" not in message and "\x1b" not in message and len(message) < 4000
    assert (code == 0) == output.exists() and not list(folder.glob(".*.tmp"))
    if code:
        assert message.count("\n") <= 18
        return (
            "refused: " + message.splitlines()[-1 if "Error" in message.splitlines()[-1] else 0].partition(":")[0][:20]
        )
    _check(output, paths if has_base else paths[1:], has_base, message)
    return "accepted"


def _check(output: Path, paths: list[Path], has_base: bool, message: str) -> None:
    """What was merged is finite, in the base's types and shapes; a tensor that is in no output or kept was named."""
    merged, inputs = load_file(output), [load_file(path) for path in paths]
    with safe_open(output, "pt") as opened:
        facts = json.loads(opened.metadata()["merging"])
    assert math.isfinite(facts["scale"]) and facts["models"] == [
        str(path) for path in (paths[1:] if has_base else paths)
    ]
    assert all(bool(value.float().isfinite().all()) for value in merged.values())
    assert merged.keys() >= inputs[0].keys()
    for name, value in inputs[0].items():
        assert merged[name].dtype == value.dtype and merged[name].shape == value.shape
        if not value.is_floating_point() or name.endswith("running_var"):
            assert torch.equal(merged[name], value) and name in message
    for name in {name for state in inputs for name in state} - merged.keys():
        assert name.startswith("head") and name in message


def _model(drawn: random.Random) -> State:
    chance = torch.Generator().manual_seed(drawn.randrange(2**31))
    state = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    return state | {"bn.num_batches_tracked": torch.tensor(drawn.randrange(9)), "position_ids": torch.arange(3)}


def _options(method: str, number: int, drawn: random.Random) -> list[str]:
    rule, words = merge_rules()[method], []
    sound = drawn.random() < 0.7
    if rule.parameter and (sound or drawn.random() < 0.7):
        words += [f"--{rule.parameter}", "0.5" if sound else drawn.choice(NUMBERS)]
    if rule.takes("steps") and (sound or drawn.random() < 0.7):
        words += ["--steps", *(str(drawn.randint(1, 9)) if sound else drawn.choice(NUMBERS) for _ in range(number))]
    if rule.scaled and drawn.random() < 0.5:
        words += ["--scale", "0.3" if sound else drawn.choice(NUMBERS)]
    if not sound:
        words += drawn.choice([[], [], ["--seed", drawn.choice(["3", "-1"])], ["--task-vectors"], ["--data", "x"]])
    return words


def _write(path: Path, state: State, metadata: dict[str, str], drawn: random.Random) -> None:
    if drawn.random() < 0.3:
        path.write_bytes(sealed(state, metadata))
    else:
        save_file(state, path, metadata)
    if drawn.random() < 0.05:
        content = bytearray(path.read_bytes())
        content[drawn.randrange(len(content))] = drawn.randrange(256)
        path.write_bytes(content[: drawn.choice([len(content), drawn.randrange(len(content) + 1)])])


def _a_shape(state: State, facts: dict[str, str], drawn: random.Random) -> None:
    state[drawn.choice(list(state))] = torch.ones(drawn.choice([(), (0,), (1,), (3, 4), (4, 1), (2**40, 0)]))


def _a_type(state: State, facts: dict[str, str], drawn: random.Random) -> None:
    name = drawn.choice(list(state))
    state[name] = state[name].to(drawn.choice(TYPES))


def _a_value(state: State, facts: dict[str, str], drawn: random.Random) -> None:
    name = drawn.choice(list(SHAPES))
    state[name] = state[name] * drawn.choice([torch.nan, torch.inf, 1e38, 0.0])


def _a_name(state: State, facts: dict[str, str], drawn: random.Random) -> None:
    state[drawn.choice(["head.bias", "head.other", "x\x1b[2J\n", "y" * 3000])] = torch.ones(2)
    if drawn.random() < 0.5:
        del state[drawn.choice(list(state))]


def _metadata(state: State, facts: dict[str, str], drawn: random.Random) -> None:
    key = drawn.choice(["classes", "mean", "std", "sha256", "merging", "format", "fl_taskarith.sha256"])
    facts[key] = drawn.choice(['["a", "c"]', "[0.5 ]", "", "{}", "[" * 3000, "\x1b[2J", "0" * 64])


Change = Callable[[State, dict[str, str], random.Random], Any]
CHANGES: tuple[Change, ...] = (_a_shape, _a_type, _a_value, _a_name, _metadata)
