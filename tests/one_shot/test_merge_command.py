"""`fl-taskarith merge` on files of timm's and Hugging Face's layout: results, refusals, memory."""

import json
import subprocess
import sys
from pathlib import Path

import own_merge_rule
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fl_taskarith.cli.command import main
from fl_taskarith.merging import rules
from fl_taskarith.merging.merge_rules import merge_rules

Tensors = dict[str, torch.Tensor]


def hugging_face_model(seed: int, classes: int = 3, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 8), "vit.encoder.layer.0.attention.query.weight": (8, 8),
        "classifier.weight": (classes, 8), "classifier.bias": (classes,),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"vit.embeddings.position_ids": torch.arange(5)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """θ₀ and three models, as files."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "first", "second", "third")]
    for seed, path in enumerate(paths):
        safetensors.torch.save_file(hugging_face_model(seed), path, {"format": "pt"})
    return paths


def merged(words: list[object], output: Path) -> Tensors:
    assert main(["merge", *map(str, words), "--output", str(output)]) == 0
    return safetensors.torch.load_file(output)


def test_the_help_lists_every_rule_and_its_parameter(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said and rule.source in said for name, rule in merge_rules().items())
    assert all(f"--{rule.parameter} " in said for rule in merge_rules().values() if rule.parameter)
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "a.safetensors", "--method", "magic"])
    assert stopped.value.code == 2
    assert '"magic" is no merge rule: expected one of task-arithmetic' in capsys.readouterr().err


def test_a_rule_of_ones_own_is_a_function_anywhere_or_one_file_of_the_package(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rule = f"{own_merge_rule.__name__}:shrunken_mean"
    words = ["--method", rule, "--base", files[0], *files[1:], "--shrink", 0.5]
    found = merged(words, tmp_path / "m.safetensors")
    base, *models = (safetensors.torch.load_file(path) for path in files)
    name = "classifier.weight"
    expected = base[name] + 0.5 * (sum(models[index][name] for index in range(3)) / 3 - base[name])
    assert torch.allclose(found[name], expected, atol=1e-6)
    plain = merged(["--method", f"{own_merge_rule.__name__}:first", "--base", *files], tmp_path / "p.safetensors")
    assert torch.allclose(plain[name], models[0][name], atol=1e-6)

    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(Path(own_merge_rule.__file__).parent / "own_rules")])
    merge_rules.cache_clear()
    assert list(merge_rules())[-1] == "largest-entry"
    assert (
        main(["merge", "--method", "largest-entry", "--base", *map(str, files), "--output", str(tmp_path / "l")]) == 0
    )
    monkeypatch.undo()  # before the cache fills again, for tests that come later
    merge_rules.cache_clear()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["merge", str(files[1]), "--method", "nowhere:rule"])
    assert "nowhere:rule" in capsys.readouterr().err


def test_task_arithmetic_of_files_is_its_formula(files: list[Path], tmp_path: Path) -> None:
    base, *models = (safetensors.torch.load_file(path) for path in files)
    found = merged(["--base", files[0], *files[1:], "--scale", 0.4], tmp_path / "out" / "merged.safetensors")
    assert found.keys() == base.keys()
    for name, value in base.items():
        if value.is_floating_point():
            expected = value + 0.4 * sum(model[name] - value for model in models)
            assert torch.allclose(found[name], expected, atol=1e-6)
    assert torch.equal(found["vit.embeddings.position_ids"], base["vit.embeddings.position_ids"])
    with safe_open(tmp_path / "out" / "merged.safetensors", "pt") as file:
        assert json.loads(file.metadata()["merging"])["scale"] == 0.4


def test_two_checkpoints_are_enough(files: list[Path], tmp_path: Path) -> None:
    first, second = (safetensors.torch.load_file(path) for path in files[:2])
    found = merged(["--method", "average", *files[:2]], tmp_path / "mean.safetensors")
    assert all(torch.allclose(found[name], (first[name] + second[name]) / 2) for name in first
               if first[name].is_floating_point())  # fmt: skip
    same = merged(["--base", files[0], files[1], "--scale", 1], tmp_path / "same.safetensors")
    assert all(torch.allclose(same[name], second[name], atol=1e-6) for name in second)


def test_the_median_needs_no_base_and_is_the_same_with_one(files: list[Path], tmp_path: Path) -> None:
    without = merged(["--method", "median", *files[1:]], tmp_path / "a.safetensors")
    with_base = merged(["--method", "median", "--base", files[0], *files[1:]], tmp_path / "b.safetensors")
    assert all(torch.allclose(value, with_base[name], atol=1e-6) for name, value in without.items())


@pytest.mark.parametrize("method", merge_rules())
def test_every_method_merges_files(method: str, files: list[Path], tmp_path: Path) -> None:
    words: list[object] = ["--method", method, "--base", files[0], *files[1:]]
    parameter = merge_rules()[method].parameter
    words += [f"--{parameter}", 0.5] if parameter else []
    found = merged(words + (["--steps", 5, 10, 20] if method == "fednova" else []), tmp_path / "m.safetensors")
    base = safetensors.torch.load_file(files[0])
    assert not torch.equal(found["classifier.weight"], base["classifier.weight"])


def test_unlike_heads_stay_and_are_named(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    safetensors.torch.save_file(hugging_face_model(9, classes=7), files[1])
    found = merged(["--base", files[0], *files[1:]], tmp_path / "m.safetensors")
    assert "classifier.weight" in capsys.readouterr().out
    base = safetensors.torch.load_file(files[0])
    assert torch.equal(found["classifier.weight"], base["classifier.weight"])
    assert not torch.equal(found["vit.embeddings.cls_token"], base["vit.embeddings.cls_token"])


def test_task_vector_files_may_hold_a_part(files: list[Path], tmp_path: Path) -> None:
    name = "vit.embeddings.cls_token"
    vectors = [tmp_path / "v1.safetensors", tmp_path / "v2.safetensors"]
    for seed, path in enumerate(vectors):
        safetensors.torch.save_file({name: torch.full((1, 1, 8), 1.0 + seed)}, path)
    found = merged(["--task-vectors", "--base", files[0], *vectors, "--scale", 1], tmp_path / "m.safetensors")
    base = safetensors.torch.load_file(files[0])
    assert torch.allclose(found[name], base[name] + 3)
    assert all(torch.equal(found[other], base[other]) for other in base if other != name)


def test_half_precision_stays_and_is_merged_in_single(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        safetensors.torch.save_file(hugging_face_model(seed, dtype=torch.bfloat16), path)
    found = merged(["--base", paths[0], *paths[1:], "--scale", 0.5], tmp_path / "m.safetensors")
    name = "classifier.weight"
    base, *models = (safetensors.torch.load_file(path)[name].float() for path in paths)
    assert found[name].dtype == torch.bfloat16
    assert torch.equal(found[name], (base + 0.5 * sum(model - base for model in models)).bfloat16())


def test_a_hugging_face_folder_of_several_files(tmp_path: Path, files: list[Path]) -> None:
    tensors, folder = safetensors.torch.load_file(files[1]), tmp_path / "sharded"
    folder.mkdir()
    table = {}
    for number, (name, value) in enumerate(tensors.items()):
        safetensors.torch.save_file({name: value}, folder / f"model-{number}.safetensors")
        table[name] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    found = merged(["--base", files[0], folder, "--scale", 1], tmp_path / "m.safetensors")
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{0}", "{1}"], "--base"),
        (["--method", "ties", "--base", "{0}", "{1}"], "--keep"),
        (["--method", "ties", "--base", "{0}", "{1}", "--keep", "1.5"], "at most 1"),
        (["--method", "ties", "--base", "{0}", "{1}", "--drop", "0.5"], "takes no --drop"),
        (["--method", "fednova", "--base", "{0}", "{1}", "{2}", "--steps", "3"], "2 models"),
        (["--base", "{0}", "{1}", "--steps", "3"], "--steps has no effect under --method task-arithmetic"),
        (["--base", "{0}", "{1}", "--data", "low"], "--data has no effect without --search"),
        (["--base", "{0}", "{1}", "--seed", "1"], "--seed under --method task-arithmetic has no effect without"),
        (["--method", "average", "{0}", "{1}", "--scale", "0.3"], "scale"),
        (["--method", "average", "--base", "{0}", "{1}", "--scale", "0.3"], "leave --scale out"),
        (["--task-vectors", "{0}", "{1}"], "--base"),
        (["--base", "{0}", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
        (["--base", "{0}", "{nan}"], "nan.safetensors has NaN or infinite entries, in vit.embeddings.cls_token"),
        (["--base", "{0}", "{other}"], "not of one architecture"),
    ],
)
def test_what_cannot_be_merged_is_said(
    words: list[str], expected: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = hugging_face_model(1)
    broken["vit.embeddings.cls_token"][0, 0, 0] = torch.nan
    other = {name: value for name, value in hugging_face_model(1).items() if name != "vit.embeddings.cls_token"}
    named = {"nan": tmp_path / "nan.safetensors", "other": tmp_path / "other.safetensors"}
    safetensors.torch.save_file(broken, named["nan"])
    safetensors.torch.save_file(other, named["other"])
    output = tmp_path / "merged.safetensors"
    assert main(["merge", *(word.format(*files, **named) for word in words), "--output", str(output)]) == 1
    assert expected in capsys.readouterr().err
    assert not output.exists()


def refusal(words: list[object], capsys: pytest.CaptureFixture) -> str:
    """What a merge says that must fail and leave every file as it was."""
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 1
    return capsys.readouterr().err


@pytest.fixture
def no_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before a tensor is merged."""
    monkeypatch.setattr("fl_taskarith.one_shot.merge_files.merge", lambda *_: pytest.fail("tensors were merged"))


@pytest.mark.usefixtures("no_merging")
@pytest.mark.parametrize("kind", ["base", "model", "dotted", "symbolic link", "hard link", "folder's file", "search"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_input_is_overwritten(
    kind: str, overwrite: bool, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inputs = ["--base", files[0], *files[1:]]
    output = {"base": files[0], "dotted": tmp_path / "x" / ".." / files[1].name}.get(kind, files[1])
    (tmp_path / "x").mkdir()
    if kind == "symbolic link":
        output = tmp_path / "link.safetensors"
        output.symlink_to(files[2])
    elif kind == "hard link":
        output = tmp_path / "x" / "other.safetensors"
        output.hardlink_to(files[3])
    elif kind == "folder's file":
        output = tmp_path / "x" / "model.safetensors"
        safetensors.torch.save_file(hugging_face_model(8), output)
        inputs[-1] = output.parent
    elif kind == "search":
        output = tmp_path / "tasks.toml"
        output.write_text("")
        inputs += ["--search", output]
    before = {path: path.read_bytes() for path in [*files, output]}
    said = refusal([*inputs, "--output", output, *(["--overwrite"] if overwrite else [])], capsys)
    assert "would overwrite" in said and "--output" in said
    assert {path: path.read_bytes() for path in before} == before


def test_only_an_earlier_merge_is_overwritten_unasked(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words: list[object] = ["--base", files[0], files[1], files[2]]
    output = tmp_path / "out" / "m.safetensors"
    first = merged(words, output)
    again = merged([*words, files[3]], output)
    assert any(not torch.equal(first[name], again[name]) for name in first)
    for content in (b"my thesis", files[3].read_bytes()):
        output.write_bytes(content)
        assert "Already there" in refusal([*words, "--output", output], capsys)
        assert output.read_bytes() == content
    assert merged([*words, "--overwrite"], output).keys() == first.keys()
    assert "is a folder" in refusal([*words, "--output", output.parent, "--overwrite"], capsys)
    output.unlink()
    output.symlink_to(tmp_path / "on another disk")
    assert "Already there" in refusal([*words, "--output", output], capsys)


@pytest.mark.usefixtures("no_merging")
def test_a_pattern_that_catches_the_base_and_an_earlier_merge_is_refused_by_name(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    earlier, copy = tmp_path / "merged.safetensors", tmp_path / "x" / "copy.safetensors"
    safetensors.torch.save_file(hugging_face_model(5), earlier, {"merging": "{}"})
    copy.parent.mkdir()
    output = tmp_path / "out.safetensors"
    words = ["--base", files[0], *sorted(tmp_path.glob("*.safetensors")), "--output", output]
    said = refusal(words, capsys)
    assert f"{files[0]} is the base, {files[0]}: leave it out" in said
    said = refusal([word for word in words if word != files[0] or word is words[1]], capsys)
    assert f"{earlier} is the result of an earlier merge: leave it out" in said
    safetensors.torch.save_file(hugging_face_model(0), copy, {"another": "header"})
    assert f"{copy} is the base, {files[0]}" in refusal(
        ["--base", files[0], files[1], copy, "--output", output], capsys
    )
    assert not output.exists()


@pytest.mark.usefixtures("no_merging")
def test_a_model_that_is_there_twice_is_refused(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    link, copy = tmp_path / "link.safetensors", tmp_path / "copy.safetensors"
    link.symlink_to(files[1])
    copy.write_bytes(files[2].read_bytes())
    tail = ["--output", tmp_path / "m.safetensors"]
    for words in (["--base", files[0]], ["--method", "average"]):
        assert f"{files[1]} and {files[1]} are one file" in refusal([*words, files[1], files[1], *tail], capsys)
        assert f"{files[1]} and {link} are one file" in refusal([*words, files[1], files[2], link, *tail], capsys)
        said = refusal([*words, files[1], files[2], files[3], copy, *tail], capsys)
        assert f"{files[2]}, {copy} hold the same tensors: leave all but one of them out" in said
        assert str(files[3]) not in said


def test_models_that_differ_in_one_entry_of_the_last_tensor_are_two(files: list[Path], tmp_path: Path) -> None:
    tensors = hugging_face_model(1)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] += 1
    safetensors.torch.save_file(tensors, tmp_path / "near.safetensors")
    merged(["--base", files[0], files[1], tmp_path / "near.safetensors"], tmp_path / "m.safetensors")


MEMORY = """
import sys
from fl_taskarith.bench.harness import peak_bytes
from fl_taskarith.cli.command import main
import torch
assert main(sys.argv[1:]) == 0
print(peak_bytes(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "cclip", "median"])
def test_memory_does_not_grow_with_the_number_of_models(method: str, tmp_path: Path) -> None:
    """Sixteen models of 10 MB take far less than their sum more than two of them."""
    # Rules hold one tensor of all models at a time, several times over: tensors are small beside the models.
    paths = [tmp_path / f"{number}.safetensors" for number in range(17)]
    for number, path in enumerate(paths):
        tensors = {f"blocks.{block}.weight": torch.full((256, 256), float(number)) for block in range(40)}
        safetensors.torch.save_file(tensors, path)

    def peak(models: int) -> int:
        parameter = merge_rules()[method].parameter
        words = ["merge", "--method", method, "--base", str(paths[0]), *map(str, paths[1 : models + 1])]
        words += ["--output", str(tmp_path / "m.safetensors"), *([f"--{parameter}", "0.5"] if parameter else [])]
        done = subprocess.run([sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert peak(16) - peak(2) < 110e6 < 14 * 10.5e6
