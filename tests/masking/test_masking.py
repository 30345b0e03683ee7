"""Masks: calibration, rules at exactly equal density, what may be masked, files."""

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fl_taskarith.models.vit_glyph
from fl_taskarith import simulate
from fl_taskarith.config.fields import MASK_RULES
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.masking import rules
from fl_taskarith.masking.anatomy import KINDS, density_by_kind, of_kinds, redrawn_by_kind
from fl_taskarith.masking.calibration import calibrate, damped, keep_extreme
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.seeding import random_generator
from fl_taskarith.workspace.make_mask import make_mask, server_sums, shard_sums
from fl_taskarith.workspace.workspace import Workspace, workspace

assert fl_taskarith.models.vit_glyph  # registers the model with timm


# rules and calibration


def scores_of(values: list[float]) -> dict[str, Tensor]:
    """Split over two tensors, so that the threshold has to be global."""
    half = len(values) // 2
    return {"a": torch.tensor(values[:half]), "b": torch.tensor(values[half:]).view(1, -1)}


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_exactly_the_number_asked_for_is_kept_whatever_the_ties(values: list[float], data: st.DataObject) -> None:
    count, largest = data.draw(st.integers(1, len(values))), data.draw(st.booleans())
    scores = scores_of(values)
    found = keep_extreme(scores, Mask.full(scores), count, largest)
    threshold = sorted(values, reverse=largest)[count - 1]
    kept = torch.cat([found.mask.tensors["a"], found.mask.tensors["b"].flatten()]).tolist()
    better = [value > threshold if largest else value < threshold for value in values]
    assert sum(kept) == count
    assert found.threshold == threshold
    assert found.tied == values.count(threshold)
    assert found.tied_kept == count - sum(better)
    assert all(keep for keep, is_better in zip(kept, better, strict=True) if is_better)
    assert all(is_better or value == threshold for keep, is_better, value in zip(kept, better, values, strict=True)
               if keep)  # fmt: skip
    assert found.arbitrary == (0 < found.tied_kept < found.tied), "among so few entries, any choice is material"


@pytest.mark.parametrize("largest", [False, True])
def test_a_few_ties_are_kept_in_the_models_order(largest: bool) -> None:
    values = torch.arange(2000.0)
    values[995:1005] = 1000.0
    scores = {"a": values[:1000], "b": values[1000:]}
    found = keep_extreme(scores, Mask.full(scores), 1000, largest)
    assert (found.tied, found.tied_kept, found.arbitrary) == (10, 5, False)
    expected = [*range(995, 1000), *range(1005, 2000)] if largest else [*range(1000)]
    assert torch.cat(list(found.mask.tensors.values())).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("largest", [False, True])
def test_many_ties_favour_no_tensor(largest: bool) -> None:
    scores = {"a": torch.zeros(3000), "b": torch.zeros(50, 20), "c": torch.arange(1.0, 1001.0)}
    count = 2000 + 1000 * largest
    found = keep_extreme(scores, Mask.full(scores), count, largest)
    assert (found.tied, found.tied_kept, found.arbitrary) == (4000, 2000, True)
    assert int(found.mask.tensors["a"].sum()) == pytest.approx(1500, abs=100)
    assert int(found.mask.tensors["b"].sum()) == pytest.approx(500, abs=100)
    again = keep_extreme(scores, Mask.full(scores), count, largest)
    assert again.mask.jaccard(found.mask) == 1.0, "the same every time"


@pytest.mark.parametrize(
    ("rule", "remedy"), [("least-sensitive", "raise calibration-size"), ("lowest-magnitude", "change density")]
)
def test_a_mask_that_ties_decide_is_told_once(rule: str, remedy: str, caplog: pytest.LogCaptureFixture) -> None:
    scores = {"a": torch.zeros(600), "b": torch.arange(1.0, 401.0)}
    calibrate(lambda *_: (scores, 1), Mask.full(scores), rule, density=0.25, threshold=None, rounds=2)
    assert len(caplog.records) == 1
    assert "finds 600 weights tied at the threshold, a score of 0, and keeps a random 500 of them" in caplog.text
    assert remedy in caplog.text
    caplog.clear()
    calibrate(lambda *_: (scores, 1), Mask.full(scores), rule, density=0.7, threshold=None, rounds=1)
    calibrate(lambda *_: (scores, 1), Mask.full(scores), rule, density=0.6, threshold=None, rounds=1)
    calibrate(lambda *_: (scores, 1), Mask.full(scores), "most-sensitive", density=None, threshold=1.0, rounds=1)
    assert not caplog.records, "all of the tied entries are kept, or none"


def test_a_score_that_is_nan_is_refused() -> None:
    scores = scores_of([1.0, math.nan, 2.0, 3.0])
    with pytest.raises(ValueError, match="NaN"):
        keep_extreme(scores, Mask.full(scores), 2, False)


@given(st.floats(0.01, 1.0), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_each_round_keeps_its_share_and_never_takes_an_entry_back(density: float, rounds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maskable = Mask.full({"a": torch.zeros(40, 5), "b": torch.zeros(100)})
    seen: list[Mask] = []

    def score(calibration_round: int, alive: Mask) -> tuple[dict[str, Tensor], int]:
        seen.append(alive)
        return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in maskable.tensors.items()}, 7

    found = calibrate(score, maskable, "least-sensitive", density=density, threshold=None, rounds=rounds)
    assert found.mask.updated == round(density * 300)
    alive = [*seen[1:], found.mask]
    for number, (earlier, later) in enumerate(itertools.pairwise([maskable, *alive]), start=1):
        assert later.updated == round(density ** (number / rounds) * 300)
        for name, tensor in later.tensors.items():
            assert not (tensor & ~earlier.tensors[name]).any()
    assert found.densities == tuple(mask.density for mask in alive)


def test_a_threshold_and_the_density_it_reports_say_the_same() -> None:
    scores = scores_of([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    for rule, threshold, kept in (("least-sensitive", 2.5, 3), ("most-sensitive", 3.5, 2)):
        maskable = Mask.full(scores)
        by_threshold = calibrate(lambda *_: (scores, 1), maskable, rule, density=None, threshold=threshold, rounds=2)
        assert by_threshold.mask.updated == kept
        again = calibrate(
            lambda *_: (scores, 1), maskable, rule, density=by_threshold.mask.density, threshold=None, rounds=1
        )
        assert again.mask.jaccard(by_threshold.mask) == 1.0
        back = calibrate(lambda *_: (scores, 1), maskable, rule, density=None, threshold=again.threshold, rounds=1)
        assert back.mask.jaccard(again.mask) == 1.0
    with pytest.raises(ConfigError, match="largest sensitivity is 5"):
        calibrate(lambda *_: (scores, 1), Mask.full(scores), "most-sensitive", density=None, threshold=6.0, rounds=1)


def test_damping_touches_the_dropped_entries_only() -> None:
    weights = {"a": torch.tensor([1.0, -2.0, 3.0])}
    alive = Mask({"a": torch.tensor([True, False, True])})
    assert damped(weights, alive, 0.1)["a"].tolist() == pytest.approx([1.0, -0.2, 3.0])
    assert torch.equal(damped(weights, alive, 1.0)["a"], weights["a"])
    assert weights["a"].tolist() == [1.0, -2.0, 3.0]


@pytest.fixture
def masked_config(quick_config: Config) -> Config:
    """The federation of the other tests under a mask; labels that are not drawn, so that rounds differ by damping."""
    return dataclasses.replace(quick_config, mask_rule="least-sensitive", fisher_labels="true", calibration_size=20)


def mask_under(config: Config) -> Mask:
    home = workspace(config)
    head = {name: home.pretrained[name] for name in HEAD_PARAMETERS}
    head["head.weight"] = torch.randn(head["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    return make_mask(home, server_sums(home, head)).mask


def test_more_rounds_matter_because_of_damping_and_only_because_of_it(masked_config: Config) -> None:
    one, four = (dataclasses.replace(masked_config, calibration_rounds=rounds) for rounds in (1, 4))
    assert mask_under(four).jaccard(mask_under(one)) < 0.99
    undamped = [mask_under(dataclasses.replace(config, soft_zero=1.0)) for config in (one, four)]
    assert undamped[0].jaccard(undamped[1]) == 1.0


def test_calibration_leaves_the_pretrained_weights_to_the_bit(masked_config: Config) -> None:
    home = Workspace(masked_config)
    before = {name: value.clone() for name, value in home.pretrained.items()}
    head = {name: home.pretrained[name] for name in HEAD_PARAMETERS}
    make_mask(home, server_sums(home, head))
    for name, value in before.items():
        assert torch.equal(home.pretrained[name], value), name
        assert torch.equal(home.parameters[name], value), name


def test_a_rule_of_ones_own_is_named_by_its_module(masked_config: Config) -> None:
    ours = dataclasses.replace(masked_config, mask_rule="own_mask_rule:FIRST", num_rounds=1)
    assert not ours.scored
    mask = load_mask(simulate(ours).folder / "mask.safetensors")[0]
    chosen = torch.cat([tensor.flatten() for tensor in mask.tensors.values()])
    assert chosen[: mask.updated].all() and mask.updated == round(ours.density * mask.size)
    own, known = (
        dataclasses.replace(masked_config, mask_rule=rule) for rule in ("own_mask_rule:MIDDLING", "most-sensitive")
    )
    assert own.scored
    assert mask_under(own).jaccard(mask_under(known)) == 1


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("own_mask_rule:MISSING", "has no attribute"),
        ("no_such_module:A", "No module named"),
        ("own_mask_rule:NO_RULE", "no mask rule"),
        ("leastsensitive", "own"),
    ],
)
def test_a_mask_rule_that_is_none_is_refused(rule: str, reason: str, masked_config: Config) -> None:
    with pytest.raises(ConfigError, match=reason):
        simulate(dataclasses.replace(masked_config, mask_rule=rule))
    assert not Path(masked_config.results_dir).exists(), "before a folder is made"


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"scores": "text"}, "scores are of type str: expected a function"),
     ({"scores": print, "salient": True}, "on which salient has no effect"),
     ({"scores": print, "redrawn_by_kind": True}, "on which redrawn_by_kind has no effect"),
     ({"kinds": "q"}, "kinds are of type str: expected a tuple")],
)  # fmt: skip
def test_a_mask_rule_that_contradicts_itself_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rules.MaskRule("a rule", "none", **given)


@pytest.mark.parametrize(
    ("name", "reason"), [("none", 'mask-rule = "none" has a meaning already'), ("shared_by_some", "no mask rule")]
)
def test_a_file_among_the_rules_that_is_no_rule_is_named(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text("HELP = 1\n")
    (tmp_path / "_helpers.py").write_text("HELP = 1\n")
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match=reason) as caught:
        rules.rules_in(tmp_path)
    assert str(tmp_path / f"{name}.py") in str(caught.value)


def test_every_file_of_a_rule_is_a_setting() -> None:
    files = {path.stem.replace("_", "-") for path in Path(rules.__file__).parent.glob("[a-z]*.py")}
    assert files == set(MASK_RULES) == set(rules.RULES)
    script = "import sys, fl_taskarith.config.fields; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("rule", MASK_RULES)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_every_rule_updates_exactly_as_many_weights(masked_config: Config, rule: str, density: float) -> None:
    config = dataclasses.replace(masked_config, mask_rule=rule, density=density, calibration_rounds=1)
    if (rule, density) == ("queries-keys", 0.5):
        return  # more than there are: below
    mask = mask_under(config)
    assert mask.updated == round(density * mask.size)
    assert mask.size == sum(value.numel() for value in workspace(config).maskable().values())
    assert mask.jaccard(mask_under(config)) == 1.0, "a rule is a function of the configuration"


def test_rules_pick_what_they_say(masked_config: Config) -> None:
    home = workspace(masked_config)
    magnitudes = torch.cat([value.abs().flatten() for value in home.maskable().values()])

    def picked(rule: str) -> Tensor:
        mask = mask_under(dataclasses.replace(masked_config, mask_rule=rule, calibration_rounds=1))
        return torch.cat([tensor.flatten() for tensor in mask.tensors.values()])

    lowest, highest, random = (picked(f"{which}") for which in ("lowest-magnitude", "highest-magnitude", "random"))
    assert magnitudes[lowest].max() <= magnitudes[~lowest].min()
    assert magnitudes[highest].min() >= magnitudes[~highest].max()
    assert not (picked("least-sensitive") & picked("most-sensitive")).any()
    assert 0.05 < random[: len(random) // 2].float().mean() < 0.15
    other = mask_under(dataclasses.replace(masked_config, mask_rule="random", seed=1))
    chance = 0.1 / 1.9
    both = mask_under(dataclasses.replace(masked_config, mask_rule="random")).jaccard(other)
    assert both == pytest.approx(chance, rel=0.1), "two seeds overlap as chance has it"


def test_saliency_of_clients_is_the_mean_of_theirs_weighted_by_their_examples(masked_config: Config) -> None:
    """SSFL: gradients cancel within a client, and not between two."""
    config = dataclasses.replace(masked_config, mask_rule="most-salient", calibration_rounds=1, classes_per_client=1)
    home, alive = workspace(config), Mask.full(workspace(config).maskable())
    head = {name: torch.full_like(home.pretrained[name], 0.1) for name in HEAD_PARAMETERS}
    head["head.weight"][:5] = 0.0
    weights = home.maskable()
    for client in (0, 3):
        sums, examples = shard_sums(home, head, client)(1, alive)
        shard = home.data.train.take(home.shards[client])
        home.load(home.pretrained | head)
        home.model.eval().requires_grad_(True)
        inputs = home.preprocessing.evaluation_inputs(shard.images)
        loss = torch.nn.functional.cross_entropy(home.model(inputs), shard.labels)
        gradients = torch.autograd.grad(loss, [home.parameters[name] for name in weights])
        for (name, value), gradient in zip(weights.items(), gradients, strict=True):
            assert torch.allclose(sums[name] / examples, (gradient * value).abs(), rtol=1e-3, atol=1e-7), name


def test_kinds_of_rules_are_kinds_of_tensors() -> None:
    for rule in rules.RULES.values():
        assert set(rule.kinds) <= set(KINDS)
    assert set(KINDS) - set(rules.RULES["no-values-projections"].kinds) == {"v", "proj"}


@pytest.mark.parametrize(
    ("rule", "kinds"), [("queries-keys", {"q", "k"}), ("no-values-projections", set(KINDS) - {"v", "proj"})]
)
def test_a_control_chooses_among_its_kinds_at_random_up_to_all_of_them(
    masked_config: Config, rule: str, kinds: set[str]
) -> None:
    config = dataclasses.replace(masked_config, mask_rule=rule)
    mask = mask_under(config)
    parts = density_by_kind(mask)
    share = mask.updated / sum(parts[kind].size for kind in kinds if kind in parts)
    for kind, part in parts.items():
        expected = share if kind in kinds else 0.0
        assert part.density == pytest.approx(expected, abs=0.0 if kind not in kinds else 5 * (share / part.size) ** 0.5)
    assert mask_under(dataclasses.replace(config, seed=1)).jaccard(mask) < 2 * share, "another seed, another draw"
    with pytest.raises(ConfigError, match="the largest is") as caught:
        simulate(config, density=1.0, run_name="refused")
    assert not (Path(config.results_dir) / "refused").exists(), "before a folder is made, or the head solved"
    largest = float(str(caught.value).split("the largest is ")[1].split(",")[0])
    fullest = mask_under(dataclasses.replace(config, density=largest))
    assert all(part.density > 0.98 for kind, part in density_by_kind(fullest).items() if kind in kinds)


def test_random_by_kind_has_the_shares_of_the_least_sensitive_mask_and_no_more_of_it(masked_config: Config) -> None:
    ranked = mask_under(masked_config)
    drawn = mask_under(dataclasses.replace(masked_config, mask_rule="random-by-kind"))
    assert density_by_kind(drawn) == density_by_kind(ranked)
    by_chance = sum(part.density * part.updated for part in density_by_kind(ranked).values()) / ranked.updated
    both = sum(int((one & drawn.tensors[name]).sum()) for name, one in ranked.tensors.items()) / ranked.updated
    assert both == pytest.approx(by_chance, rel=0.1)
    other = mask_under(dataclasses.replace(masked_config, mask_rule="random-by-kind", seed=1))
    assert other.jaccard(drawn) < 0.9


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_mask_is_redrawn_over_all_tensors_of_a_kind(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"pos_embed": (1, 5, 4), "blocks.0.attn.qkv.weight": (12, 4), "blocks.1.attn.qkv.weight": (12, 4),
              "blocks.0.attn.qkv.bias": (12,), "norm.weight": (4,)}  # fmt: skip
    mask = Mask({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})
    drawn = redrawn_by_kind(mask, random_generator(seed, "drawn"))
    assert not drawn.differing(mask)
    assert density_by_kind(drawn) == density_by_kind(mask)
    queries = of_kinds(mask, ["q"])
    assert queries.updated == density_by_kind(mask)["q"].updated
    assert not queries.tensors["norm.weight"].any() and not queries.tensors["blocks.0.attn.qkv.weight"][4:].any()


def test_key_biases_have_no_sensitivity_and_are_always_taken(masked_config: Config) -> None:
    mask = mask_under(dataclasses.replace(masked_config, density=0.02, calibration_rounds=1, calibration_size=10))
    width = workspace(masked_config).model.embed_dim
    for block in range(4):
        _, key, _ = mask.tensors[f"blocks.{block}.attn.qkv.bias"].chunk(3)
        assert key.sum() >= 0.9 * width


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_small_patch14_dinov2", "vit_glyph"])
def test_no_backbone_parameter_can_train_unmasked(quick_config: Config, name: str) -> None:
    """Every parameter but the head is maskable: class token, position embedding, LayerScale and norms among them."""
    size = {"vit_glyph": 16, "vit_small_patch14_dinov2": 56}.get(name, 64)
    config = dataclasses.replace(
        quick_config, model=name, weights="none", input_size=size, mask_rule="random", density=0.1
    )
    home = Workspace(config)
    maskable = home.maskable()
    assert {*maskable, *HEAD_PARAMETERS} == {each for each, _ in home.model.named_parameters()}
    assert {"cls_token", "pos_embed", "norm.weight", "patch_embed.proj.weight"} <= maskable.keys()
    assert ("blocks.0.ls1.gamma" in maskable) == (name == "vit_small_patch14_dinov2")
    assert home.trained_names(1) == list(maskable)


def test_excluded_parameters_are_neither_masked_nor_trained(masked_config: Config) -> None:
    config = dataclasses.replace(masked_config, mask_exclude="pos_embed, *.norm1.*", mask_rule="random")
    names = workspace(config).trained_names(1)
    assert "pos_embed" not in names
    assert not any(".norm1." in name for name in names)
    assert "blocks.0.norm2.weight" in names
    assert set(mask_under(config).tensors) == set(names)
    with pytest.raises(ConfigError, match="nonsense"):
        mask_under(dataclasses.replace(config, mask_exclude="nonsense"))
    with pytest.raises(ConfigError, match="leaves no parameter"):
        mask_under(dataclasses.replace(config, mask_exclude="*"))


def test_random_masks_do_not_depend_on_the_federations_rounds(masked_config: Config) -> None:
    """The order of the random rule is a function of the seed alone."""
    home = workspace(masked_config)
    size = sum(value.numel() for value in home.maskable().values())
    order = random_generator(masked_config.seed, "random mask").permutation(size)
    mask = mask_under(dataclasses.replace(masked_config, mask_rule="random"))
    flat = torch.cat([tensor.flatten() for tensor in mask.tensors.values()])
    assert torch.equal(flat, torch.from_numpy(order < round(0.1 * size)))


def test_a_threshold_is_on_the_mean_over_examples() -> None:
    sums = {"a": 7 * torch.tensor([5.0, 1.0, 4.0]), "b": 7 * torch.tensor([[2.0, 3.0, 0.0]])}
    by_threshold = calibrate(
        lambda *_: (sums, 7), Mask.full(sums), "least-sensitive", rounds=1, density=None, threshold=2.5
    )
    assert by_threshold.mask.updated == 3
    by_density = calibrate(
        lambda *_: (sums, 7), Mask.full(sums), "least-sensitive", rounds=1, density=0.5, threshold=None
    )
    assert by_density.threshold == pytest.approx(2.0)
