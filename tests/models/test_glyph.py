"""vit_glyph: its registration, its shipped weights, and the pretraining on letters that made them."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fl_taskarith.models.glyph_pretraining import (
    LETTER_CLASSES,
    Glyph,
    distort,
    pretrain_glyph,
    render_alphabet,
    to_model_input,
)
from fl_taskarith.models.vit_glyph import VIT_GLYPH_WEIGHTS


@pytest.fixture(scope="module")
def alphabet() -> list[Glyph]:
    return render_alphabet()


def digit_inputs() -> tuple[torch.Tensor, np.ndarray]:
    digits = load_digits()
    return to_model_input(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)), digits.target


def ridge_accuracy(model: torch.nn.Module) -> float:
    inputs, labels = digit_inputs()
    with torch.inference_mode():
        features = model.eval()(inputs).numpy()
    split = train_test_split(features, labels, test_size=0.2, stratify=labels, random_state=0)
    train_features, test_features, train_labels, test_labels = split
    classifier = make_pipeline(StandardScaler(), RidgeClassifier()).fit(train_features, train_labels)
    return float(classifier.score(test_features, test_labels))


def test_builds_through_timm_with_few_parameters() -> None:
    model = timm.create_model("vit_glyph", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    config = timm.get_pretrained_cfg("vit_glyph")
    assert config is not None and config.mean == config.std == (0.5, 0.5, 0.5)
    assert timm.create_model("vit_glyph", num_classes=0, img_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_shipped_weights_load_strictly() -> None:
    model = timm.create_model("vit_glyph", num_classes=0)
    model.load_state_dict(load_file(VIT_GLYPH_WEIGHTS), strict=True)
    with safe_open(VIT_GLYPH_WEIGHTS, "pt") as weights:
        facts = json.loads(weights.metadata()["pretraining"])
    assert facts["architecture"] == "vit_glyph"
    assert float(facts["held_out_accuracy"]) > 0.5
    assert int(facts["num_classes"]) == len(LETTER_CLASSES)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_timm_loads_the_shipped_file_rather_than_downloading(num_classes: int) -> None:
    model = timm.create_model("vit_glyph", pretrained=True, num_classes=num_classes)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(VIT_GLYPH_WEIGHTS).items())


def test_alphabet_has_letters_only_and_ink_in_every_glyph(alphabet: list[Glyph]) -> None:
    assert all(glyph.character.isalpha() and len(glyph.character) == 1 for glyph in alphabet)
    assert len("".join(LETTER_CLASSES)) == len(set("".join(LETTER_CLASSES)))
    assert all(glyph.character in LETTER_CLASSES[glyph.label] for glyph in alphabet)
    assert min(float(glyph.image.max()) for glyph in alphabet) > 0.4
    assert {glyph.label for glyph in alphabet} == set(range(len(LETTER_CLASSES)))


def test_distortion_depends_on_the_generator_alone(alphabet: list[Glyph]) -> None:
    images = torch.stack([glyph.image for glyph in alphabet])

    def run(seed: int) -> torch.Tensor:
        return distort(images, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = run(5)
    torch.manual_seed(2)
    assert torch.equal(first, run(5))
    assert not torch.equal(first, run(6))
    assert first.shape == (len(alphabet), 1, 8, 8)
    assert torch.equal(first, first.round()) and first.min() >= 0 and first.max() == 16


def test_model_input_has_the_digits_range() -> None:
    inputs, _ = digit_inputs()
    assert inputs.shape == (1797, 3, 16, 16)
    assert inputs.min() == -1 and inputs.max() == 1
    assert torch.equal(inputs[:, 0], inputs[:, 2])


@pytest.mark.slow
def test_short_pretraining_is_reproducible_and_leaves_global_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected_draw = torch.rand(1)
    torch.manual_seed(3)
    messages: list[str] = []
    for name in ("first", "second"):
        pretrain_glyph(tmp_path / name, steps=4, threads=1, report=messages.append)
    assert torch.equal(torch.rand(1), expected_draw)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    pretrain_glyph(tmp_path / "other", seed=1, steps=4, threads=1, report=messages.append)
    assert (tmp_path / "first").read_bytes() != (tmp_path / "other").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "other", "second"]
    assert messages


@pytest.mark.slow
def test_pretraining_learns(tmp_path: Path) -> None:
    result = pretrain_glyph(tmp_path / "weights", steps=60, threads=1, report=lambda message: None)
    assert result["held_out_accuracy"] > 3 / result["num_classes"]
    assert result["num_fonts"] == 18


def test_pretraining_refuses_no_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        pretrain_glyph(tmp_path / "weights", steps=0)


def test_shipped_weights_beat_random_ones_on_digits() -> None:
    torch.manual_seed(0)
    random_model = timm.create_model("vit_glyph", num_classes=0)
    pretrained_model = timm.create_model("vit_glyph", num_classes=0, pretrained=True)
    assert ridge_accuracy(pretrained_model) > max(0.9, ridge_accuracy(random_model) + 0.05)
