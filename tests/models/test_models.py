import hashlib
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from conftest import real_data_folder
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.models import backbone
from fl_taskarith.models.backbone import build_model, trained_parameters
from fl_taskarith.models.weights import backbone_state, load_weights

SMALL = "vit_tiny_patch16_224"


def small_model(input_size: int = 64, seed: int = 0) -> VisionTransformer:
    return build_model(SMALL, 5, input_size, "none", download=False, seed=seed)


def test_a_random_model_is_a_function_of_its_seed_with_a_zero_head() -> None:
    first, again, other = (dict(small_model(seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    assert not first["head.weight"].any()
    assert first["head.weight"].shape == (5, 192)


def checkpoint_spellings(state: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    """The same weights as different releases write them."""
    return {
        "timm": {**state, "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)},
        "dino release": dict(state),
        "dino full checkpoint": {
            "student": {},
            "teacher": {f"module.backbone.{name}": value for name, value in state.items()}
            | {"module.head.mlp.0.weight": torch.zeros(3, 3)},
            "epoch": 100,
        },
        "training script": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    }


@pytest.mark.parametrize("spelling", ["timm", "dino release", "dino full checkpoint", "training script"])
def test_weights_load_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    source = small_model(seed=1)
    torch.save(checkpoint_spellings(backbone_state(source))[spelling], tmp_path / "weights.pth")
    target = build_model(SMALL, 7, 64, str(tmp_path / "weights.pth"), download=False, seed=2)
    for name, value in backbone_state(source).items():
        assert torch.equal(target.state_dict()[name], value), name


def test_weights_load_from_safetensors_and_the_position_embedding_is_resampled(tmp_path: Path) -> None:
    source = small_model(input_size=64, seed=1)
    save_file({name: value.clone() for name, value in backbone_state(source).items()}, tmp_path / "w.safetensors")
    target = small_model(input_size=128, seed=2)
    load_weights(target, tmp_path / "w.safetensors")
    assert target.pos_embed.shape == (1, 65, 192)
    expected = timm.layers.resample_abs_pos_embed(source.pos_embed, (8, 8), num_prefix_tokens=1)
    assert torch.allclose(target.pos_embed, expected, atol=1e-6)
    assert torch.equal(target.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)


def test_every_missing_unexpected_and_misshapen_key_is_listed(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in backbone_state(small_model()).items()}
    del state["blocks.2.attn.qkv.bias"], state["norm.weight"]
    state["blocks.0.extra"] = torch.zeros(3)
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_weights(small_model(), tmp_path / "w.safetensors")
    for line in (
        "missing: blocks.2.attn.qkv.bias (576,)",
        "missing: norm.weight (192,)",
        "unexpected: blocks.0.extra (3,)",
        "wrong shape: blocks.1.mlp.fc1.bias is (5,), expected (768,)",
    ):
        assert line in str(caught.value)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/fl_taskarith_pwned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = Path("/tmp/fl_taskarith_pwned")
    marker.unlink(missing_ok=True)
    for name, content in (("torch.pth", None), ("bare.pth", pickle.dumps(Malicious()))):
        if content is None:
            torch.save({"weights": Malicious()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="refused"):
            load_weights(small_model(), tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["missing.pth", "truncated.safetensors", "truncated.pth", "list.pth"])
def test_a_missing_or_damaged_weights_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    if name.startswith("truncated"):
        save_file({"a": torch.zeros(100)}, tmp_path / "whole")
        (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:120])
    elif name == "list.pth":
        torch.save([torch.zeros(3)], tmp_path / name)
    with pytest.raises(WeightsError, match=name):
        load_weights(small_model(), tmp_path / name)


def test_pretrained_weights_that_cannot_be_had_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"timm/vit_small_patch16_224\.dino") as caught:
        build_model("vit_small_patch16_224.dino", 10, 32, "pretrained", download=False, seed=0)
    assert "download = true" in str(caught.value)
    assert "`weights`" in str(caught.value)


def test_pretrained_weights_come_from_the_local_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    source = build_model(name, 3, 32, "none", download=False, seed=5)
    save_file({name: value.clone() for name, value in backbone_state(source).items()}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(content).hexdigest()  # as the hub's cache has it
    (tmp_path / "w.safetensors").rename(blob)
    (tmp_path / "w.safetensors").symlink_to(blob)

    def from_cache(repository: str, filename: str, local_files_only: bool) -> str:
        assert (repository, filename, local_files_only) == (
            f"timm/{name}", "model.safetensors", True,
        )  # fmt: skip
        return str(tmp_path / "w.safetensors")

    monkeypatch.setattr(backbone.huggingface_hub, "hf_hub_download", from_cache)
    model = build_model(name, 10, 32, "pretrained", download=False, seed=0)
    assert torch.equal(model.blocks[11].mlp.fc2.weight, source.blocks[11].mlp.fc2.weight)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match=f"damaged.*{blob.name}"):
        build_model(name, 10, 32, "pretrained", download=False, seed=0)


@pytest.mark.parametrize(
    ("name", "input_size", "expected"),
    [
        ("vit_smal_patch16_224", 224, "timm knows no model"),
        ("resnet18", 64, "resnet18"),
        ("deit_tiny_distilled_patch16_224", 64, "single head"),
        ("vit_small_resnet26d_224", 224, "batch normalisation"),
        (SMALL, 100, "patch size 16: use 96 or 112"),
        (SMALL, 8, "use 16"),
    ],
)
def test_an_impossible_model_is_a_config_error(name: str, input_size: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_model(name, 10, input_size, "none", download=False, seed=0)


def test_what_is_trained_is_explicit() -> None:
    model = small_model()
    everything = [name for name, _ in model.named_parameters()]
    backbone_names = trained_parameters(model, "backbone", 0)
    assert set(everything) - set(backbone_names) == {"head.weight", "head.bias"}
    assert trained_parameters(model, "head", 0) == ["head.weight", "head.bias"]
    assert set(trained_parameters(model, "all", 0)) == set(everything)
    last_two = trained_parameters(model, "backbone", 2)
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in last_two} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in last_two if name.startswith("blocks")} == {"10", "11"}
    with pytest.raises(ConfigError, match="12 blocks"):
        trained_parameters(model, "backbone", 13)


@pytest.mark.skipif(real_data_folder() is None, reason="FL_TASKARITH_TEST_DATA names no folder with real weights")
def test_the_real_vit_loads_strictly_at_another_input_size() -> None:
    folder = real_data_folder()
    assert folder is not None
    (path,) = folder.glob("vit_small_patch14*.safetensors")
    model = build_model("vit_small_patch14_dinov2", 100, 112, str(path), download=False, seed=0)
    assert model.pos_embed.shape == (1, 65, 384)
    assert sum(parameter.numel() for parameter in model.parameters()) > 21_000_000
