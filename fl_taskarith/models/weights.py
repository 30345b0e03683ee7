"""Pretrained weights from a file in any spelling of `spellings.toml`, checked key by key. No pickled code is run."""

import difflib
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from pickletools import genops
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]
from torch import Tensor

from fl_taskarith.errors import WeightsError, listed, printable
from fl_taskarith.models.spellings import SPELLINGS, find_backbone, hints, is_number, known_name, unsupported
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.storage.tensor_file import check_seal

StateDict = dict[str, Tensor]

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"


def load_weights(model: Backbone, path: Path) -> None:
    """Load a backbone from `path` (.safetensors, or any file of torch.save) into `model`, in place, without its head.

    Accepts the names of timm, DINO (Caron et al. 2021), DINOv2 (Oquab et al. 2023), DINOv3 (Siméoni et al. 2025),
    Hugging Face, CLIP and torchvision, bare or in a training checkpoint. The position embedding is resampled to the
    model's grid. How many rows of patches it has no file says: they are taken for a square.

    Raises:
        WeightsError: the file is missing, unreadable or would need to run pickled code; or a key is missing,
            unexpected, of the wrong shape or no floating-point number.
    """
    expected = backbone_state(model)
    own_names = {known_name(name): name for name in expected}
    found = find_backbone(read_tensors(path), own_names.keys(), path)
    if getattr(model, "rope", None) is not None:  # whose frequencies timm computes for the model's grid
        found = {name: value for name, value in found.items() if not re.match(r"rope\w*\.(periods|inv_freq)$", name)}
    state = {own_names.get(name, name): value for name, value in _split_biases(found, own_names.keys()).items()}
    state = {name: _shaped(value, expected.get(name)) for name, value in state.items()}
    _include_class_position(model, state)
    names = sorted(expected.keys() | state.keys(), key=lambda name: (name not in (PATCHES, POSITIONS), name))
    problems = [problem for name in names
                if (problem := _problem(model, name, state.get(name), expected.get(name)))]  # fmt: skip
    if problems:
        raise WeightsError(
            f"The weights in {path} do not fit the model: {len(problems)} differences.{listed(problems)}\n"
            f"Name the model these weights were made for in `model`{_right_model(model, state)}, or other weights in "
            f"`weights`.{hints(state.keys() - expected.keys())}"
        )
    if POSITIONS in expected and state[POSITIONS].shape != expected[POSITIONS].shape:
        grid = list(model.patch_embed.grid_size)
        state[POSITIONS] = resample_abs_pos_embed(state[POSITIONS].float(), grid, num_prefix_tokens=_prefix(model))
    loaded = {name: state[name].to(value) for name, value in expected.items()}
    if bad := [name for name, value in loaded.items() if not bool(value.isfinite().all())]:
        raise WeightsError(
            f"The weights in {path} hold NaN or infinite values in {', '.join(bad[:3])}, or some too large for "
            f"{loaded[bad[0]].dtype}, in {len(bad)} tensors: is the file damaged?"
        )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(loaded[name])


def backbone_state(model: Backbone) -> StateDict:
    """Return the model's parameters and buffers except the classifier `head`, by reference."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def read_tensors(path: Path) -> dict[Any, Any]:
    """Return the contents of a weights file; a pickle is read so that no code is run, all but tensors left out.

    Raises:
        WeightsError: missing, of another kind, truncated, or a pickle of what only running code could load.
    """
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, for example
        raise WeightsError(f"The weights file {path} cannot be looked up: {error}.") from error
    if not there:
        kind = "is a folder, no weights file: name a file in it" if path.is_dir() else "is missing: put it there"
        raise WeightsError(f"There is no weights file {path}: it {kind}, or correct `weights`.")
    if kind_of_file := unsupported(path):
        raise WeightsError(f"The weights file {path} cannot be read: {kind_of_file}.")
    try:
        if not _is_pickle(path):
            check_seal(path)
        loaded = _pickled(path) if _is_pickle(path) else dict(load_file(path))
    except Exception as error:  # safetensors, pickle and zip each have their own
        reason = printable(error, 300)
        of_pickles = isinstance(error, pickle.UnpicklingError | TypeError | AttributeError)
        if of_pickles or "weights_only" in str(error):  # torch advises to run the code
            reason = "it is no file of torch.save, is damaged, or holds objects that only running code could load"
        raise WeightsError(
            f"The weights file {path} cannot be read ({reason}). Expected a .safetensors file, or a .pth file that "
            "holds tensors only; a file that needs to run code to load is refused."
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(
            f"The weights file {path} holds a {type(loaded).__name__}, expected a dictionary of tensors: save the "
            "model's state_dict()."
        )
    return loaded


def _is_pickle(path: Path) -> bool:
    """Whether torch.save may have written the file: by how it begins, or else by its name."""
    with open(path, "rb") as file:
        start = file.read(9)
    is_header = start[8:] == b"{"  # of a .safetensors, whose length stands before it
    return not is_header and (start.startswith((b"PK", b"\x80")) or path.suffix != ".safetensors")


def _pickled(path: Path) -> Any:
    """Return what torch.save wrote; whatever is no tensor is read as something empty.

    Raises:
        ValueError: it is damaged (torch checks no checksums), or code would have to run.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"it is damaged: {damaged} in it has another checksum than when it was written")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript program: save the model's state_dict()")
        unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if refused := [name for name in unknown if not _inert(name)]:
            raise ValueError(f"code would have to run for {', '.join(refused[:3])}: save the model's state_dict()")
    else:
        unknown = [name for name in _named_in_pickles(path) if _inert(name)]
    stand_ins = [(_Blank if name.startswith("numpy.") else _Nothing, name) for name in (*SPELLINGS["inert"], *unknown)]
    allowed = torch.serialization.safe_globals([*stand_ins, _Blank])
    with allowed, warnings.catch_warnings(), open(path, "rb") as file:  # torch goes by the name of a path
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _named_in_pickles(path: Path) -> set[str]:
    """Return the names of all objects in a file as torch wrote it before 1.6: four pickles, then the numbers.

    Raises:
        UnpicklingError: it is no such file.
    """
    try:
        with open(path, "rb") as file:
            return {str(word).replace(" ", ".") for _ in range(4) for code, word, _ in genops(file)
                    if code.name == "GLOBAL"}  # fmt: skip
    except Exception as error:  # genops has ValueErrors and those of decoders
        raise pickle.UnpicklingError("it is no file of torch.save") from error


def _inert(name: str) -> bool:
    """Whether an object of this kind is read as something empty: those of the table, and other people's classes."""
    module = name.partition(".")[0]
    known = module in sys.stdlib_module_names or module in ("torch", "__builtin__")
    return not known or any(fnmatchcase(name, pattern) for pattern in SPELLINGS["inert"])


class _Blank:
    """Stands for an object of numpy."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Nothing:
    """Stands for any other object; a kind of dictionary gets its entries."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # torch fills no other class of dict
        return OrderedDict()


def _shaped(value: Tensor, expected: Tensor | None) -> Tensor:
    """Return `value` with leading dimensions of 1, or a flattened patch embedding in its shape, as `expected` has."""
    if expected is None or not is_number(value):
        return value
    while value.dim() < expected.dim() and expected.shape[expected.dim() - value.dim() - 1] == 1:
        value = value[None]
    flat = expected.dim() == 4 and value.shape == expected.flatten(1).shape
    return value.reshape(expected.shape) if flat else value


def _prefix(model: Backbone) -> int:
    """Return the number of positions that are no patch."""
    return 0 if model.no_embed_class else model.num_prefix_tokens


def _split_biases(state: StateDict, expected: Collection[str]) -> StateDict:
    """Split biases [3d] of queries, keys and values where the model has those of queries and values alone, [d] each.

    DINOv3's keys have a bias in its files that its model does not add. A bias of zeros is left out where the model has
    none.
    """
    split = dict(state)
    for name, value in state.items():
        start = name.removesuffix("qkv.bias")
        if start == name or name in expected or not is_number(value) or value.dim() != 1 or len(value) % 3:
            continue
        query, _, values = value.chunk(3)
        if f"{start}q.bias" in expected:
            split |= {f"{start}q.bias": query, f"{start}v.bias": values}
        elif bool(query.any()) or bool(values.any()):
            continue
        del split[name]
    return split


def _include_class_position(model: Backbone, state: StateDict) -> None:
    """Add the class token's position to it where the model, as DINOv2's with registers in timm, has none for it."""
    position, token = state.get(POSITIONS), state.get("cls_token")
    if not model.no_embed_class or position is None or token is None or not is_number(position) or not is_number(token):
        return
    if position.dim() == token.dim() == 3 and token.shape == (1, 1, position.shape[2]) and _grid(position.shape[1] - 1):
        state["cls_token"] = token + position[:, :1]
        state[POSITIONS] = position[:, 1:]


def _grid(tokens: int) -> bool:
    return tokens > 0 and math.isqrt(tokens) ** 2 == tokens


def _problem(model: Backbone, name: str, value: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor for one of the model of any shape, "" if nothing."""
    if value is None or expected is None:
        kind, there = ("missing", expected) if value is None else ("unexpected", value)
        return f"{kind}: {name} {tuple(there.shape) if there is not None else ''}"
    shape, wanted = tuple(value.shape), tuple(expected.shape)
    if not is_number(value):
        kind = "quantised" if value.is_quantized else f"{value.dtype}, {value.layout}, on {value.device}"
        return f"not as many floating-point numbers in memory: {name} is {shape} ({kind}), expected {wanted}"
    if name == POSITIONS and len(shape) == 3 and (shape[0], shape[2]) == (wanted[0], wanted[2]):
        prefix = _prefix(model)
        if shape[1] == wanted[1] or _grid(shape[1] - prefix):
            return ""
        return f"wrong shape: {name} is {shape}, expected {wanted} or {prefix} + a square number of tokens"
    return "" if shape == wanted else f"wrong shape: {name} is {shape}, expected {wanted}"


def _right_model(model: Backbone, state: StateDict) -> str:
    """Return what is told of the model that weights are of by their patch embedding, with an example of timm's."""
    patches = state.get(PATCHES)
    if patches is None or patches.dim() != 4:
        return ""
    width, channels, height, side = patches.shape
    facts = f"patches of {height} x {side}, {channels} channels, width {width}"
    size, here = SPELLINGS["sizes"].get(str(width)), str(cast(dict[str, Any], model.pretrained_cfg)["architecture"])
    registers = "reg*_" if "reg_token" in state else ""
    names = timm.list_models(f"vit_{size}_patch{side}_{registers}*") if (channels, height) == (3, side) else []
    wanted = re.sub(r"patch\d+", f"patch{side}", re.sub(r"vit_[a-z]+_", f"vit_{size}_", here))
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.3)
    return f" ({facts}{f'; for example {near[0]}' if near and near[0] != here else ''})"
