"""`fl_taskarith.merge`: what the command does, as a function with the same names, defaults and refusals."""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fl_taskarith
from fl_taskarith import simulate
from fl_taskarith.cli.arguments import LateParser, add_arguments
from fl_taskarith.cli.command import main
from fl_taskarith.cli.merge_command import USUAL, _add_rules, add_merge
from fl_taskarith.config.settings import Config
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.one_shot.merge_models import merge
from fl_taskarith.storage.paths import shipped_file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models, as runs export them."""
    folder = tmp_path_factory.mktemp("models")
    settings: dict[str, Any] = {
        "train_subset": 200, "validation_size": 60, "test_subset": 60, "num_clients": 5, "num_rounds": 1,
        "local_steps": 1, "mask_rule": "none", "results_dir": str(folder), "draw_curves": False, "threads": 1,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fl_taskarith.server.launch.GLANCE", 0.02)
        each = ((0.0, 0), (0.01, 0), (0.01, 1))
        runs = [simulate(Config(**settings, learning_rate=rate, seed=seed)) for rate, seed in each]
    return [run.folder / "model.safetensors" for run in runs]


def test_it_gives_what_the_command_writes(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, base = tmp_path / "merged.safetensors", files[0]
    words = ["--method", "ties", "--keep", "0.5", "--scale", "0.4", "--base", str(base), *map(str, files[1:])]
    assert main(["merge", *words, "--output", str(written)]) == 0
    said = capsys.readouterr().out
    there = set(tmp_path.iterdir())
    merged = merge(files[1:], base=base, method="ties", keep=0.5, scale=0.4)
    assert set(tmp_path.iterdir()) == there and merged.path is None, "nothing is written unasked"
    assert said == capsys.readouterr().out + f"{written.resolve()}\n"
    by_command = load_file(written)
    assert by_command.keys() == merged.tensors.keys()
    assert all(torch.equal(merged.tensors[name], value) for name, value in by_command.items())
    assert (merged.facts["method"], merged.facts["value"], merged.facts["scale"]) == ("ties", 0.5, 0.4)
    again = merge(files[1:], base=base, method="ties", keep=0.5, scale=0.4, output=written)
    assert again.path == written and written.read_bytes() and repr(again) == "MergedModel(ties, λ = 0.4, 2 models)"


def test_its_model_is_timms_with_the_merged_weights(files: list[Path]) -> None:
    merged = merge(files[1:], base=files[0])
    exported = merged.model()
    assert exported.classes == tuple(map(str, range(10)))
    parameters = dict(exported.model.named_parameters())
    base, first, second = (load_file(path) for path in files)
    for name, value in parameters.items():
        if not name.startswith("head."):
            expected = base[name] + 0.5 * (first[name] - base[name] + second[name] - base[name])
            assert torch.allclose(value, expected, atol=1e-5), name
    with torch.no_grad():
        assert exported.model(exported.transform(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))).shape == (1, 10)


def test_models_of_others_are_merged_as_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for number in range(2):
        save_file({"blocks.0.mlp.fc1.weight": torch.full((4, 4), 1.0 + number)}, tmp_path / f"{number}.safetensors")
    merged = merge([tmp_path / "0.safetensors", str(tmp_path / "1.safetensors")], method="average")
    assert torch.equal(merged.tensors["blocks.0.mlp.fc1.weight"], torch.full((4, 4), 1.5))
    with pytest.raises(WeightsError, match="take the tensors"):
        merged.model()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keep": 0.5}, "takes no --keep"),
        ({"method": "magic"}, "is no merge rule"),
        ({"method": "ties"}, "give --keep"),
        ({"steps": [1, 2]}, "--steps has no effect"),
        ({"seed": 1}, "--seed .* has no effect"),
        ({"data": "iid"}, "--data has no effect"),
        ({"scale": "much"}, "expected a number"),
        ({"search": "digits", "scale": 0.5}, "--search chooses --scale"),
        ({"models": []}, "nothing to merge"),
        ({"base": None}, "give it with --base"),
    ],
    ids=str,
)
def test_what_the_command_refuses_it_refuses(given: dict[str, Any], expected: str, files: list[Path]) -> None:
    words = {"models": files[1:], "base": files[0]} | given
    with pytest.raises(ConfigError, match=expected):
        fl_taskarith.merge(**words)


def test_an_input_is_never_overwritten(files: list[Path]) -> None:
    before = files[1].read_bytes()
    with pytest.raises(ConfigError, match="would overwrite"):
        merge(files[1:], base=files[0], output=files[1], overwrite=True)
    assert files[1].read_bytes() == before


def test_names_and_defaults_are_the_commands() -> None:
    parser = LateParser(argument_default=None)
    add_arguments(parser, read_toml(shipped_file("cli/commands.toml"))["merge"]["merge"]["arguments"])
    add_merge(parser)
    with contextlib.suppress(SystemExit):
        _add_rules(parser, ["a"])
    command = {action.dest: action.default for action in parser._actions}
    function = {name: each.default for name, each in inspect.signature(merge).parameters.items()}
    assert function.keys() - {"models", "parameters", "overwrite"} <= command.keys()
    shared = function.keys() & command.keys() - {"output"}
    assert command["steps"] == list(function["steps"])
    assert {name: function[name] for name in shared - {"steps"}} == {name: command[name] for name in shared - {"steps"}}
    assert function["output"] is None and function["method"] == USUAL, "a file only where one is asked for"
