"""Every shipped settings file, run as it is but for what a CPU test cannot afford, ends above the ridge head."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import real_data_folder

from fl_taskarith import simulate
from fl_taskarith.config.reference import COMMAND, with_reference
from fl_taskarith.config.settings import load
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.history import History
from fl_taskarith.server.learning_rates import known_rate
from fl_taskarith.server.speed import Speed
from fl_taskarith.study import listing
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.study_file import load_study

CONF = Path(__file__).parents[2] / "conf"
FILES = [path for path in sorted(CONF.rglob("*.toml")) if {"study", "one-shot"}.isdisjoint(path.parts)]
IMAGES = [path for path in FILES if load(path).dataset != "linear-regression"]
DISTINCT = list({str(replace(load(path), run_name="")): path for path in reversed(IMAGES)}.values())[::-1]
REAL = ("fedavg-noniid", "fedavg-iid-sparse", "most-sensitive", "fedadam", "scaffold-one-class")
T4 = sorted((CONF / "study" / "cifar100-t4").glob("*.toml"))
HEADLINE = CONF / "study" / "gpu-headline.toml"
MODEL = {"model": "vit_small_patch14_dinov2", "input_size": 98, "trainable_blocks": 2, "prefix_cache": "float16",
         "augmentation": "flip", "batch_size": 32}  # fmt: skip


def name(path: Path) -> str:
    return path.relative_to(CONF).with_suffix("").as_posix()


def test_the_readme_holds_all_settings_as_they_are_generated_and_names_every_file() -> None:
    text = (CONF / "README.md").read_text(encoding="utf-8")
    assert text == with_reference(text), COMMAND
    stub = (CONF.parent / "fl_taskarith" / "__init__.pyi").read_text(encoding="utf-8")
    assert stub == with_reference(stub, ".pyi"), COMMAND
    named = {file for pattern in re.findall(r"`([\w./*-]+\.toml)`", text) for file in CONF.glob(pattern)}
    assert named == set(CONF.rglob("*.toml"))
    with pytest.raises(ConfigError, match="add both"):
        with_reference("no markers")


def is_further(path: Path) -> bool:
    """Whether a file differs from one of the default suite in little: CI runs these too."""
    return path.parent.name in ("calibration-rounds", "density") or path.stem in (
        "least-sensitive", "fedgma", "fedprox", "fedyogi", "trimmed-mean", "geometric-median", "gram-anchored", "cclip",
        "br-ifca", "fedbn", "fedavgm", "median", "lowest-magnitude", "highest-magnitude", "random", "krum", "fedadam",
        "most-salient", "random-by-kind", "queries-keys", "no-values-projections",
        "covariance", "covariance-momentum", "merge-rule", "ghbm", "local-ghbm", "fedhbm", "fedcm", "fedvarp", "fedexp",
        "not-true-distillation", "feature-anchoring",
        "scaffold-one-class", "most-sensitive", "fednova", "scaffold", "fedavg-iid-sparse", "fedavg-noniid-sparse",
        "fedavg-noniid", "centralized-sparse",
    )  # fmt: skip


def on_digits(path: Path, folder: Path, **settings: Any) -> History:
    """The file's algorithm, mask and rate on digits: fewer clients, and as skewed as ten classes allow."""
    config = load(path)
    fewer: dict[str, Any] = {"num_rounds": 4}
    if config.strategy != "centralized":
        fewer = {"num_rounds": 10, "num_clients": 50, "participation": max(0.2, config.participation)}
        if config.sharding == "classes" and config.classes_per_client > 2 and "sharding" not in settings:
            fewer["classes_per_client"] = 2
    return simulate(
        path,
        **{"dataset": "digits", "model": "vit_glyph", "input_size": 16, "validation_size": 180,
           "calibration_size": 100, "batch_size": 16, "evaluate_every": 10, "threads": 1, "draw_curves": False,
           "save_model": False, "results_dir": str(folder), **fewer, **settings},
    )  # fmt: skip


def ends_above_the_ridge_head(history: History) -> bool:
    return bool(history.rows[-1]["test_accuracy"] > history.rows[0]["test_accuracy"])


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if is_further(path) else []) for path in DISTINCT], ids=name
)
def test_every_conf_file_ends_above_the_ridge_head(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(path)
    assert config.learning_rate == "auto"
    assert config.strategy == "centralized" or known_rate(config) is not None, "of the file as it stands"
    assert ends_above_the_ridge_head(on_digits(path, tmp_path))
    assert capsys.readouterr().out.splitlines()[-1].endswith("points above the ridge head")


@pytest.mark.parametrize("skew", [{"classes_per_client": 1}, {"sharding": "dirichlet", "dirichlet_alpha": 0.1}])
@pytest.mark.parametrize(
    "stem",
    [
        pytest.param(stem, marks=pytest.mark.slow)
        for stem in ("fedavg-noniid", "fedavg-noniid-sparse", "rules/most-sensitive")
    ],
)
def test_and_so_it_does_at_the_most_skewed_data(stem: str, skew: dict[str, Any], tmp_path: Path) -> None:
    assert ends_above_the_ridge_head(on_digits(CONF / f"{stem}.toml", tmp_path, **skew))


@pytest.mark.parametrize("path", [path for path in FILES if path not in IMAGES], ids=name)
def test_conf_files_of_regression_data_come_nearer_to_the_truth(path: Path, tmp_path: Path) -> None:
    history = simulate(path, num_rounds=60, num_clients=100, draw_curves=False, results_dir=str(tmp_path))
    assert history.rows[-1]["matched_distance"] < 0.8 * history.rows[0]["matched_distance"]


@pytest.mark.slow
@pytest.mark.skipif(real_data_folder() is None, reason="the real CIFAR-100 and ViT-S/14 are not at hand")
@pytest.mark.parametrize("nc", [0, 1], ids=["as-it-is", "one-class"])
@pytest.mark.parametrize("path", [path for path in IMAGES if path.stem in REAL], ids=name)
def test_conf_files_end_above_the_ridge_head_on_cifar100(path: Path, nc: int, tmp_path: Path) -> None:
    """The last two blocks of a real ViT-S/14 on 2,000 images."""
    folder, config = real_data_folder(), load(path)
    if nc and (config.sharding != "classes" or config.classes_per_client == nc):
        pytest.skip("one class per client is what it has, or no such division")
    assert folder is not None
    (weights,) = folder.glob("*.safetensors")
    skew = {"classes_per_client": nc} if nc else {}
    history = simulate(
        path, data_dir=str(folder), weights=str(weights), **MODEL, **skew, train_subset=2000, validation_size=500,
        calibration_size=200, test_subset=1000, num_rounds=5 if nc else 10, evaluate_every=5, threads=1,
        draw_curves=False, save_model=False, results_dir=str(tmp_path),
    )  # fmt: skip
    assert ends_above_the_ridge_head(history)


# The studies of a free T4 and of ten minutes of a large GPU


@pytest.mark.parametrize("path", T4, ids=name)
def test_the_hours_that_a_file_of_the_t4_study_states_are_those_of_its_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "speed_of", lambda run, seconds: Speed(training=1000, evaluation=3000))
    lines = list(list_study(StudyResults(load_study(path), tmp_path)))
    runs, hours = lines[-1].split()[1], lines[-1].split("about ")[1].split(" of one")[0]
    told = path.read_text().split("title =")[0]
    in_hours = float(hours.split()[0]) / (60 if "minutes" in hours else 1)
    assert f"At most {runs} runs of" in told and f": {in_hours:.1f} hours at" in told
    assert in_hours < 10, "a few sessions of a free T4"


def test_the_t4_study_has_every_part_of_the_assignment() -> None:
    parts = "calibration-rounds centralized density extension fedavg-iid heterogeneity rules six-models"
    assert [path.stem for path in T4] == parts.split()
    assert {load_study(path).name.partition("/")[0] for path in T4} == {"cifar100-t4"}, "parts share their runs"
    assert all(load_study(path).shared["model"] == "vit_small_patch16_224.dino" for path in T4)


def test_the_minutes_that_the_headline_study_states_are_those_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "speed_of", lambda run, seconds: Speed(training=9_000, evaluation=30_000))
    results = StudyResults(load_study(HEADLINE), tmp_path)
    runs, minutes = re.findall(r"Left: (\d+) runs of .* about (\d+) minutes", list(list_study(results))[-1])[0]
    told = HEADLINE.read_text().split("title =")[0]
    assert f"At most {runs} runs of" in told and f": {minutes} minutes at" in told and int(minutes) < 10
    assert [arm.label for arm in results.study.in_turn][:3] == ["ridge head", "dense", "dense"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*T4, HEADLINE], ids=name)
def test_every_part_of_the_gpu_studies_runs_in_miniature_and_is_resumable(path: Path, tmp_path: Path) -> None:
    """One round a run, on images of 100 colours; cut after its first run, then carried on."""
    small = re.sub(r"rounds = \[[\d, ]+\]", "rounds = [1]", path.read_text())
    small = re.sub(r"num-rounds = \d+", "num-rounds = 2", small)
    small = re.sub(r"keep = 2", "keep = 1", small).replace("seeds = [0, 1, 2]", "seeds = [0]")
    file = tmp_path / "small.toml"
    file.write_text(small)
    overrides = {"dataset": "synthetic", "model": "vit_glyph", "input-size": 16, "batch-size": 4, "threads": 1,
                 "train-subset": 1000, "validation-size": 100, "calibration-size": 100, "test-subset": 100}  # fmt: skip
    study = load_study(file, overrides)
    run_studies([study], tmp_path, budget=1e-3)
    run_studies([study], tmp_path)
    assert "Nothing is left to do." in list(list_study(StudyResults(study, tmp_path)))
    assert len((tmp_path / study.name / "table.csv").read_text().splitlines()) == len(study.arms) + 1
