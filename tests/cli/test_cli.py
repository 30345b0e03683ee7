import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from fl_taskarith.cli.command import COMMANDS, main
from fl_taskarith.config.fields import HEADINGS, rules
from fl_taskarith.config.settings import load, parse_overrides
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.run_groups import read_run
from fl_taskarith.storage.paths import checkout, resolve, results_root, shipped_file

ROOT = Path(__file__).parents[2]
QUICK = ["num-clients=10", "num-rounds=1", "local-steps=1", "threads=1", "train-subset=300", "validation-size=60",
         "test-subset=60", "calibration-size=20"]  # fmt: skip


def test_simulate_returns_zero_prints_where_the_results_are_and_never_imports_ray(tmp_path: Path) -> None:
    words = ["simulate", *QUICK, f"results-dir={tmp_path}", "run-name=mine", "draw-curves=false"]
    code = "import sys, client_app, server_app, fl_taskarith.cli.command as cli\n"
    code += f"sys.exit(cli.main({words}) or ('Ray was imported' if 'ray' in sys.modules else 0))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout
    assert str(tmp_path / "mine" / "rounds.csv") in printed
    assert "test accuracy" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["num-client=3"], "did you mean"),
        (["nowhere.toml"], "nowhere.toml"),
        (["learning-rate=1e6", "weight-decay=1e6", "local-steps=8", "num-clients=10"], "Divergence"),
        (["model=hf-hub:some/model"], "timm knows no model"),
        (["device=mps"], "neither a CPU nor a CUDA device"),
        (["data-dir=~nobody-of-that-name/x"], "data-dir"),
        (["dataset=cifar100", "learning-rate=0.1", "download=false", "data-dir=/nonexistent"], "cifar-100-python"),
        (["classes-per-client=11"], "only 10 classes"),
        (["weights=/nonexistent.pth"], "no weights file"),
        (["device=quantum"], "quantum"),
    ],
)
def test_any_failure_gives_a_nonzero_status_and_its_cause(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words, f"results-dir={tmp_path}"]) == 1
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed


def test_centralized_refuses_another_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["centralized", "strategy=fedavg"]) == 1
    assert 'strategy = "centralized"' in capsys.readouterr().err


def help_of(*words: str) -> str:
    printed = StringIO()
    with pytest.raises(SystemExit) as stopped, redirect_stdout(printed):
        main([*words, "--help"])
    assert stopped.value.code == 0
    return printed.getvalue()


def test_the_help_of_simulate_lists_every_setting_under_its_heading() -> None:
    printed = help_of("simulate")
    places = [printed.index(f"\n{heading}, for example") for heading in HEADINGS]
    assert places == sorted(places)
    for key, rule in rules().items():
        heading = list(HEADINGS).index(rule.heading)
        following = places[heading + 1] if heading + 1 < len(places) else len(printed)
        assert places[heading] < printed.index(f"\n  {key} = ") < following


def test_the_help_groups_the_commands_by_what_one_wants_and_each_shows_an_example() -> None:
    overview = help_of()
    wishes = ("run", "tune", "study", "look", "merge", "measure")
    places = [overview.index(f"\n{wish}:\n") for wish in wishes]
    assert places == sorted(places)
    for name in COMMANDS:
        assert f"\n  {name} " in overview
        assert f"example: fl-taskarith {name} " in help_of(name)


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_example_of_a_heading_is_accepted_and_is_of_its_keys(heading: str) -> None:
    words = HEADINGS[heading].split()
    load(None, parse_overrides(words))
    assert any(rules()[word.partition("=")[0]].heading == heading for word in words)


def test_plot_draws_several_runs_into_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        main(["simulate", *QUICK, f"results-dir={tmp_path}", f"seed={seed}", f"run-name=s{seed}"])
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "s0"), str(tmp_path / "s1"), "--output", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "both.png"), str(tmp_path / "both.pdf")]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_a_folder_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rounds\.csv"):
        read_run(tmp_path)


def test_results_lie_in_the_installed_checkout_wherever_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkout() == ROOT
    assert results_root("") == ROOT / "results"
    assert results_root("elsewhere") == ROOT / "elsewhere"
    assert results_root(str(tmp_path)) == tmp_path
    assert resolve("~/x", "data-dir") == Path.home() / "x"


def test_without_a_checkout_a_relative_path_is_refused_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.storage.paths.checkout", lambda: None)
    with pytest.raises(ConfigError, match="results-dir"):
        results_root("")


def test_a_shipped_file_is_found_from_a_copy_of_the_package_that_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_taskarith.storage.paths.__file__", str(tmp_path / "paths.py"))
    assert shipped_file("config.py") == ROOT / "fl_taskarith" / "config.py"


def test_reading_the_configuration_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, fl_taskarith.cli.command\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_output_that_is_there_is_replaced_only_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unneeded(*_: object, **__: object) -> None:
        pytest.fail("the work began")

    for place in (
        "describe.masks.workspace",
        "describe.masks.read_mask",
        "describe.shard_histogram.class_histogram",
        "figures.plots.curves",
    ):
        monkeypatch.setattr(f"fl_taskarith.{place}", unneeded)
    monkeypatch.setattr("fl_taskarith.models.glyph_pretraining.pretrain_glyph", unneeded)
    monkeypatch.setattr("fl_taskarith.figures.run_groups.find_runs", unneeded)
    mask = tmp_path / "A.safetensors"
    commands = {
        "mask.safetensors": ["mask", *QUICK, f"--output={tmp_path}"],
        "summary.json": ["mask", str(mask), f"--output={tmp_path}"],
        "anatomy-2.pdf": ["mask", str(mask), str(mask), f"--output={tmp_path}"],
        "histogram.csv": ["shards", *QUICK, f"--output={tmp_path}"],
        "thesis.pdf": ["plot", "run", f"--output={tmp_path / 'thesis'}"],
        "thesis-heat-map.png": ["plot", "run", f"--output={tmp_path / 'thesis'}"],
        "weights.safetensors": ["pretrain-glyph", f"--output={tmp_path / 'weights.safetensors'}"],
    }
    for name, words in commands.items():
        (tmp_path / name).write_text("mine")
        assert main(words) == 1
        said = capsys.readouterr().err
        assert f"Already there: {tmp_path / name}. Give another --output, or --overwrite" in said
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_a_mask_that_is_read_is_not_overwritten_on_demand_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "mask.safetensors"
    mask.write_bytes(b"a mask")
    words = ["mask", *QUICK, "mask-rule=file", f"mask-file={mask}", f"--output={tmp_path}", "--overwrite"]
    assert main(words) == 1
    assert "is the mask-file itself" in capsys.readouterr().err
    assert mask.read_bytes() == b"a mask"


def test_a_run_is_evaluated_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train-subset=200", "test-subset=100", "num-rounds=1", "mask-rule=none", "num-clients=10",
             "draw-curves=false", "run-name=mine", f"results-dir={tmp_path}"]  # fmt: skip
    assert main(["simulate", *words]) == 0
    assert main(["simulate", *words]) == 0
    assert "Loaded, for it is finished" in capsys.readouterr().out and not (tmp_path / "mine-2").exists()
    assert main(["evaluate", str(tmp_path / "mine"), "test-subset=50", "--no-features"]) == 0
    assert (tmp_path / "mine" / "evaluation" / "confusion.csv").exists()
    assert main(["results", "--results-dir", str(tmp_path)]) == 0
    assert "mine finished" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", "a", "b"]) == 1
    assert main(["report", str(tmp_path), "--html", "--output", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "index.html").exists()
    assert main(["report", str(tmp_path), "--html", "--shipped-results"]) == 1
