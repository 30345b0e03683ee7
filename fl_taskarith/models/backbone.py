"""The timm vision transformer of a run, its weights, and which of its parameters are trained."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import timm
import torch
from timm.models.eva import Eva, EvaAttention
from torch import nn

from fl_taskarith.config.rule import IMPORTABLE
from fl_taskarith.errors import ConfigError, WeightsError, imported
from fl_taskarith.models.class_token_block import compute_class_token_only
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.models.vit_glyph import VIT_GLYPH_WEIGHTS
from fl_taskarith.models.weights import load_weights
from fl_taskarith.storage.tensor_file import write_sealed
from fl_taskarith.storage.verified_files import checksum_of_file

HEAD_PARAMETERS = ("head.weight", "head.bias")


def registered_name(name: str) -> str:
    """Return the name under which timm knows the model that a configuration's `model` names."""
    return name.partition(":")[2] if IMPORTABLE.fullmatch(name) else name


def build_model(name: str, num_classes: int, input_size: int, weights: str, download: bool, seed: int) -> Backbone:
    """Build a timm VisionTransformer or Eva on the CPU, with a zero linear `head` [num_classes, width].

    The head reads the class token, or what timm's model of this name pools otherwise. The last block is cut down to
    what that head reads (`class_token_block`).

    Args:
        name: timm's model name, for example "vit_small_patch16_224.dino", or "module:name" of one that a module of the
            user's registers when it is imported.
        input_size: side of the square input in pixels; the position embedding is resampled to it.
        weights: absolute path of a file, "pretrained" (timm's own for this name) or "none" (random from `seed`).
        download: whether timm may fetch pretrained weights that are not in the local cache.

    Raises:
        ConfigError: no such model, not a VisionTransformer or Eva, one with batch normalisation, or an input size that
            its patches do not divide.
        WeightsError: the weights cannot be found, read or fitted.
    """
    if IMPORTABLE.fullmatch(name):
        imported("model", name)
        name = registered_name(name)
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models("vit_*"), n=3, cutoff=0.4))
        raise ConfigError(
            f'timm knows no model "{name}"' + (f" (near it: {near})" if near else "") + ". One that a module of yours "
            'registers with timm is model = "module:name".'
        )
    torch.manual_seed(seed)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, img_size=input_size)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f'model = "{name}" cannot be built with input-size = {input_size}: {error}') from error
    if not isinstance(model, Backbone) or hasattr(model, "head_dist"):
        kind = type(model).__name__
        raise ConfigError(f'model = "{name}" is a {kind}, expected a timm VisionTransformer or Eva with a single head.')
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ConfigError(
            f'model = "{name}" has batch normalisation, whose running statistics are no weights: they would not be '
            "averaged, and would carry over from one client to the next. Choose a model without it."
        )
    patch = model.patch_embed.patch_size[0]
    if input_size % patch:
        below = max(patch, input_size // patch * patch)
        raise ConfigError(
            f"input-size = {input_size} is not a multiple of {name}'s patch size {patch}: "
            f"use {below} or {input_size // patch * patch + patch}."
        )
    if weights != "none":
        load_weights(model, find_pretrained(model, name, download) if weights == "pretrained" else Path(weights))
    if isinstance(model, Eva):
        _follow_pretraining(model)
    with torch.no_grad():
        for name in HEAD_PARAMETERS:
            model.get_parameter(name).zero_()
    compute_class_token_only(model)
    return model


def _follow_pretraining(model: Eva) -> None:
    """Let the head read the class token, as DINOv3 and EUPE do, and call the layers whose inputs and outputs are read.

    timm averages the patches of models without weights of a norm for that average. It adds the biases of queries and
    values inside a product that passes by the layer itself, so that no hook would see it.
    """
    if model.cls_token is not None and model.global_pool == "avg" and isinstance(model.fc_norm, nn.Identity):
        model.global_pool = "token"
    for module in model.modules():
        if isinstance(module, EvaAttention):
            module.qkv_bias_separate = True


def find_pretrained(model: Backbone, name: str, download: bool) -> Path:
    """Return the file of timm's pretrained weights for `name`: shipped, in the local hub cache, or downloaded to it.

    Raises:
        WeightsError: there are none, they cannot be downloaded, or the cached file is damaged.
    """
    if name == "vit_glyph":
        return VIT_GLYPH_WEIGHTS
    cfg = pretrained_settings(model)
    repository = cfg.get("hf_hub_id")
    if not repository:
        raise WeightsError(f"timm has no pretrained weights for {name}: name a file in `weights`.")
    filename = cfg.get("hf_hub_filename") or "model.safetensors"
    try:
        path = Path(huggingface_hub.hf_hub_download(repository, filename, local_files_only=not download))
    except Exception as error:  # the hub client's own errors and those of the network below it
        raise WeightsError(
            f"The pretrained weights of {name} ({repository}/{filename}) are not in the local cache and could not be "
            f"downloaded ({type(error).__name__}). Set download = true on a machine with internet access, or name a "
            ".safetensors or .pth file that you have in `weights`."
        ) from error
    stored = path.resolve()
    named = re.fullmatch(r"[0-9a-f]{64}", stored.name)  # the hub names large files by their SHA-256, and checks none
    if named and checksum_of_file(stored) != stored.name:
        raise WeightsError(f"The cached weights are damaged (another checksum): delete {stored}, run again.")
    return path


def export_model(model: Backbone, path: Path, classes: Sequence[str], facts: Mapping[str, str]) -> None:
    """Write the whole model in timm's layout, with what is needed to use it as metadata (strings; lists as JSON).

    Load it with timm.create_model(architecture, num_classes=len(classes), img_size=input_size, global_pool=pooling)
    and load_state_dict(safetensors.torch.load_file(path)).

    Raises:
        CheckpointError: it cannot be written.
    """
    cfg = pretrained_settings(model)
    metadata = {
        "architecture": str(cfg["architecture"]),
        "input_size": str(model.patch_embed.img_size[0]),
        "mean": json.dumps(list(cfg["mean"])),
        "std": json.dumps(list(cfg["std"])),
        "interpolation": "bicubic",
        "pooling": str(model.global_pool),
        "head": f"head: linear on the normalised {'class token' if model.global_pool == 'token' else 'pooled tokens'}",
        "classes": json.dumps(list(classes)),
        **facts,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_sealed(path, tensors, metadata)


def pretrained_settings(model: Backbone) -> dict[str, Any]:
    """Return timm's record of the model's pretraining: channel mean and std of its inputs, address of its weights."""
    return cast(dict[str, Any], model.pretrained_cfg)


def trained_parameters(model: Backbone, trainable: str, trainable_blocks: int) -> list[str]:
    """Return the names of the parameters that clients train, in the model's order.

    Args:
        trainable: "backbone" (all but the head), "head", or "all".
        trainable_blocks: if above 0, of the backbone only the last so many blocks and the final norm.

    Raises:
        ConfigError: the model has fewer blocks.
    """
    depth = len(model.blocks)
    if trainable_blocks > depth:
        raise ConfigError(f"trainable-blocks = {trainable_blocks}: the model has {depth} blocks.")
    backbone = [name for name, _ in model.named_parameters() if name not in HEAD_PARAMETERS]
    if trainable_blocks:
        unfrozen = (*(f"blocks.{depth - 1 - back}." for back in range(trainable_blocks)), "norm.", "fc_norm.")
        backbone = [name for name in backbone if name.startswith(unfrozen)]
    return {"backbone": backbone, "head": list(HEAD_PARAMETERS), "all": backbone + list(HEAD_PARAMETERS)}[trainable]


def linear_shapes(model: nn.Module, trained: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the weight of every linear layer that is trained, by the weight's name."""
    names = set(trained)
    return {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    }
