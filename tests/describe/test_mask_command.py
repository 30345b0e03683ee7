"""The mask command: the run's own mask without the run, what masks look like, and how much they overlap."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fl_taskarith.config.settings import Config  # isort: skip  (before torch: the package sets how OpenMP waits)

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import same_bits

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.describe import masks as study_masks
from fl_taskarith.describe.mask_report import anatomy_table, read_mask
from fl_taskarith.masking.anatomy import density_by_kind, parts
from fl_taskarith.masking.mask import Mask, between_pairs, load_mask, save_mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.training.local import Evaluation, evaluate
from fl_taskarith.workspace.make_mask import shard_sums
from fl_taskarith.workspace.workspace import Workspace

SMALL = {
    "num_clients": 4,
    "sharding": "iid",
    "train_subset": 300,
    "test_subset": 50,
    "validation_size": 60,
    "calibration_size": 40,
    "num_rounds": 1,
    "local_steps": 1,
    "calibration_rounds": 2,
    "threads": 1,
    "save_model": False,
}
WORDS = [f"{key.replace('_', '-')}={str(value).lower()}" for key, value in SMALL.items()]


@pytest.fixture
def no_anatomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as calibrating vit_glyph."""
    monkeypatch.setattr(study_masks, "plot_anatomy", lambda described, output: [])
    monkeypatch.setattr(study_masks, "plot_sensitivity", lambda *of: [])


def write(path: Path, mask: Mask, **facts: object) -> Path:
    save_mask(path, mask, {"model": "tiny", "facts": json.dumps(facts)})
    return path


def bits(*values: int) -> Mask:
    return Mask({"norm.weight": torch.tensor(values, dtype=torch.bool)})


# The mask of a run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": "flower"},  # not started: its numbers are those of the sequential engine
        {"mask_source": "clients", "calibration_per_client": 20},
        {"strategy": "centralized", "mask_rule": "most-sensitive", "sensitivity_threshold": 0.001},
        {
            "head": "linear",
            "head_rounds": 2,
            "num_rounds": 3,
            "schedule": "plateau",
            "evaluate_every": 1,
            "learning_rate": 1.0,
        },
        {"mask_rule": "random", "density": 0.03},
        {"mask_rule": "lowest-magnitude", "mask_exclude": "*.bias,norm.*", "trainable_blocks": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
@pytest.mark.usefixtures("no_anatomy")
def test_the_mask_is_that_of_the_run_bit_for_bit(settings: dict[str, object], tmp_path: Path) -> None:
    config = Config(**{**SMALL, "results_dir": str(tmp_path), **settings})
    run = simulate(dataclasses.replace(config, engine="sequential"))
    folder = study_masks.make_masks(config)
    of_run, facts_of_run = load_mask(run.folder / "mask.safetensors")
    mask, facts = load_mask(folder / "mask.safetensors")
    assert 0 < mask.density < 1
    assert list(mask.tensors) == list(of_run.tensors)
    assert all(torch.equal(mask.tensors[name], tensor) for name, tensor in of_run.tensors.items())
    assert json.loads(facts["facts"]) == json.loads(facts_of_run["facts"])
    assert facts["model"] == facts_of_run["model"] == "vit_glyph"


@pytest.mark.usefixtures("no_anatomy")
def test_the_test_images_decide_nothing_and_no_run_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(*of: Any, **settings: Any) -> Evaluation:
        seen.append(len(of[1]))
        return evaluate(*of, **settings)

    monkeypatch.setattr("fl_taskarith.workspace.workspace.evaluate", watched)
    study_masks.make_masks(Config(**SMALL, results_dir=str(tmp_path)))
    assert seen == [SMALL["validation_size"]]
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.usefixtures("no_anatomy")
def test_a_rule_that_scores_nothing_solves_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.server.run.RidgeSolver", lambda statistics: 1 / 0)
    folder = study_masks.make_masks(Config(**SMALL, results_dir=str(tmp_path), mask_rule="highest-magnitude"))
    assert json.loads((folder / "summary.json").read_text())["rule"] == "highest-magnitude"


def test_the_command_writes_mask_summary_and_figure_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mask", *WORDS, "density=0.2", f"results-dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "masks").iterdir()
    assert folder.name.startswith("vit_glyph-least-sensitive-0.2-r2-")
    assert sorted(path.name for path in folder.iterdir()) == [
        "anatomy.pdf", "anatomy.png", "mask.safetensors", "run.log", "sensitivity.pdf", "sensitivity.png",
        "summary.json",
    ]  # fmt: skip
    described, summary = read_mask(folder / "mask.safetensors"), json.loads((folder / "summary.json").read_text())
    assert summary["updated"] == round(0.2 * summary["maskable"]) == described.mask.updated
    assert summary["key_biases"] == 4 * 64  # of 4 blocks of width 64: a least-sensitive rule takes them all
    assert summary["density_by_kind"]["q"] == density_by_kind(described.mask)["q"].density
    assert summary["density_by_layer_and_kind"]["block 3"]["mlp"] == parts(described.mask)["block 3", "mlp"].density
    assert summary["config"]["density"] == 0.2
    sensitivity = summary["sensitivity_by_kind"]
    assert list(sensitivity) == ["q", "k", "v", "proj", "mlp", "norm", "patch", "position", "token", "key biases"]
    assert sensitivity["key biases"]["median"] < 1e-12 < sensitivity["q"]["median"] < sensitivity["v"]["median"]
    assert "256 key biases (gradient 0" in printed
    assert summary["seconds"] > 0
    assert anatomy_table(described) in printed
    assert all(str(folder / name) in printed for name in ("mask.safetensors", "summary.json", "anatomy.png"))


# The clients' own masks


@pytest.mark.usefixtures("no_anatomy")
def test_clients_masks_have_the_density_and_overlap_more_than_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["mask", *WORDS, f"results-dir={tmp_path}", "--output", str(output), "--clients", "3"]) == 0
    report = json.loads((output / "summary.json").read_text())["clients"]
    assert report["densities"] == [load_mask(output / "mask.safetensors")[0].density] * 3
    pairs = between_pairs(report["pairwise"]["matrix"])
    assert len(pairs) == 3
    assert (report["pairwise"]["min"], report["pairwise"]["max"]) == (min(pairs), max(pairs))
    assert report["pairwise"]["mean"] == pytest.approx(sum(pairs) / 3)
    assert report["pairwise"]["by_chance"] == pytest.approx(0.1 / 1.9, rel=1e-4)
    assert report["with_mask_by_chance"] == pytest.approx(0.1 / 1.9, rel=1e-4)
    assert all(3 * report["pairwise"]["by_chance"] < value < 1 for value in pairs + report["with_mask"]["each"])
    printed = capsys.readouterr().out
    assert f"{report['with_mask']['mean']:.4f}" in printed
    assert f"{report['pairwise']['max']:.4f}" in printed


@pytest.mark.usefixtures("no_anatomy")
def test_a_client_alone_has_the_mask_that_the_federation_of_it_has(tmp_path: Path) -> None:
    settings = {**SMALL, "num_clients": 1, "mask_source": "clients", "calibration_per_client": 30}
    folder = study_masks.make_masks(Config(**settings, results_dir=str(tmp_path)), clients=1)
    report = json.loads((folder / "summary.json").read_text())["clients"]
    assert report["with_mask"]["each"] == [1.0]
    assert report["pairwise"] is None


def test_a_clients_scores_are_of_its_own_shard_and_no_more_than_asked() -> None:
    home = Workspace(Config(**{**SMALL, "fisher_labels": "true"}))
    head = {name: home.pretrained[name] + 0.01 * torch.randn(home.pretrained[name].shape) for name in HEAD_PARAMETERS}
    everything, anything = Mask.full(home.maskable()), np.random.default_rng()
    parts_of_all = [shard_sums(home, head, partition)(1, everything) for partition in range(4)]
    assert [examples for _, examples in parts_of_all] == [75] * 4
    own = home.sensitivity_sums(head, everything, home.data.train.take(home.shards[2]), anything)
    assert all(value.any() for name, value in own.items() if "qkv.bias" not in name)
    assert same_bits(parts_of_all[2][0], own)

    some = Workspace(dataclasses.replace(home.config, calibration_per_client=10))
    first, again, later = (shard_sums(some, head, 2)(number, everything) for number in (1, 1, 2))
    assert first[1] == later[1] == 10
    assert same_bits(first[0], again[0])
    assert not same_bits(first[0], later[0])  # other examples, drawn anew


# Mask files


def test_files_are_described_and_their_overlap_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.safetensors", bits(1, 1, 0, 0, 0), rule="random")
    second = write(tmp_path / "b.safetensors", bits(0, 1, 1, 1, 0), rule="least-sensitive", calibration_rounds=7)
    output = tmp_path / "out"
    assert main(["mask", str(first), str(second), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "tiny, random, density 0.4: 2 of 5" in printed
    assert "tiny, least-sensitive, density 0.6, R = 7: 3 of 5" in printed
    summary = json.loads((output / "summary.json").read_text())
    assert summary["jaccard"] == [[1, 0.25], [0.25, 1]]
    assert summary["by_chance"][0][1] == pytest.approx(0.24 / 0.76)
    assert [mask["updated"] for mask in summary["masks"]] == [2, 3]
    matrix = printed.split("Jaccard")[1].split("by chance")
    assert matrix[0].split() == ["(1)", "(2)", "(1)", "1.0000", "0.2500", "(2)", "0.2500", "1.0000"]
    assert matrix[1].split()[4] == "0.3158"
    assert sorted(path.name for path in output.glob("*.png")) == ["anatomy-1.png", "anatomy-2.png"]


def test_one_file_is_described_without_writing_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", bits(1, 0, 0, 0))
    assert main(["mask", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "unknown rule, density 0.25: 1 of 4" in printed
    assert "Jaccard" not in printed
    assert list(tmp_path.iterdir()) == [path]


def damaged_files(folder: Path) -> dict[str, list[Path]]:
    sound = write(folder / "sound.safetensors", bits(1, 0, 0))
    cut = folder / "cut.safetensors"
    cut.write_bytes(sound.read_bytes()[:-1])
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file({"norm.weight": torch.ones(3)}, weights)
    damaged = folder / "facts.safetensors"
    save_mask(damaged, bits(1), {"facts": "[1"})
    empty = folder / "empty.safetensors"
    save_mask(empty, Mask({}), {})
    other = write(folder / "other.safetensors", bits(1, 0, 0, 1))
    folder_of_that_name = folder / "folder.safetensors"
    folder_of_that_name.mkdir()
    return {
        "cut": [cut],
        "weights": [sound, weights],
        "facts": [damaged],
        "empty": [empty],
        "missing": [folder / "missing.safetensors"],
        "folder": [folder_of_that_name],
        "other": [sound, sound, other],
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cut", "cut.safetensors cannot be read as a mask"),
        ("weights", "weights.safetensors cannot be read as a mask"),
        ("facts", "facts.safetensors is damaged"),
        ("empty", "no tensors at all"),
        ("missing", "missing.safetensors cannot be read as a mask"),
        ("folder", "folder.safetensors cannot be read as a mask"),
        ("other", "other.safetensors mask different models"),
    ],
)
def test_a_file_that_is_no_mask_or_anothers_is_one_line_and_status_1(
    kind: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = damaged_files(tmp_path)[kind]
    assert main(["mask", *map(str, files), "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert expected in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mask-rule=none"], "choose another mask-rule"),
        (["head-rounds=1", "num-rounds=1"], "raise num-rounds"),
        (["mask-rule=random", "--clients", "2"], "set mask-rule to least-sensitive or most-salient"),
        (["strategy=centralized", "--clients", "2"], "leave --clients out"),
        (["num-clients=6", "--clients", "7"], "--clients 7 exceeds num-clients = 6"),
        (["num-clients=4", "sharding=classes", "mask-rule=random"], "some have no owner"),
        (["some.safetensors", "seed=1"], "leave settings"),
        (["some.safetensors", "--clients", "2"], "--clients out"),
        (["weights=some.safetensors"], "no weights file"),
        (["density=1e-9", "mask-rule=random"], "less than one weight"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_what_to_change(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [] if "some.safetensors" in words else [f"results-dir={tmp_path}"]
    assert main(["mask", *place, *words]) == 1
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_output_that_cannot_be_made_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", bits(1, 0))
    assert main(["mask", str(path), "--output", str(path / "below")]) == 1
    assert "Cannot make the folder" in capsys.readouterr().err
