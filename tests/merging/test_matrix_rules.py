"""Merge rules that see each matrix as a whole, and those that elect entries, against references written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith import merging
from fl_taskarith.config.choices import MERGE_RULES
from fl_taskarith.merging.matrices import by_matrix, matrix_shape
from fl_taskarith.merging.merge_rules import merge_rules
from fl_taskarith.merging.rules.electing import emr, magmax
from fl_taskarith.merging.rules.input_directions import ace, covariance, wudi
from fl_taskarith.merging.rules.sparsifying import breadcrumbs
from fl_taskarith.merging.rules.spectral import iso_c, iso_cts, tsv_m

Vector = dict[str, torch.Tensor]
SEEDS, NUMBERS = st.integers(0, 10_000), st.integers(1, 4)
SHAPES = {"fc.weight": (8, 6), "fc.bias": (8,), "proj.weight": (3, 2, 2, 2), "scale": ()}
FEW = settings(max_examples=20, deadline=None)


def drawn(number: int, seed: int, scale: float = 1.0) -> list[Vector]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        for _ in range(number)
    ]


def of(vectors: list[Vector], name: str = "fc.weight") -> list[np.ndarray]:
    return [vector[name].reshape(len(vector[name]), -1).numpy() for vector in vectors]


def polar(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_settings_name_every_rule() -> None:
    assert set(MERGE_RULES) == set(merge_rules())
    assert len(MERGE_RULES) == len(merge_rules())


def test_the_table_in_the_readme_is_that_of_the_rules() -> None:
    text = (Path(merging.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [rule.row() for rule in merge_rules().values()]


# which tensors are matrices


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("blocks.0.attn.qkv.weight", (9, 3), (9, 3)), ("patch_embed.proj.weight", (4, 3, 2, 2), (4, 12)),
     ("norm.weight", (3,), None), ("pos_embed", (1, 5, 3), None), ("cls_token", (1, 1, 3), None), ("scale", (), None),
     ("embeddings.position_embedding.weight", (50, 3), None), ("pos_embed", (5, 3), None),
     ("embeddings.patch_embedding.weight", (4, 3, 2, 2), (4, 12)), ("model.embed_tokens.weight", (50, 3), None),
     ("transformer.wte.weight", (50, 3), None), ("transformer.wpe.weight", (50, 3), None),
     ("shared.weight", (50, 3), None), ("layers.0.blocks.0.attn.relative_position_bias_table", (49, 3), None),
     ("layers.0.blocks.0.mlp.shared.weight", (9, 3), (9, 3))],
)  # fmt: skip
def test_matrices_are_what_inputs_are_multiplied_with(
    name: str, shape: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    assert matrix_shape(name, shape) == expected


@pytest.mark.parametrize("name", [name for name, rule in merge_rules().items() if rule.matrices])
def test_other_tensors_take_the_mean_and_shapes_stay(name: str) -> None:
    vectors, rule = drawn(3, 1), merge_rules()[name]
    found = rule.direction(vectors, 0.1 if rule.parameter else None, [1.0] * 3, 0)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in vectors[0].items()}
    for other in ("fc.bias", "scale"):
        assert torch.allclose(found[other], torch.stack([vector[other] for vector in vectors]).mean(0))
    flattened = [{"w.weight": vector["proj.weight"].flatten(1)} for vector in vectors]
    alone = rule.direction(flattened, 0.1 if rule.parameter else None, [1.0] * 3, 0)["w.weight"]
    assert torch.allclose(found["proj.weight"].flatten(1), alone), "a convolution is a matrix of its patches"


def test_fused_attention_is_three_matrices_for_singular_vectors_and_one_for_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    fused = [{"attn.qkv.weight": torch.cat(own)} for own in parts]
    for rule in (iso_c, iso_cts, tsv_m):
        apart = [rule([{"w": own[place]} for own in parts])["w"] for place in range(3)]
        assert torch.allclose(rule(fused)["attn.qkv.weight"], torch.cat(apart)), rule.name
    whole = covariance([{"w": torch.cat(own)} for own in parts], 0.0)["w"]
    assert torch.allclose(covariance(fused, 0.0)["attn.qkv.weight"], whole)


def test_task_vectors_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="no task vectors"):
        by_matrix([], lambda rows: rows[0])


# inputs


@given(SEEDS, st.integers(2, 4))
@settings(max_examples=4, deadline=None)
def test_wudi_takes_the_steps_of_its_authors(seed: int, number: int) -> None:
    vectors = drawn(number, seed, 1e-3)
    matrices = [vector["fc.weight"] for vector in vectors]
    expected = torch.nn.Parameter(sum(matrices, torch.zeros(())))
    optimizer = torch.optim.Adam([expected], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        sum(
            (((expected - own) @ own.mT).square().sum() / own.square().sum() for own in matrices), torch.zeros(())
        ).backward()
        optimizer.step()
    assert torch.allclose(wudi(vectors)["fc.weight"], expected.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1e-4, 1.0, 1.0), (0.9, 1.0, 1.2)])
def test_ace_is_its_formula(sizes: tuple[float, ...]) -> None:
    """The second case has log traces that spread widely, so that the spectral correction takes part."""
    vectors = [{name: size * value for name, value in vector.items()}
               for size, vector in zip(sizes, drawn(3, 7, 0.3), strict=True)]  # fmt: skip
    matrices = of(vectors)
    grams = [(centred := own - own.mean(0)).T @ centred for own in matrices]
    traces = np.array([np.trace(gram) for gram in grams])
    logs = np.log(traces)
    unlike = logs.var() / logs.mean() ** 2 > 0.3
    shares = traces if unlike else np.ones(3)
    scaled = [gram / share for gram, share in zip(grams, shares, strict=True)]
    row = sum(grams).mean(0) / (traces.mean() if unlike else 1.0)
    above, below = np.zeros((8, 6)), np.tile(row, (6, 1))
    for own, gram, share in zip(matrices, scaled, shares, strict=True):
        above += own @ (gram + 1e-2 / share * np.eye(6))
        below += gram + 1e-2 / share * np.eye(6)
    expected = above @ np.linalg.inv(below)
    if unlike:
        rest = sum(own @ (gram - sum(scaled) / 3) for own, gram in zip(matrices, scaled, strict=True))
        left, values, right = np.linalg.svd(expected + rest, full_matrices=False)
        expected = expected + values[:1].mean() * np.outer(left[:, 0], right[0])
    assert unlike == (sizes[0] < 0.1)
    np.testing.assert_allclose(ace(vectors)["fc.weight"].numpy(), expected, rtol=1e-8, atol=1e-10)


def test_ace_takes_the_mean_of_matrices_whose_rows_are_alike() -> None:
    vectors = [{"w": torch.ones(4, 3) * value} for value in (1.0, 3.0)]
    assert torch.equal(ace(vectors)["w"], torch.full((4, 3), 2.0))


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_a_shrinkage_that_is_no_share_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match="0 <= s <= 1"):
        covariance(drawn(2, 0), shrinkage)


# singular vectors


@given(SEEDS, NUMBERS)
@FEW
def test_iso_c_has_the_sums_directions_with_one_size(seed: int, number: int) -> None:
    vectors = drawn(number, seed)
    total, found = sum(of(vectors)), iso_c(vectors)["fc.weight"].numpy()
    size = np.linalg.svd(total, compute_uv=False).mean()
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), size, rtol=1e-8)
    np.testing.assert_allclose(found, size * polar(total), rtol=1e-6, atol=1e-8)


@given(SEEDS, NUMBERS)
@FEW
def test_iso_cts_is_its_recipe(seed: int, number: int) -> None:
    vectors = drawn(number, seed)
    matrices = of(vectors)
    own = round((6 - 4) / number)  # of rank 6, int(0.8 * 6) = 4 are common
    common = 6 - own * number
    left, sizes, right = np.linalg.svd(sum(matrices), full_matrices=False)
    shared = left[:, :common]
    lefts, values, rights = [shared], [sizes[:common]], [right[:common]]
    for each in matrices:
        left, sizes, right = np.linalg.svd(each - shared @ shared.T @ each, full_matrices=False)
        lefts, values, rights = [*lefts, left[:, :own]], [*values, sizes[:own]], [*rights, right[:own]]
    expected = np.concatenate(values).mean() * polar(np.hstack(lefts)) @ polar(np.vstack(rights))
    np.testing.assert_allclose(iso_cts(vectors)["fc.weight"].numpy(), expected, rtol=1e-6, atol=1e-8)


@given(SEEDS)
@FEW
def test_tsv_m_of_orthogonal_task_vectors_of_low_rank_is_the_sum_and_of_one_itself(seed: int) -> None:
    vectors = drawn(1, seed)
    assert torch.allclose(tsv_m(vectors)["fc.weight"], vectors[0]["fc.weight"])
    left, _, right = torch.linalg.svd(vectors[0]["fc.weight"], full_matrices=False)
    parts = [{"w": (left[:, own] * torch.tensor([5.0, 2.0, 1.0])) @ right[own]} for own in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(tsv_m(parts)["w"], parts[0]["w"] + parts[1]["w"])


@given(SEEDS, NUMBERS)
@FEW
def test_tsv_m_is_its_recipe(seed: int, number: int) -> None:
    vectors = drawn(number, seed)
    lefts, values, rights = [], [], []
    for own in of(vectors):
        left, sizes, right = np.linalg.svd(own, full_matrices=False)
        lefts.append(left[:, : 6 // number])
        values.append(sizes[: 6 // number])
        rights.append(right[: 6 // number])
    expected = polar(np.hstack(lefts)) @ np.diag(np.concatenate(values)) @ polar(np.vstack(rights))
    np.testing.assert_allclose(tsv_m(vectors)["fc.weight"].numpy(), expected, rtol=1e-6, atol=1e-8)


# entries


@given(SEEDS, NUMBERS)
@FEW
def test_entries_are_elected_by_magnitude(seed: int, number: int) -> None:
    vectors = drawn(number, seed)
    largest, unified = magmax(vectors), emr(vectors)
    for name in SHAPES:
        columns = np.stack([vector[name].numpy().reshape(-1) for vector in vectors]).T
        assert largest[name].flatten().tolist() == [max(column, key=abs) for column in columns]
        signs = [np.sign(column.sum()) for column in columns]
        expected = [sign * max(abs(value) for value in column if np.sign(value) == sign)
                    for sign, column in zip(signs, columns, strict=True)]  # fmt: skip
        assert unified[name].flatten().tolist() == expected


def test_a_sum_of_zero_elects_nothing() -> None:
    vectors = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-1.0, 0.0])}]
    assert emr(vectors)["w"].tolist() == [0, 0]
    assert magmax(vectors)["w"].tolist() == [1, 0]


def test_breadcrumbs_drops_both_ends_of_every_tensor() -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    vector = {"w": ((order + 1.0) * (-1.0) ** order).view(10, 20), "b": torch.ones(3)}
    found = breadcrumbs([vector, vector])
    kept = (vector["w"].abs() > 30) & (vector["w"].abs() <= 198)
    assert torch.equal(found["w"], 2 * vector["w"] * kept)
    assert found["b"].tolist() == [2.0] * 3
    assert float(vector["w"].abs().min()) == 1, "task vectors are left as they are"
