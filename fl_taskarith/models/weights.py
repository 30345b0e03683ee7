"""Pretrained weights from a file, in timm's spelling or a release's own, checked key by key. No pickled code is run."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from fl_taskarith.errors import WeightsError
from fl_taskarith.storage.tensor_file import check_seal

StateDict = dict[str, Tensor]

WRAPPERS = ("teacher", "student", "model", "state_dict")  # DINO's full checkpoints, and common training scripts
PREFIXES = ("module.", "backbone.", "_orig_mod.")  # DataParallel, DINO's MultiCropWrapper, torch.compile
# A classifier or projection head belongs to the task it was trained for; ours is solved or trained again. DINOv2's mask
# token is used in its pretraining only.
DROPPED = ("head.", "fc.", "head_dist.", "mask_token")


def load_weights(model: VisionTransformer, path: Path) -> None:
    """Load a backbone from `path` (.safetensors, .pth or .pt) into `model`, in place; its head is left alone.

    Accepts timm's keys and those of the original DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023) releases,
    bare or wrapped ("teacher", "module.backbone."). The position embedding is resampled to the model's grid.

    Raises:
        WeightsError: the file is missing, unreadable or would need to run pickled code; or a key is missing,
            unexpected or of the wrong shape (all of them are listed).
    """
    state = checkpoint_filter_fn(_spell_as_timm(read_tensors(path)), model)
    state = {key: value for key, value in state.items() if not key.startswith(DROPPED)}
    expected = backbone_state(model)
    problems = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected.keys() - state.keys()]
    problems += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state.keys() - expected.keys()]
    problems += [f"wrong shape: {key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
                 for key in expected.keys() & state.keys() if state[key].shape != expected[key].shape]  # fmt: skip
    if problems:
        raise WeightsError(
            f"The weights in {path} do not fit the model: {len(problems)} differences.\n  "
            + "\n  ".join(sorted(problems))
            + "\nName the model these weights were made for in `model`, or other weights in `weights`."
        )
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(state[key])


def backbone_state(model: VisionTransformer) -> StateDict:
    """Return the model's parameters and buffers except the classifier `head`, by reference."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the contents of a weights file; a .pth is read with weights_only, so that it cannot run code.

    Raises:
        WeightsError: missing, of another kind, truncated, or a pickle of more than tensors.
    """
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, for example
        raise WeightsError(f"The weights file {path} cannot be looked up: {error.strerror}.") from error
    if not there:
        raise WeightsError(f"There is no weights file {path}. Put it there, or correct `weights`.")
    try:
        if path.suffix == ".safetensors":
            check_seal(path)
            return dict(load_file(path))
        _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip each have their own
        raise WeightsError(
            f"The weights file {path} cannot be read ({type(error).__name__}: {error}). Expected a .safetensors file, "
            "or a .pth file that holds tensors only; a file that needs to run code to load is refused."
        ) from error
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise WeightsError(f"The weights file {path} holds a {kind}, expected a dictionary of tensors.")
    return loaded


def _check_archive(path: Path) -> None:
    """Raise ValueError if a part of a .pth, a zip archive since torch 1.6, is damaged: torch checks no checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"it is damaged: {damaged} in it has another checksum than when it was written")


def _spell_as_timm(state: dict[str, Any]) -> StateDict:
    """Unwrap nested checkpoints and strip the prefixes that training wrappers add; keep tensors only."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    renamed = {}
    for key, value in state.items():
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if isinstance(value, Tensor):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise WeightsError(f"The weights hold NaN or infinite values in {key}: is the file damaged?")
            renamed[key] = value.float()
    return renamed
