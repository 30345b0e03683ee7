"""The mask itself: packing, overlap, and files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_taskarith.errors import CheckpointError
from fl_taskarith.masking.mask import Mask, load_mask, save_mask

# the mask itself


MASKS = st.builds(
    lambda seed, density: {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(seed + number)) < density
        for number, (name, shape) in enumerate({"a": (3, 7), "b": (13,), "c": (), "d": (2, 2, 2)}.items())
    },
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_packing_gathering_and_scattering_are_inverse(tensors: dict[str, Tensor]) -> None:
    mask = Mask(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    again = Mask.unpacked(mask.packed(), shapes)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())
    assert mask.updated == sum(int(tensor.sum()) for tensor in tensors.values())
    assert sum(value.numel() for value in mask.packed().values()) == 3 + 2 + 1 + 1

    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    before = {name: value.clone() for name, value in weights.items()}
    values = mask.gather(weights)
    assert sum(value.numel() for value in values.values()) == mask.updated
    mask.scatter_(weights, {name: value + 1 for name, value in values.items()})
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], torch.where(tensor, before[name] + 1, before[name])), name


@given(MASKS, MASKS)
@settings(max_examples=40, deadline=None)
def test_overlap_against_sets(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    def as_set(tensors: dict[str, Tensor]) -> set[tuple[str, int]]:
        return {(name, int(index)) for name, tensor in tensors.items() for index in tensor.flatten().nonzero()}

    mine, theirs = as_set(first), as_set(second)
    expected = len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0
    assert Mask(first).jaccard(Mask(second)) == pytest.approx(expected)


def test_values_of_another_mask_are_refused() -> None:
    mask = Mask({"a": torch.tensor([True, False, True])})
    with pytest.raises(ValueError, match="another mask: a"):
        mask.scatter_({"a": torch.zeros(3)}, {"a": torch.zeros(1)})


def test_a_file_holds_one_bit_per_weight(tmp_path: Path) -> None:
    mask = Mask({"a": torch.rand(300, 400) < 0.1, "b": torch.rand(11) < 0.5})
    save_mask(tmp_path / "mask.safetensors", mask, {"rule": "random"})
    again, facts = load_mask(tmp_path / "mask.safetensors")
    assert facts == {"rule": "random"}
    assert mask.jaccard(again) == 1.0
    assert (tmp_path / "mask.safetensors").stat().st_size < 300 * 400 / 8 + 1000


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no mask", "pickle"])
def test_a_file_that_is_no_mask_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "mask.safetensors"
    save_mask(path, Mask({"a": torch.ones(300, dtype=torch.bool)}), {})
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "no mask":
        import safetensors.torch

        safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-1], "pickle": b"cos\nsystem\n"}[damage])
    with pytest.raises(CheckpointError, match=r"mask\.safetensors"):
        load_mask(path)


@pytest.mark.parametrize(
    "shapes",
    [
        "null", "[]", '{"a": 300}', '{"a": [-300, -1]}', '{"a": [300.0]}', '{"a": [true, 300]}', '{"a": [[300]]}',
        '{"a": [4294967296, 4294967296, 300]}', '{"a": [0, 9223372036854775807]}', '{"b": [300]}', "[" * 9999,
        '{"a": [300], "b": [1]}', '{"a": ["300"]}', '{"a": [1e400]}', '{"a": null}',
    ],
)  # fmt: skip
def test_shapes_that_no_mask_has_are_an_error_that_names_the_file(tmp_path: Path, shapes: str) -> None:
    import safetensors.torch

    path = tmp_path / "mask.safetensors"
    packed = Mask({"a": torch.ones(300, dtype=torch.bool)}).packed()
    safetensors.torch.save_file(packed, path, {"shapes": shapes})
    with pytest.raises(CheckpointError, match=r"mask\.safetensors cannot be read as a mask"):
        load_mask(path)
    safetensors.torch.save_file(packed, path, {"shapes": '{"a": [3, 100]}'})
    assert load_mask(path)[0].updated == 300
