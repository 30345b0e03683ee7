"""One backbone's weights as files of other projects spell, nest and wrap them."""

import argparse
import collections
import datetime
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

State = dict[str, torch.Tensor]


class OwnSettings(dict):  # type: ignore[type-arg]  # a class of a project of one's own, as Lightning's AttributeDict
    """Settings that a training script pickles."""


class OwnRecord:
    """An object that a training script pickles."""

    def __init__(self) -> None:
        self.best = 0.5


def _substituted(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> State:
    """Each name under the first pattern that matches it."""
    renamed = {}
    for name, value in state.items():
        pattern = next((each for each in names if re.match(each, name)), None)
        renamed[re.sub(pattern, names[pattern], name) if pattern else name] = value
    return renamed


def _parted(state: Mapping[str, torch.Tensor], words: Mapping[str, str]) -> State:
    """Query, key and value apart, under a name per letter."""
    parted: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                parted[name.replace("attn.qkv", words[letter])] = part.clone()
        else:
            parted[name] = value
    return parted


def hugging_face(state: Mapping[str, torch.Tensor]) -> State:
    """Transformers' ViTForImageClassification and its DINO models, position_ids and pooler included."""
    block = r"blocks\.(\d+)\."
    spelt = _substituted(
        _parted(state, {"q": "attn.attention.query", "k": "attn.attention.key", "v": "attn.attention.value"}),
        {
            rf"{block}attn\.attention\.": r"encoder.layer.\1.attention.attention.",
            rf"{block}attn\.proj": r"encoder.layer.\1.attention.output.dense",
            rf"{block}mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
            rf"{block}mlp\.fc2": r"encoder.layer.\1.output.dense",
            rf"{block}norm1": r"encoder.layer.\1.layernorm_before",
            rf"{block}norm2": r"encoder.layer.\1.layernorm_after",
            r"norm\.": "layernorm.",
            r"cls_token": "embeddings.cls_token",
            r"pos_embed": "embeddings.position_embeddings",
            r"patch_embed\.proj": "embeddings.patch_embeddings.projection",
        },
    )  # fmt: skip
    return {f"vit.{name}": value for name, value in spelt.items()} | {
        "classifier.weight": torch.zeros(3, 64), "vit.pooler.dense.weight": torch.zeros(3, 3),
        "vit.embeddings.position_ids": torch.arange(5),
    }  # fmt: skip


def torchvision(state: Mapping[str, torch.Tensor]) -> State:
    """torchvision.models.VisionTransformer."""
    block, layer = r"blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1"
    return _substituted(
        state,
        {
            rf"{block}attn\.qkv\.": rf"{layer}.self_attention.in_proj_",
            rf"{block}attn\.proj": rf"{layer}.self_attention.out_proj",
            rf"{block}mlp\.fc1": rf"{layer}.mlp.0",
            rf"{block}mlp\.fc2": rf"{layer}.mlp.3",
            rf"{block}norm": rf"{layer}.ln_",
            r"norm\.": "encoder.ln.",
            r"cls_token": "class_token",
            r"pos_embed": "encoder.pos_embedding",
            r"patch_embed\.proj": "conv_proj",
        },
    ) | {"heads.head.weight": torch.zeros(3, 64)}  # fmt: skip


def clip(state: Mapping[str, torch.Tensor]) -> State:
    """The vision model of OpenAI's CLIP, beside a text model; the patch embedding's bias, which CLIP lacks, stays."""
    block, layer = r"blocks\.(\d+)\.", r"transformer.resblocks.\1"
    spelt = _substituted(
        state,
        {
            rf"{block}attn\.qkv\.": rf"{layer}.attn.in_proj_",
            rf"{block}attn\.proj": rf"{layer}.attn.out_proj",
            rf"{block}mlp\.fc1": rf"{layer}.mlp.c_fc",
            rf"{block}mlp\.fc2": rf"{layer}.mlp.c_proj",
            rf"{block}norm": rf"{layer}.ln_",
            r"norm\.": "ln_post.",
            r"patch_embed\.proj\.weight": "conv1.weight",
        },
    )  # fmt: skip
    for name, word in (("cls_token", "class_embedding"), ("pos_embed", "positional_embedding")):
        if name in spelt:
            value = spelt.pop(name)
            spelt[word] = value.view(value.shape[-2:] if name == "pos_embed" else -1) if value.dim() == 3 else value
    text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(8), "positional_embedding": torch.zeros(77, 8)}
    return {f"visual.{name}": value for name, value in spelt.items()} | text | {"visual.proj": torch.zeros(64, 8)}


def chunked(state: Mapping[str, torch.Tensor]) -> State:
    """DINOv2's training: blocks in chunks of two, and a mask token."""
    names = {r"blocks\.[01]\.": r"blocks.0.\g<0>", r"blocks\.[23]\.": r"blocks.1.\g<0>"}
    spelt = {name.replace("blocks.0.blocks.", "blocks.0.").replace("blocks.1.blocks.", "blocks.1."): value
             for name, value in _substituted(state, names).items()}  # fmt: skip
    return spelt | {"mask_token": torch.zeros(1, 64)}


LAYOUTS: dict[str, Callable[[State], State]] = {
    "timm": dict, "hugging face": hugging_face, "torchvision": torchvision, "clip": clip, "chunked": chunked,
}  # fmt: skip
PREFIXES = ("", "module.", "backbone.", "model.", "vit.", "encoder.", "teacher.backbone.", "base_model.model.", "net.",
            "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "model.feature_extractor.")  # fmt: skip
WRAPPERS: tuple[tuple[str, ...], ...] = (
    (), ("model_state_dict",), ("state_dict_ema",), ("model_ema",), ("net",), ("teacher",), ("model",), ("state_dict",),
    ("checkpoint", "model", "state_dict"), ("ema", "module"),
)  # fmt: skip
EXTRAS: State = {
    "n_averaged": torch.tensor(3), "dino_head.mlp.0.weight": torch.zeros(3, 3), "head.weight": torch.zeros(9, 64),
}  # fmt: skip


def wrapped(state: Mapping[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    """The state behind keys, from the outermost inwards."""
    content = dict(state)
    for word in reversed(words):
        content = {word: content}
    return content


def training_facts() -> dict[str, Any]:
    """What training scripts pickle beside the weights."""
    counts: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    counts["epochs"].append(3)
    return {
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("/out")), "epoch": np.int64(3), "best": np.float64(0.5),
        "curve": np.zeros(3), "counts": counts, "path": pathlib.PurePosixPath("a"), "record": OwnRecord(),
        "hyper_parameters": OwnSettings(width=3), "when": datetime.datetime(2020, 1, 1),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
