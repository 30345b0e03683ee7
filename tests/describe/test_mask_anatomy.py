"""What masks look like: their parts, their overlap, and figures of them and of sensitivities."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure

from fl_taskarith.describe import mask_plots, sensitivity_plot
from fl_taskarith.describe.mask_plots import _limits, _short, plot_anatomy
from fl_taskarith.describe.mask_report import DescribedMask, anatomy_table, overlap_table, summarise
from fl_taskarith.describe.sensitivity_plot import (
    KindScores,
    plot_sensitivity,
    scores_by_kind,
    thresholds,
    zero_lines,
)
from fl_taskarith.masking.anatomy import KINDS, density_by_kind, density_by_layer, key_biases, parts
from fl_taskarith.masking.mask import Mask, between_pairs, chance_overlap, jaccard_matrix
from fl_taskarith.models.backbone import HEAD_PARAMETERS

MODELS = {
    "vit_glyph": 16,
    "vit_small_patch16_224.dino": 32,
    "vit_small_patch14_dinov2": 28,
    "vit_small_patch14_reg4_dinov2": 28,
}


def random_mask(model: str, density: float = 0.1) -> Mask:
    built = timm.create_model(model, pretrained=False, num_classes=0, img_size=MODELS[model])
    generator = torch.Generator().manual_seed(0)
    return Mask({n: torch.rand(value.shape, generator=generator) < density for n, value in built.named_parameters()})


def bits(*values: int) -> Mask:
    return Mask({"norm.weight": torch.tensor(values, dtype=torch.bool)})


# Anatomy


@pytest.mark.parametrize("model", MODELS)
def test_every_weight_has_a_layer_and_a_kind_that_is_named(model: str) -> None:
    mask = random_mask(model)
    found = parts(mask)
    depth = 4 if model == "vit_glyph" else 12
    assert "other" not in {kind for _, kind in found}
    assert list(density_by_layer(mask)) == ["embedding", *(f"block {number}" for number in range(depth)), "norm"]
    expected = set(KINDS) - {"other"} - (set() if "dinov2" in model else {"scale"})
    assert set(density_by_kind(mask)) == expected
    for groups in (found, density_by_layer(mask), density_by_kind(mask)):
        assert sum(part.updated for part in groups.values()) == mask.updated
        assert sum(part.size for part in groups.values()) == mask.size
    width = 64 if model == "vit_glyph" else 384
    assert found["block 1", "q"].size == found["block 1", "v"].size == width * (width + 1)
    assert found["block 1", "norm"].size == 4 * width
    assert found["embedding", "token"].size == width * (5 if "reg4" in model else 1)
    assert not set(HEAD_PARAMETERS) & set(mask.tensors)


def test_thirds_of_attention_and_key_biases_are_counted_where_they_lie() -> None:
    mask = Mask({
        "blocks.2.attn.qkv.weight": torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool),
        "blocks.2.attn.qkv.bias": torch.tensor([0, 1, 0], dtype=torch.bool),
        "blocks.2.ls1.gamma": torch.tensor([1], dtype=torch.bool),
    })  # fmt: skip
    found = {key: (part.updated, part.size) for key, part in parts(mask).items()}
    assert found == {
        ("block 2", "q"): (2, 3), ("block 2", "k"): (2, 3), ("block 2", "v"): (0, 3), ("block 2", "scale"): (1, 1),
    }  # fmt: skip
    assert key_biases(mask) == 1
    table = anatomy_table(DescribedMask(mask, "tiny", {})).splitlines()
    assert table[1].startswith("1 of them")
    assert table[-2].split() == ["block", "2", "66.67", "66.67", "0.00", "100.00", "50.00"]
    summary = summarise(DescribedMask(mask, "tiny", {"rule": "random"}))
    assert summary["density_by_layer_and_kind"] == {"block 2": {"q": 2 / 3, "k": 2 / 3, "v": 0.0, "scale": 1.0}}


def test_what_is_nearly_nothing_or_nearly_all_reads_as_such() -> None:
    weight = torch.zeros(300, 100, dtype=torch.bool)
    weight[0, 0] = True
    table = anatomy_table(DescribedMask(Mask({"a.mlp.fc1.weight": weight, "norm.weight": ~weight}), "tiny", {}))
    assert "<0.01" in table
    assert ">99.99" in table
    assert [_short(value) for value in (0, 0.003, 9.996, 99.97, 100)] == ["0", "<0.01", "10.0", ">99.9", "100"]


# Overlap


def test_overlap_equals_what_a_hand_counts() -> None:
    masks = [bits(1, 1, 0, 0), bits(0, 1, 1, 0), bits(0, 0, 0, 1), bits(1, 1, 0, 0)]
    third = 1 / 3
    assert jaccard_matrix(masks) == [[1, third, 0, 1], [third, 1, 0, third], [0, 0, 1, 0], [1, third, 0, 1]]
    assert between_pairs([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == [2, 3, 6]
    assert chance_overlap(0.1, 0.1) == pytest.approx(1 / 19)
    assert chance_overlap(0.5, 1.0) == 0.5
    assert chance_overlap(0.0, 0.3) == 0.0
    assert chance_overlap(0.0, 0.0) == 1.0
    assert "0.3333" in overlap_table(["a", "b"], jaccard_matrix(masks[:2]), [[0.1, 0.2], [0.2, 0.1]])


densities = st.integers(1, 40).map(lambda tenth: tenth / 40)


@given(densities, densities)
def test_chance_is_what_two_masks_overlap_whose_entries_are_independent(one: float, other: float) -> None:
    """All 40 x 40 combinations of an entry of one and of the other: independence without sampling."""
    grid = torch.arange(1600)
    first, second = (grid % 40 < round(40 * one)), (grid // 40 < round(40 * other))
    expected = Mask({"a": first}).jaccard(Mask({"a": second}))
    assert chance_overlap(one, other) == pytest.approx(expected)
    assert chance_overlap(other, one) == pytest.approx(expected)


# Figure


def test_figures_are_the_same_bytes_each_time_and_survive_extreme_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # the time that files would carry if they carried one
    names = ("blocks.0.mlp.fc1.weight", "norm.weight")
    for name, first in {"none": torch.zeros(8), "all": torch.ones(8), "some": torch.arange(8) < 1}.items():
        mask = Mask({names[0]: first.bool(), names[1]: first.bool()})
        written = plot_anatomy(DescribedMask(mask, "tiny", {}), tmp_path / name)
        assert [path.name for path in written] == [f"{name}.png", f"{name}.pdf"]
    before = [path.read_bytes() for path in written]
    assert before[0].startswith(b"\x89PNG")
    assert before[1].startswith(b"%PDF")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    plot_anatomy(DescribedMask(mask, "tiny", {}), tmp_path / "some")
    assert [path.read_bytes() for path in written] == before


def test_a_logarithmic_scale_has_points_and_no_bars_and_no_tick_above_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Figure] = []
    monkeypatch.setattr(mask_plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    kinds = {"blocks.0.attn.proj.weight": 900, "blocks.0.mlp.fc1.weight": 2, "blocks.0.norm1.weight": 0}
    mask = Mask({name: torch.arange(1000) < updated for name, updated in kinds.items()})
    plot_anatomy(DescribedMask(mask, "tiny", {}), tmp_path / "anatomy")
    below = shown[0].axes[2]
    assert below.get_yscale() == "log" and not below.containers
    assert list(below.lines[0].get_ydata()) == pytest.approx([90.0, 0.2]), "what is 0 has no place on the axis"
    assert max(below.get_yticks()) <= 100
    pyplot.close("all")


def tiny_scores(**facts: object) -> tuple[dict[str, KindScores], DescribedMask]:
    """Ten weights of a query, a key bias of no gradient, and an MLP with a score of 0; a mask of three of them."""
    scores = {"blocks.0.attn.qkv.bias": torch.tensor([1e-3, 0.0, 1e-1]), "blocks.0.mlp.fc1.weight": torch.tensor(
        [0.0, 1e-4, 1e-2, 1.0, 10.0, 100.0, 1e3])}  # fmt: skip
    mask = Mask({name: value < 1e-3 for name, value in scores.items()})
    described = DescribedMask(mask, "tiny", {"rule": "least-sensitive", **facts})
    return scores_by_kind(scores, described), described


def test_scores_stand_by_kind_with_their_mask_and_thresholds_cut_as_a_calibration_does() -> None:
    kinds, described = tiny_scores(densities=[0.5, 0.3], calibration_rounds=2)
    assert {kind: each.scores.tolist() for kind, each in kinds.items()} == {
        "q": [pytest.approx(1e-3)], "v": [pytest.approx(0.1)], "mlp": pytest.approx([0, 1e-4, 1e-2, 1, 10, 100, 1e3]),
        "key biases": [0.0],
    }  # fmt: skip
    assert kinds["mlp"].kept.tolist() == [True, True, False, False, False, False, False]
    assert kinds["key biases"].kept.tolist() == [True]
    cuts = thresholds(kinds, described)  # of 0, 0, 1e-4, 1e-3, 1e-2, ...: half are 5, and three are the mask
    assert list(cuts.values()) == pytest.approx([1e-2, 1e-4])
    most = dataclasses.replace(described, facts={"rule": "most-sensitive", "densities": [0.2], "calibration_rounds": 1})
    assert thresholds(kinds, most) == {"threshold": 100.0}
    assert thresholds(kinds, described, 0.5) == {"threshold: 0.5": 0.5}
    assert zero_lines(kinds) == ["not drawn, score 0: 1 weights of mlp", "not drawn: 1 key biases (gradient 0)"]


def test_sensitivities_are_drawn_by_kind_on_a_logarithmic_axis_with_the_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Figure] = []
    monkeypatch.setattr(sensitivity_plot, "save_figure", lambda figure, output: shown.append(figure) or [output])
    kinds, described = tiny_scores(densities=[0.5, 0.3], calibration_rounds=2)
    plot_sensitivity(kinds, described, tmp_path / "sensitivity")
    drawn = shown[0].axes
    assert [axes.get_ylabel() for axes in drawn] == ["q", "v", "mlp"]
    assert all(axes.get_xscale() == "log" for axes in drawn)
    assert all([line.get_xdata()[0] for line in axes.lines] == pytest.approx([1e-2, 1e-4]) for axes in drawn)
    everything, kept = (patch.get_data().values for patch in drawn[2].patches)
    assert (everything.sum(), kept.sum()) == (6, 1), "what is 0 has no place on the axis"
    pyplot.close("all")
    nothing = {kind: KindScores(0 * each.scores, each.kept) for kind, each in kinds.items()}
    plot_sensitivity(nothing, described, tmp_path / "nothing")
    pyplot.close("all")


def test_the_colours_are_logarithmic_where_densities_span_decades() -> None:
    assert _limits(torch.tensor([0.0, 5.0, 20.0]).numpy()) == (0.0, 20.0)
    assert _limits(torch.tensor([0.0, 0.5, 20.0]).numpy()) == (0.5, 20.0)
    low, high = _limits(torch.zeros(3).numpy())
    assert low == 0.0 < high
