"""Seals of tensor files: what they cover, earlier ones, and files from elsewhere that use the same word."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fl_taskarith.storage import tensor_file
from fl_taskarith.storage.tensor_file import SEAL, check_seal, sealed, without_seal, write_sealed

FACTS = {"architecture": "vit", "input_size": "16", "classes": "[]", "head": "linear"}
TENSORS = {
    "weight": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0),
    "scalar": torch.tensor(2.5, dtype=torch.float64), "flags": torch.tensor([True, False]), "counts": torch.arange(3),
    "eighth": torch.ones(5).to(torch.float8_e4m3fn),
}  # fmt: skip


def earlier(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str], key: str = "sha256") -> None:
    """A file as it was sealed under a key without a prefix: two passes of safetensors' own writer."""
    plain = safetensors.torch.save(tensors, facts)
    start = 8 + int.from_bytes(plain[:8], "little")
    seal = tensor_file._digest(tensor_file.json.loads(plain[8:start]), [plain[start:]])
    path.write_bytes(safetensors.torch.save(tensors, facts | {key: seal}))


def test_what_is_written_piece_by_piece_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sealed(path, TENSORS, FACTS)
    assert path.read_bytes() == sealed(TENSORS, FACTS)
    assert check_seal(path)
    found = load_file(path)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].double(), value.double())
    with safe_open(path, "pt") as opened:
        assert without_seal(opened.metadata()) == FACTS


def test_files_sealed_under_the_earlier_key_are_checked(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"w": torch.arange(4.0)}
    for facts in (FACTS, {"shapes": "{}"}, {"merging": "{}"}):
        earlier(path, tensors, facts)
        assert check_seal(path)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        with pytest.raises(ValueError, match="changed or damaged"):
            check_seal(path)
        assert sealed(tensors, facts | {"sha256": "0"}) == sealed(tensors, facts)


@pytest.mark.parametrize(
    "facts", [{"sha256": "0" * 64}, {"sha256": "abc", "format": "pt"}, {"sha256": "0", "classes": "[]"}]
)
def test_a_file_from_elsewhere_may_use_the_word(facts: dict[str, str], tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", facts)
    assert not check_seal(tmp_path / "x.safetensors")


def test_a_cast_that_keeps_the_metadata_says_which_key_to_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sealed(path, {"w": torch.ones(2)}, FACTS)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file({"w": torch.ones(2).half()}, path, metadata)
    with pytest.raises(ValueError, match=f'changed or damaged.*write it without the key "{SEAL}"'):
        check_seal(path)
    save_file({"w": torch.ones(2).half()}, path, without_seal(metadata))
    assert not check_seal(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: (2**63).to_bytes(8, "little") + content[8:],
        lambda content: (4).to_bytes(8, "little") + b"null",
        lambda content: (2).to_bytes(8, "little") + b"[]",
        lambda content: (20).to_bytes(8, "little") + b'{"__metadata__": 3} ',
        lambda content: (26).to_bytes(8, "little") + b'{"__metadata__":{"a": [1]}}',
        lambda content: (60_000).to_bytes(8, "little") + b"[" * 60_000,
    ],
)
def test_a_header_that_is_none_is_told(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(sealed({"w": torch.ones(2)}, {})))
    with pytest.raises(ValueError):
        check_seal(path)
