"""What a merge of model files merges, averages, leaves and refuses, and what it says of it."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_merge_rule
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fl_taskarith.cli.command import main
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import merge_rules
from fl_taskarith.models.backbone import build_model, export_model
from fl_taskarith.models.vit_glyph import VIT_GLYPH_WEIGHTS
from fl_taskarith.one_shot import merge_files
from fl_taskarith.one_shot.merge_files import open_sources
from fl_taskarith.one_shot.model_files import ModelFile

Tensors = dict[str, torch.Tensor]
TASKS = Path(__file__).parents[2] / "conf" / "one-shot" / "cifar100-superclasses.toml"
SHAPES = {"block.weight": (4, 3), "logit_scale": (), "head.weight": (2, 3)}


def tensors(seed: int, **more: torch.Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} | more


def changed(seed: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {name: change(value) for name, value in tensors(seed).items()}


class Merges:
    """Writes models, merges them, and keeps what was said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.output = folder, capsys, folder / "out" / "merged.safetensors"

    def write(self, name: str, content: Tensors, metadata: dict[str, str] | None = None) -> Path:
        path = self.folder / f"{name}.safetensors"
        safetensors.torch.save_file(content, path, metadata)
        return path

    def write_all(self, *states: Tensors) -> list[Path]:
        return [self.write(letter, state) for letter, state in zip("abcd", states, strict=False)]

    def __call__(self, *words: object) -> Tensors:
        self.output.unlink(missing_ok=True)
        code = main(["merge", *map(str, words), "--output", str(self.output)])
        self.said, self.errors = self.capsys.readouterr()
        assert code == 0, self.errors
        return safetensors.torch.load_file(self.output)

    def refused(self, *words: object) -> str:
        self.output.unlink(missing_ok=True)
        assert main(["merge", *map(str, words), "--output", str(self.output)]) == 1
        message = self.capsys.readouterr().err
        assert message.count("\n") <= 10 and not self.output.exists() and "Error: " in message
        return message

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.output, "pt") as opened:
            return dict(opened.metadata())


@pytest.fixture
def merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Merges:
    return Merges(tmp_path, capsys)


@pytest.fixture
def exports(tmp_path: Path) -> list[Path]:
    """Two exports over vit_glyph with heads of their own, and one of other classes."""
    model = build_model("vit_glyph", 3, 16, str(VIT_GLYPH_WEIGHTS), download=False, seed=0)
    paths = []
    for seed, classes in enumerate(("abc", "abc", "xyz")):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        paths.append(tmp_path / f"export-{seed}.safetensors")
        export_model(model, paths[-1], list(classes), {"round": "3"})
    return paths


def test_exports_over_a_base_without_a_head_keep_their_mean_head(merges: Merges, exports: list[Path]) -> None:
    merged = merges("--base", VIT_GLYPH_WEIGHTS, *exports[:2])
    assert "their mean, for the base has none: head.bias, head.weight" in merges.said
    heads = [safetensors.torch.load_file(path)["head.weight"] for path in exports[:2]]
    assert torch.allclose(merged["head.weight"], (heads[0] + heads[1]) / 2)
    facts = merges.metadata
    model = timm.create_model(facts["architecture"], num_classes=len(json.loads(facts["classes"])), img_size=16)
    model.load_state_dict(merged)


def test_heads_of_other_classes_are_left_out_by_name(merges: Merges, exports: list[Path]) -> None:
    merged = merges("--base", VIT_GLYPH_WEIGHTS, *exports[1:])
    assert "head.weight" not in merged and "classes" not in merges.metadata
    assert "left out: head.bias, head.weight (classifiers" in merges.said
    first = safetensors.torch.load_file(exports[1])
    assert torch.equal(merges("--method", "average", *exports[1:])["head.weight"], first["head.weight"])
    assert f"as in {exports[1]}: head.bias, head.weight (classifiers" in merges.said


@pytest.mark.parametrize("stating", [["a"], ["b"], ["a", "b"], ["base"], ["base", "a"], ["base", "a", "b"], []])
def test_classifiers_whose_classes_only_some_files_state_stay_the_bases(stating: list[str], merges: Merges) -> None:
    facts = {name: {"classes": '["cat", "dog"]'} for name in stating}
    paths = [merges.write(name, tensors(seed), facts.get(name)) for seed, name in enumerate(("base", "a", "b"))]
    merged = merges("--base", *paths)["head.weight"]
    first, second, third = (tensors(seed)["head.weight"] for seed in range(3))
    expected = (second + third) / 2 if len(stating) in (0, 3) else first
    assert torch.allclose(merged, expected, atol=1e-6)
    assert (f"as in {paths[0]}: head.weight (classifiers" in merges.said) == (0 < len(stating) < 3)


def test_heads_of_task_vectors_of_other_classes_stay_the_bases(merges: Merges) -> None:
    base = merges.write("base", tensors(0), {"classes": '["cat", "dog"]'})
    for classes, change in (('["cat", "dog"]', 0.01), ('["dog", "cat"]', 0.0)):
        vector = merges.write("v", changed(0, lambda value: 0.01 * torch.ones_like(value)), {"classes": classes})
        merged = merges("--task-vectors", "--base", base, vector)
        assert torch.allclose(merged["head.weight"], tensors(0)["head.weight"] + change)
        assert torch.allclose(merged["block.weight"], tensors(0)["block.weight"] + 0.01)


@given(st.integers(0, 2**32), st.floats(1e-3, 0.3), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_models_and_task_vectors_are_not_taken_for_each_other(
    merges: Merges, seed: int, size: float, kind: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, first, second = (torch.randn(8, 16, generator=generator) for _ in range(3))
    states = {"base": base, "va": size * first, "vb": size * second} | {"ma": base + size * first, "mb": base + second}
    paths = {name: merges.write(name, {"block.weight": value.to(kind)}) for name, value in states.items()}
    open_sources(paths["base"], [paths["ma"], paths["mb"]], False)
    open_sources(paths["base"], [paths["va"], paths["vb"]], True)
    open_sources(None, [paths["ma"], paths["mb"]], False)
    with pytest.raises(ConfigError, match=r"ma.safetensors holds a model") as caught:
        open_sources(paths["base"], [paths["va"], paths["ma"]], True)
    assert "va.safetensors holds" not in str(caught.value)
    for base_path in (paths["base"], None):
        with pytest.raises(ConfigError, match=r"vb.safetensors holds a task vector") as caught:
            open_sources(base_path, [paths["ma"], paths["vb"]], False)
        assert "ma.safetensors holds" not in str(caught.value)


def test_a_merge_states_scale_and_sources(merges: Merges, tmp_path: Path) -> None:
    paths = merges.write_all(*map(tensors, range(3)))
    merges("--base", *paths)
    facts = json.loads(merges.metadata["merging"])
    assert facts["scale"] == 0.5 and facts["base"] == str(paths[0])
    assert facts["models"] == [str(path) for path in paths[1:]]
    assert "λ = 0.5" in merges.said


def test_models_of_other_inputs_are_refused(merges: Merges) -> None:
    first = merges.write("a", tensors(1), {"mean": "[0.5, 0.5]", "std": "[1]"})
    same = merges.write("b", tensors(2), {"mean": "[0.5,0.5]"})
    other = merges.write("c", tensors(3), {"mean": "[0.4, 0.5]"})
    merges("--method", "average", first, same)
    message = merges.refused("--method", "average", first, same, other)
    assert f"[0.4, 0.5] in {other}" in message and "differ in mean" in message


def test_statistics_of_batch_normalisation_and_counts_stay(merges: Merges) -> None:
    def state(seed: int) -> Tensors:
        counted = {"bn.running_var": torch.full((3,), 1.0 + seed), "bn.num_batches_tracked": torch.tensor(seed)}
        return tensors(seed) | counted | {"position_ids": torch.arange(3)}

    paths = merges.write_all(*map(state, range(3)))
    merged = merges("--base", *paths, "--scale", 1)
    assert all(torch.equal(merged[name], state(0)[name]) for name in state(0) if name not in SHAPES)
    assert "bn.num_batches_tracked, bn.running_var (statistics" in merges.said
    assert "position_ids (no floating-point numbers, the same in all)" in merges.said


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.uint8])
def test_integers_that_differ_are_no_numbers_to_add(kind: torch.dtype, merges: Merges) -> None:
    paths = [
        merges.write(name, tensors(seed, packed=torch.full((4,), seed).to(kind))) for seed, name in enumerate("ab")
    ]
    assert "packed" in merges.refused("--base", *paths)


def test_eight_bit_floats_are_refused(merges: Merges) -> None:
    eighth = [torch.full((4,), value).to(torch.float8_e4m3fn) for value in (1.0, 2.0)]
    paths = [merges.write(name, tensors(seed, packed=eighth[seed])) for seed, name in enumerate("ab")]
    assert "F8_E4M3" in merges.refused("--base", *paths)
    paths[1] = merges.write("c", tensors(3, packed=torch.ones(4)))
    assert "F8_E4M3 (4,)" in merges.refused("--base", *paths)


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ({}, "hold no tensors to add"),
        ({"block.weight": torch.ones(3)}, "F32 (4, 3)"),
        ({"block.weight": torch.ones(4, 3, dtype=torch.int64)}, "I64 (4, 3)"),
        ({"counts": torch.ones(2, dtype=torch.int64)}, "no floating-point numbers"),
        ({"other": torch.ones(2)}, "missing in"),
    ],
)
def test_task_vectors_are_held_against_the_base(vector: Tensors, expected: str, merges: Merges) -> None:
    base = merges.write("base", tensors(0, counts=torch.ones(2, dtype=torch.int64)))
    path = merges.write("vector", vector)
    assert expected in merges.refused("--task-vectors", "--base", base, path)
    sound = merges.write("sound", {"block.weight": torch.ones(4, 3)})
    assert str(path) in merges.refused("--task-vectors", "--base", base, sound, path) or not vector


@pytest.mark.parametrize("method", merge_rules())
def test_every_method_takes_scalars(method: str, merges: Merges) -> None:
    paths = merges.write_all(*map(tensors, range(3)))
    parameter = merge_rules()[method].parameter
    words: list[object] = [f"--{parameter}", 0.5] if parameter else []
    words += ["--steps", 1, 2] if method == "fednova" else []
    assert merges("--method", method, "--base", *paths, *words)["logit_scale"].shape == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scale", "nan"], "--scale nan: expected a finite number"),
        (["--scale", "-inf"], "--scale -inf"),
        (["--scale", "1e39"], "--scale 1e+39"),
        (["--scale", "2e38"], "λ = 2e+38"),
        (["--method", "fedgma", "--threshold", "nan"], "--threshold nan"),
        (["--method", "fedgma", "--threshold", "-0.5"], "0 <= ρ <= 1"),
        (["--method", "cclip", "--radius", "inf"], "--radius inf"),
        (["--method", "fednova", "--steps", "3", "nan"], "--steps 2 nan"),
        (["--method", "fednova", "--steps", "3", "0"], "positive number of steps"),
        (["--method", "dare", "--drop", "0.5", "--seed", "-1"], "--seed -1"),
    ],
)
def test_numbers_out_of_range_are_refused(words: list[str], expected: str, merges: Merges) -> None:
    paths = [
        merges.write(name, {key: 9 * value for key, value in tensors(seed).items()}) for seed, name in enumerate("abc")
    ]
    assert expected in merges.refused("--base", *paths, *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "ties", "--keep", "0"], "ties: "),
        (["--method", "dare", "--drop", "1"], "0 <= p < 1"),
        (["--method", "cclip", "--radius", "0"], "radius above 0"),
        (["--method", "fednova", "--steps", "1", "0"], "positive number of steps"),
        (["--search", "{tasks}", "--data", "dry"], "--data dry"),
        (["--search", "{tasks}"], "2 models for "),
        (["--scale", "2", "--output", "{folder}/file/merged.safetensors"], "is no folder"),
    ],
)
def test_options_are_refused_before_anything_is_read_or_said(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(merge_files, "ModelFile", lambda path: pytest.fail(f"{path} is read"))
    given = [word.format(folder=tmp_path, tasks=TASKS) for word in words]
    assert main(["merge", "a.safetensors", "b.safetensors", "--base", "c.safetensors", *given]) == 1
    said, errors = capsys.readouterr()
    assert said == "" and expected in errors


def test_a_result_too_large_for_half_precision_is_refused(merges: Merges) -> None:
    paths = [
        merges.write(name, {key: value.half() for key, value in tensors(seed).items()})
        for seed, name in enumerate("ab")
    ]
    assert "too large for the type of the base" in merges.refused("--base", *paths, "--scale", 1e5)


@pytest.mark.parametrize("name", ["block.weight", "head.weight"])
@pytest.mark.parametrize("place", [0, 2])
def test_nan_is_told_with_its_file(name: str, place: int, merges: Merges) -> None:
    states = [tensors(seed) for seed in range(4)]
    states[place][name].view(-1)[0] = torch.nan
    if name == "head.weight":  # the base's own stays where heads differ
        states[1][name] = torch.ones(5, 3)
    paths = merges.write_all(*states)
    if name == "head.weight" and place:
        assert bool(merges("--method", "median", "--base", *paths)[name].isfinite().all())
        return
    for method in ("median", "task-arithmetic"):
        message = merges.refused("--method", method, "--base", *paths)
        assert f"{paths[place]} has NaN or infinite entries, in {name}" in message


def test_double_precision_stays_double(merges: Merges) -> None:
    states = [changed(seed, lambda value: 1e300 * value.double()) for seed in range(2)]
    paths = merges.write_all(*states)
    merged = merges("--base", *paths, "--scale", 1)
    assert all(torch.allclose(merged[name], value, rtol=1e-12) for name, value in states[1].items())


def test_models_may_stand_before_between_and_behind_options(merges: Merges) -> None:
    base, first, second = (merges.write(name, tensors(seed)) for seed, name in enumerate("abc"))
    expected = merges("--method", "fednova", "--base", base, "--steps", 1, 4, "--scale", 2, first, second)
    for words in (
        [first, second, "--steps", 1, 4, "--method", "fednova", "--base", base, "--scale", 2],
        ["--method=fednova", first, "--base", base, "--steps", 1, 4, second, "--scale", 2],
        ["--method", "fednova", "--base", base, first, "--scale", "2e0", "--steps", 1, 4, second],
        ["--meth", "fednova", f"--base={base}", "--steps", 1, 4, first, second, "--scale=2"],
    ):
        merged = merges(*words)
        assert all(torch.equal(merged[name], value) for name, value in expected.items()), words
    below = merges("--scale", "-1e-3", "--base", base, first)
    above = merges("--scale", "1e-3", "--base", base, first)
    start = tensors(0)["block.weight"]
    assert torch.allclose(below["block.weight"] - start, start - above["block.weight"], atol=1e-6)
    assert "nothing to merge" in merges.refused("--base", base)


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a.safetensors"}}', "["],
)
def test_an_index_that_leads_nowhere_is_refused(index: str, merges: Merges, tmp_path: Path) -> None:
    base = merges.write("a", tensors(0))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(index)
    assert "folder cannot be read as a model" in merges.refused("--base", base, tmp_path / "folder")


@pytest.mark.parametrize("where", ["open", "merge", "write"])
def test_too_little_memory_is_told_with_what_is_needed(
    where: str, merges: Merges, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        merges.write(name, tensors(seed, large=torch.full((500, 1400), seed / 2))) for seed, name in enumerate("abc")
    ]

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    targets: dict[str, tuple[object, str]] = {
        "open": (ModelFile, "kind"), "merge": (merge_files, "scaled_weights"), "write": (safetensors.torch, "save"),
    }  # fmt: skip
    from fl_taskarith.storage import tensor_file

    tensor_file._spelling.cache_clear()
    monkeypatch.setattr(*targets[where], fails)
    message = merges.refused("--base", *paths)
    assert "not enough memory to merge 2 models: about 0.1 GB" in message


def test_a_limit_below_what_torch_takes_is_told_at_once(
    merges: Merges, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**9, 10**9))
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "a", "b"])
    assert stopped.value.code == 2 and "limited to 1.0 GB" in capsys.readouterr().err


def test_a_rule_of_ones_own_that_returns_something_else_is_told(
    merges: Merges, monkeypatch: pytest.MonkeyPatch
) -> None:

    paths = merges.write_all(*map(tensors, range(3)))
    wrong: dict[str, Callable[[Any], Any]] = {
        "expected a tensor for every name": lambda vectors: {},
        "expected floating-point numbers [4, 3]": lambda vectors: {name: 1.0 for name in vectors[0]},
    }
    for told, rule in wrong.items():
        monkeypatch.setattr(own_merge_rule, "first", rule)
        assert told in merges.refused("--method", "own_merge_rule:first", "--base", *paths)


def test_quantised_models_and_names_in_two_files_of_a_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merges = Merges(tmp_path, capsys)
    codes = {"block.qweight": torch.ones(3, 4, dtype=torch.int32), "block.scales": torch.ones(4)}
    assert "is quantised (block.qweight)" in merges.refused(*merges.write_all(codes, codes), "--method", "average")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one", "two"):
        safetensors.torch.save_file(tensors(0), folder / f"{name}.safetensors")
    index = {
        "weight_map": {name: f"{file}.safetensors" for name, file in zip(SHAPES, ("one", "two", "two"), strict=True)}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "stands in two of its files" in merges.refused(folder, merges.write("c", tensors(1)), "--method", "average")


def test_an_index_has_to_say_where_each_tensor_stands(merges: Merges, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, name in enumerate(SHAPES):
        safetensors.torch.save_file({name: tensors(0)[name]}, folder / f"{number}.safetensors")
    right = {name: f"{number}.safetensors" for number, name in enumerate(SHAPES)}
    words = ["--method", "average", merges.write("other", tensors(1)), folder]
    for table, expected in (
        (right, ""),
        (right | {"logit_scale": "0.safetensors"}, "0.safetensors for logit_scale, which stands in none of its files"),
        (
            right | {"logit_scale": "0.safetensors", "block.weight": "1.safetensors"},
            "1.safetensors for block.weight, which stands in 0.safetensors",
        ),
        (right | {"other": "0.safetensors"}, "0.safetensors for other, which stands in none of its files"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        assert expected in merges.refused(*words) if expected else merges(*words)
