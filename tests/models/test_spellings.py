"""Weights of one small backbone in the spellings of other projects, in training checkpoints, and with faults."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import malice
import numpy
import pytest
import spelt_weights
import torch
from safetensors.torch import save_file
from spelt_weights import EXTRAS, LAYOUTS, PREFIXES, WRAPPERS, State, training_facts, wrapped
from timm.models.vision_transformer import VisionTransformer

from fl_taskarith.errors import WeightsError
from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.weights import backbone_state, load_weights, read_tensors
from fl_taskarith.one_shot.model_files import ModelFile


def glyph(seed: int) -> VisionTransformer:
    return build_model("vit_glyph", 3, 16, "none", download=False, seed=seed)


@cache
def weights() -> State:
    return {name: value.clone() for name, value in backbone_state(glyph(1)).items()}


def loads(path: Path) -> bool:
    """Whether the file's backbone is `weights`."""
    model = glyph(2)
    load_weights(model, path)
    return all(torch.equal(value, weights()[name]) for name, value in backbone_state(model).items())


def refusal(path: Path, model: VisionTransformer | None = None) -> str:
    """The message of a file that is refused, as a person can read it."""
    model = model or glyph(2)
    before = {name: value.clone() for name, value in backbone_state(model).items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert message.count("\n") < 10 and "\x1b" not in message and "weights_only" not in message and str(path) in message
    assert all(torch.equal(value, before[name]) for name, value in backbone_state(model).items())
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    state = LAYOUTS[layout](weights())
    assert layout == "timm" or state.keys() != weights().keys()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    assert loads(tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_removed_and_extras_are_left_out(prefix: str, tmp_path: Path) -> None:
    torch.save({f"{prefix}{name}": value for name, value in (weights() | EXTRAS).items()}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth")


def test_wrappers_inside_names_are_removed(tmp_path: Path) -> None:
    for word in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"):
        state = {name.replace("norm1", f"{word}.norm1"): value for name, value in weights().items()}
        torch.save(state, tmp_path / "w.pth")
        assert loads(tmp_path / "w.pth")


@pytest.mark.parametrize("words", WRAPPERS, ids=".".join)
def test_every_wrapper_of_a_training_checkpoint_is_opened(words: tuple[str, ...], tmp_path: Path) -> None:
    for new_format in (True, False):
        torch.save(wrapped(weights(), words) | training_facts(), tmp_path / "w.pth",
                   _use_new_zipfile_serialization=new_format)  # fmt: skip
        assert loads(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("taken", "other"),
    [("teacher", "student"), ("state_dict_ema", "state_dict"), ("model_ema", "model"), ("base_encoder", "momentum"),
     ("target_encoder", "encoder")],
)  # fmt: skip
def test_of_two_backbones_the_one_that_is_used_is_taken_and_told(
    taken: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_state = {name: value + 1 for name, value in weights().items()}
    both = {other: other_state, taken: weights()}
    for content in (both, {f"{word}.{name}": value for word, state in both.items() for name, value in state.items()}):
        torch.save(content, tmp_path / "w.pth")
        caplog.clear()
        with caplog.at_level(logging.WARNING):  # which every command shows
            assert loads(tmp_path / "w.pth")
        assert f"{taken} of {tmp_path / 'w.pth'} is taken, not {other}" in caplog.text


def test_a_tensor_in_two_spellings_is_refused_whichever_comes_first(tmp_path: Path) -> None:
    others = {name.replace("blocks.", "layers."): value + 1 for name, value in weights().items() if "blocks." in name}
    for content in (others | weights(), weights() | others):
        torch.save(content, tmp_path / "w.pth")
        assert "unexpected: layers.0." in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("ending", "expected"), [("npz", "JAX"), ("NPZ", "JAX"), ("msgpack", "Flax"), ("onnx", "ONNX")]
)
def test_formats_that_are_not_read_say_what_to_do(ending: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / f"ViT-B_16.{ending}"
    with open(path, "wb") as file:
        numpy.savez(file, **{"Transformer/encoder_norm/scale": numpy.ones(4)})
    assert f"it is {'numpy' if expected == 'JAX' else ''}" in refusal(path) and expected in refusal(path)
    with pytest.raises(WeightsError, match=expected):
        ModelFile(path)


def test_two_backbones_between_which_nothing_decides_are_refused(tmp_path: Path) -> None:
    torch.save({"left": weights(), "right": {name: value + 1 for name, value in weights().items()}}, tmp_path / "w.pth")
    assert "several backbones" in refusal(tmp_path / "w.pth")


def test_a_dictionary_that_holds_itself_is_read_once(tmp_path: Path) -> None:
    content: dict[str, object] = {"model": weights()}
    content["again"] = content
    torch.save(content, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth")


def of_another_size(name: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.zeros(shape)})


def as_type(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    return lambda state: state.update({"norm.weight": change(state["norm.weight"])})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_another_size("patch_embed.proj.weight", 64, 3, 8, 8), ["expected (64, 3, 4, 4)", "patches of 8 x 8"]),
        (of_another_size("patch_embed.proj.weight", 64, 3, 4, 6), ["(64, 3, 4, 6)", "patches of 4 x 6"]),
        (of_another_size("patch_embed.proj.weight", 64, 1, 4, 4), ["(64, 1, 4, 4)", "1 channels"]),
        (of_another_size("patch_embed.proj.weight", 64, 108), ["(64, 108), expected (64, 3, 4, 4)"]),
        (of_another_size("pos_embed", 1, 18, 64), ["(1, 18, 64), expected (1, 17, 64) or 1 + a square"]),
        (of_another_size("pos_embed", 1, 16, 64), ["(1, 16, 64), expected (1, 17, 64) or 1 + a square"]),
        (lambda state: state.update({name: torch.zeros(2) for name in state}), ["(2,), expected (64, 3, 4, 4)"]),
        (of_another_size("pos_embed", 17), ["(17,), expected (1, 17, 64)"]),
        (of_another_size("register_tokens", 1, 4, 64), ["unexpected: reg_token (1, 4, 64)", "have register tokens"]),
        (of_another_size("blocks.4.norm1.weight", 64), ["unexpected: blocks.4.norm1.weight"]),
        (of_another_size("blocks.0.attn.qkv.lora_A.weight", 4, 64), ["lora_A", "low-rank adapters"]),
        (lambda state: state.pop("norm.bias"), ["missing: norm.bias (64,)"]),
        (lambda state: [state.pop(name) for name in weights() if "blocks" in name], ["48 differences", "and 43 more"]),
        (as_type(lambda value: value.to(torch.int8)), ["norm.weight is (64,) (torch.int8"]),
        (as_type(lambda value: value.bool()), ["torch.bool"]),
        (as_type(lambda value: value.to(torch.float8_e4m3fn)), ["torch.float8_e4m3fn"]),
        (as_type(lambda value: value.to_sparse()), ["torch.sparse_coo"]),
        (as_type(lambda value: value.to("meta")), ["on meta"]),
        (as_type(lambda value: torch.zeros(1).expand(10**13)), ["(10000000000000,)"]),
        (as_type(lambda value: value.double() * 1e300), ["NaN or infinite values in norm.weight"]),
        (as_type(lambda value: value * torch.nan), ["NaN or infinite values in norm.weight"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_shapes(
    change: Callable[[State], object], expected: list[str], tmp_path: Path
) -> None:
    state = dict(weights())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert all(words in message for words in expected), message


def test_weights_of_another_patch_size_name_the_model_they_are_of(tmp_path: Path) -> None:
    state = {"patch_embed.proj.weight": torch.zeros(384, 3, 8, 8), "cls_token": torch.zeros(1, 1, 384)}
    torch.save(state, tmp_path / "w.pth")
    small = VisionTransformer(img_size=32, embed_dim=384, depth=1, num_heads=1, num_classes=0)
    small.pretrained_cfg = {"architecture": "vit_small_patch16_224"}
    assert "(patches of 8 x 8, 3 channels, width 384; for example vit_small_patch8_224)" in refusal(
        tmp_path / "w.pth", small
    )


def test_a_flattened_patch_embedding_and_half_precision_are_read(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in weights().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    torch.save(state, tmp_path / "w.pth")
    model = glyph(2)
    load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, weights()[name].half().float()) for name, value in backbone_state(model).items())


def test_dinov2_with_registers_adds_the_class_position_to_its_token(tmp_path: Path) -> None:
    """timm's model with registers has positions for patches alone."""
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 0}
    target = VisionTransformer(**sizes, reg_tokens=4, no_embed_class=True)
    state = {name: torch.randn(value.shape) for name, value in backbone_state(target).items()}
    registers, token, patches = state.pop("reg_token"), torch.randn(1, 1, 8), state["pos_embed"]
    position = torch.randn(1, 1, 8)
    state |= {"register_tokens": registers, "cls_token": token, "pos_embed": torch.cat([position, patches], 1)}
    torch.save(state | {"mask_token": torch.zeros(1, 8)}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.reg_token, registers)
    assert torch.equal(target.cls_token, token + position)
    assert torch.equal(target.pos_embed, patches)


@pytest.mark.parametrize("payload", range(12))
def test_no_code_runs_beside_weights_in_a_training_checkpoint(payload: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    contents = malice.payloads(tmp_path, marker)
    if payload < len(contents):
        path = tmp_path / "w.pth"
        path.write_bytes(contents[payload])
        assert "code" in refusal(path)
    else:
        torch.save({"model": weights(), **training_facts(), "more": malice.Payload(marker)}, tmp_path / "w.pth")
        assert "code" in refusal(tmp_path / "w.pth")
    assert not marker.exists()


def test_the_content_tells_the_kind_of_file_and_not_its_name(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.bin")
    torch.save(weights(), tmp_path / "w.safetensors")
    assert loads(tmp_path / "w.bin") and loads(tmp_path / "w.safetensors")
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
        b"\x80\x02}q",
        b"PK\x03\x04",
        b"\x08\x07" * 9,
    ):
        for name in ("w.pth", "w.safetensors"):
            (tmp_path / name).write_bytes(content)
            assert f"{name} cannot be read (" in refusal(tmp_path / name)


def test_a_pickled_module_and_a_program_say_what_to_save(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pth")
    for name in ("module.pth", "program.pth"):
        assert "save the model's state_dict()" in refusal(tmp_path / name)
    torch.save(spelt_weights.training_facts(), tmp_path / "none.pth")
    assert "no vision transformer" in refusal(tmp_path / "none.pth")


def test_an_object_of_a_foreign_class_is_read_as_nothing(tmp_path: Path) -> None:
    torch.save({"record": spelt_weights.OwnRecord(), "settings": spelt_weights.OwnSettings(a=1)}, tmp_path / "w.pth")
    found = read_tensors(tmp_path / "w.pth")
    assert type(found["record"]) is not spelt_weights.OwnRecord and dict(found["settings"]) == {"a": 1}


def test_statistics_of_training_are_not_taken_for_weights(tmp_path: Path) -> None:
    noise = {name: torch.randn_like(value) for name, value in weights().items()}
    for word in ("ema_grads", "opt_ema", "ema_fisher"):
        torch.save({"params": weights(), word: noise}, tmp_path / "w.pth")
        assert loads(tmp_path / "w.pth"), word


def test_a_nested_tensor_is_no_weight(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({**weights(), "cls_token": nested}, tmp_path / "w.pth")
    assert "cls_token" in refusal(tmp_path / "w.pth")


def test_register_tokens_are_read_in_hugging_faces_spelling(tmp_path: Path) -> None:
    from fl_taskarith.models.spellings import _renamed

    assert set(_renamed({"embeddings.register_tokens": torch.ones(1)})) == {"reg_token"}
    assert set(_renamed({"register_tokens": torch.ones(1)})) == {"reg_token"}
