"""Reads a model that a run exported, for use outside a federation."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import fl_taskarith.models.vit_glyph  # noqa: F401  (tells timm of it)
from fl_taskarith.errors import WeightsError
from fl_taskarith.models.weights import read_tensors


class ExportedModel(NamedTuple):
    """A model as a run left it.

    model: timm's, with the run's weights, on the CPU, in evaluation mode. transform: from a PIL image, or pixels uint8
    [..., 3, H, W], to the model's input float32 [..., 3, size, size]. classes: the name of each output.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    classes: tuple[str, ...]


def exported_facts(path: Path) -> dict[str, str]:
    """Return what a .safetensors file says of its model, "architecture" and "input_size" for one that a run exported.

    Raises:
        OSError, SafetensorError: it is missing, or no such file.
    """
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_exported(path: Path) -> ExportedModel:
    """Read model.safetensors of a run's folder.

    Raises:
        WeightsError: there is no such file, or it was not written by a run.
    """
    try:
        facts = exported_facts(path)
        return exported_model(read_tensors(path), facts)
    except FileNotFoundError as error:
        raise WeightsError(f"There is no {path}: the run is not finished, or ran with save-model = false.") from error
    except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is no model that a run exported: {error}.") from error


def exported_model(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> ExportedModel:
    """Return timm's model with `tensors`, which have its shapes, from what the metadata of their file say.

    Raises:
        KeyError, ValueError, RuntimeError: the metadata are no exported model's, or the tensors do not fit.
    """
    size, classes = int(facts["input_size"]), tuple(json.loads(facts["classes"]))
    pooling: dict[str, Any] = {"global_pool": facts["pooling"]} if "pooling" in facts else {}
    model = timm.create_model(facts["architecture"], num_classes=len(classes), img_size=size, **pooling).eval()
    model.load_state_dict(dict(tensors))
    transform = v2.Compose([
        v2.ToImage(),
        v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(json.loads(facts["mean"]), json.loads(facts["std"])),
        v2.ToPureTensor(),
    ])  # fmt: skip
    return ExportedModel(model, transform, classes)
