"""Files of one backbone in all spellings, sound or with something wrong, loaded as weights."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from malice import Payload
from safetensors.torch import save_file
from spelt_weights import EXTRAS, LAYOUTS, PREFIXES, WRAPPERS, State, training_facts, wrapped
from timm.models.vision_transformer import VisionTransformer

from fl_taskarith.errors import WeightsError
from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.weights import backbone_state, load_weights

FAULT = "weights in all spellings with something wrong"
SHAPES = (
    (),
    (0,),
    (1,),
    (64,),
    (64, 3, 8, 8),
    (64, 3, 4, 2),
    (64, 1, 4, 4),
    (64, 48),
    (1, 18, 64),
    (1, 26, 64),
    (198, 64),
)

Prepared = tuple[VisionTransformer, State]


def prepare(folder: Path) -> Prepared:
    models = [build_model("vit_glyph", 3, 16, "none", download=False, seed=seed) for seed in (1, 2)]
    return models[1], {name: value.clone() for name, value in backbone_state(models[0]).items()}


def attempt(prepared: Prepared, drawn: random.Random, folder: Path) -> str:
    model, weights = prepared
    state, changes = dict(weights), drawn.choices(CHANGES, k=drawn.choice([0, 0, 1, 1, 2]))
    for change in changes:
        change(state, drawn)
    if drawn.random() < 0.5:
        state |= EXTRAS
    prefix = drawn.choice(PREFIXES)
    spelt = {f"{prefix}{name}": value for name, value in LAYOUTS[drawn.choice(list(LAYOUTS))](state).items()}
    marker = folder / "marker"
    path, damaged = folder / drawn.choice(["w.pth", "w.pt", "w.safetensors"]), drawn.random() < 0.15
    payload = drawn.random() < 0.1 and path.suffix != ".safetensors"
    _write(path, spelt, drawn, [Payload(marker)] if payload else [])
    if damaged:
        _damage(path, drawn)
    try:
        load_weights(model, path)
    except WeightsError as error:
        assert str(error).count("\n") < 10 and "weights_only" not in str(error)
        assert changes or damaged or payload, f"sound weights are refused: {error}"
        raise
    finally:
        assert not marker.exists(), "code was run"
    assert not payload, "a file with code is accepted"
    if changes or damaged:
        assert all(bool(value.isfinite().all()) for value in backbone_state(model).values())
        return "accepted, changed"
    assert all(torch.equal(value, weights[name]) for name, value in backbone_state(model).items()), "other weights"
    return "accepted"


def _write(path: Path, spelt: State, drawn: random.Random, more: list[object]) -> None:
    if path.suffix == ".safetensors":
        try:
            save_file({name: value.contiguous() for name, value in spelt.items()}, path)
            return
        except (ValueError, RuntimeError, NotImplementedError):  # sparse, or shared: no such file has them
            path.write_bytes(b"")
            raise WeightsError("cannot be saved") from None
    words = drawn.choice(WRAPPERS)
    facts = training_facts() if words and drawn.random() < 0.5 else {}
    torch.save({**wrapped(spelt, words), **facts, **({"more": more} if more else {})}, path,
               _use_new_zipfile_serialization=drawn.random() < 0.8)  # fmt: skip


def _damage(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(drawn.choice([0, 1, 5])):
        content[drawn.randrange(min(len(content), drawn.choice([200, len(content)])))] = drawn.randrange(256)
    path.write_bytes(content[: drawn.choice([len(content), drawn.randrange(len(content) + 1)])])


def _a_shape(state: State, drawn: random.Random) -> None:
    state[drawn.choice(["patch_embed.proj.weight", "pos_embed", *state])] = torch.zeros(drawn.choice(SHAPES))


def _a_type(state: State, drawn: random.Random) -> None:
    name = drawn.choice(list(state))
    state[name] = drawn.choice(TYPES)(state[name])


def _a_name(state: State, drawn: random.Random) -> None:
    state[drawn.choice(["", "x\x1b[31m\n" * 50, "reg_token", "blocks.9.norm1.weight", "norm", "9" * 5000, ".."])] = (
        state.pop(drawn.choice(list(state)))
    )


def _missing(state: State, drawn: random.Random) -> None:
    for name in drawn.sample(list(state), drawn.choice([1, 1, 20])):
        del state[name]


def _a_value(state: State, drawn: random.Random) -> None:
    name = drawn.choice(list(state))
    state[name] = state[name] * drawn.choice([torch.nan, torch.inf, 0.0])


TYPES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda value: value.to(torch.int8), lambda value: value.bool(), lambda value: value.to(torch.float8_e5m2),
    lambda value: value.to(torch.complex64), lambda value: value.double() * 1e300, lambda value: value.to_sparse(),
    lambda value: value.to("meta"), lambda value: torch.zeros(1).expand(10**12), lambda value: value.to(torch.uint16),
    lambda value: torch.nn.Parameter(value), lambda value: value.reshape(-1), lambda value: value[None],
)  # fmt: skip
CHANGES: tuple[Callable[[State, random.Random], None], ...] = (_a_shape, _a_type, _a_name, _missing, _a_value)
