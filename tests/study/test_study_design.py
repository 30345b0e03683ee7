"""What a study file decides before it runs: primary contrasts, seeds of shards, and what a search tries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_studies import IMAGES, SEARCHED, STUDY, FakeTraining, KnowingTraining, study_of, table

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.round_zero_cache import Starts
from fl_taskarith.storage.correctness import CORRECT
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies


def train(monkeypatch: pytest.MonkeyPatch, training: FakeTraining) -> FakeTraining:
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", training)
    monkeypatch.setattr("fl_taskarith.study.tables.plot_arms", lambda *_: [])
    monkeypatch.setattr("fl_taskarith.study.tables._figures", lambda *_: [])
    return training


def better_half(config: Config) -> float:
    return 0.7 + 0.1 * (config.trainable == "head") + 0.005 * config.seed + 0.01 * config.shard_seed


PRIMARY = """
[[primary]]
arm = "head alone"
against = "dense"
"""


# primary contrasts


def test_primary_contrasts_are_one_family_and_the_rest_is_called_exploratory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, FakeTraining(better_half, test=lambda value: value))
    run_studies([study_of(STUDY + PRIMARY, tmp_path)], tmp_path)
    (row,) = table(tmp_path / "tiny" / "primary.csv")
    assert (row["arm"], row["against"], row["over"], row["n"]) == ("head alone", "dense", "seeds", "3")
    assert float(row["mean"]) == pytest.approx(10.0)
    assert row["p"] == row["p_holm"]
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert "## Primary contrasts" in text and "All other differences below are exploratory" in text
    run_studies([study_of(STUDY.replace("tiny", "other"), tmp_path)], tmp_path)
    text = (tmp_path / "other" / "README.md").read_text()
    assert "## Primary contrasts" not in text and "all differences are exploratory" in text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('arm = "gone"\nagainst = "dense"', r'\[\[primary\]\] arm = "gone" is no arm of this study'),
        ('arm = "dense"\nagainst = "gone"', r'\[\[primary\]\] against = "gone" is no arm'),
        ('arm = "dense"\nagainst = "dense"', 'compares "dense" with itself'),
        ('arm = "dense"', "against"),
        ('arm = "dense"\nagainst = "head alone"\nmargin = 1', "margin"),
        ('arm = "dense"\nagainst = "head alone"\n[[primary]]\narm = "head alone"\nagainst = "dense"', "twice"),
    ],
)
def test_a_contrast_that_means_nothing_is_refused_when_the_file_is_read(
    written: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        study_of(f"{STUDY}\n[[primary]]\n{written}\n", tmp_path)


def test_a_family_stays_small(tmp_path: Path) -> None:
    arms = "".join(
        f'[[arm]]\nname = "a{i}"\nsettings = {{ learning-rate = 0.1, local-steps = {i + 2} }}\n' for i in range(9)
    )
    contrasts = "".join(f'[[primary]]\narm = "a{i}"\nagainst = "dense"\n' for i in range(9))
    with pytest.raises(ConfigError, match=r"9 .* contrasts: expected at most 8"):
        study_of(STUDY + arms + contrasts, tmp_path)


def test_a_contrast_is_found_in_its_group_and_across_groups(tmp_path: Path) -> None:
    groups = '[[group]]\nname = "one"\nsettings = { classes-per-client = 1 }\n[[group]]\nname = "two"\n'
    text = STUDY + groups + '[[primary]]\narm = "head alone"\nagainst = "dense"\ngroup = "two"\n'
    text += '[[primary]]\narm = "one: dense"\nagainst = "two: dense"\n'
    pairs = [(arm.title, against.title) for arm, against in study_of(text, tmp_path).contrasts]
    assert pairs == [("two: head alone", "two: dense"), ("one: dense", "two: dense")]
    with pytest.raises(ConfigError, match=r'arm = "dense" could be any of "one: dense", "two: dense": give a full'):
        study_of(text + '[[primary]]\narm = "dense"\nagainst = "head alone"\n', tmp_path)


# seeds of shards, and intervals over images


def test_every_shard_seed_goes_with_every_seed_and_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train(monkeypatch, FakeTraining(better_half, test=lambda value: value))
    study = study_of(STUDY.replace("seeds = [0, 1, 2]", "seeds = [0, 7]\nshard-seeds = [0, 1, 2]"), tmp_path)
    run_studies([study], tmp_path)
    runs = [(run.shard_seed, run.seed) for run in training.runs if run.trainable != "head"]
    assert runs == [(shards, seed) for shards in (0, 1, 2) for seed in (0, 7)]
    lines = [line for line in table(tmp_path / "tiny" / "runs.csv") if line["arm"] == "dense"]
    assert [(int(line["shard_seed"]), int(line["seed"])) for line in lines] == runs
    row = table(tmp_path / "tiny" / "table.csv")[0]
    assert (row["n"], row["gain_n"]) == ("6", "3")
    assert float(row["gain_sd"]) == pytest.approx(1.0), "of the means by shard seed"
    assert json.loads((tmp_path / "tiny" / "settings.json").read_text())["shard_seeds"] == [0, 1, 2]
    assert "shard seeds 0, 1, 2, each with seeds 0, 7" in (tmp_path / "tiny" / "README.md").read_text()


def test_without_shard_seeds_runs_and_files_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = train(monkeypatch, FakeTraining(better_half))
    run_studies([study_of(STUDY, tmp_path)], tmp_path)
    assert all(run.shard_seed == run.seed for run in training.runs)
    assert "shard_seed" not in table(tmp_path / "tiny" / "runs.csv")[0]
    assert not (tmp_path / "tiny" / "correct.csv").exists()


@pytest.mark.parametrize("written", ["shard-seeds = []", "shard-seeds = [1, 1]"])
def test_shard_seeds_are_there_each_once(written: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard-seeds = .* expected at least one seed, each once"):
        study_of(STUDY.replace("seeds = [0, 1, 2]", f"seeds = [0]\n{written}"), tmp_path)


@pytest.mark.parametrize(("seeds", "over"), [("[0]", "images"), ("[0, 1]", "seeds and images")])
def test_where_images_are_known_intervals_are_over_them_too(
    seeds: str, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, KnowingTraining(better_half, test=lambda value: value))
    run_studies([study_of((STUDY + PRIMARY).replace("[0, 1, 2]", seeds), tmp_path)], tmp_path)
    (row,) = table(tmp_path / "tiny" / "primary.csv")
    assert row["over"] == over
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    dense = table(tmp_path / "tiny" / "table.csv")[0]
    assert float(dense["gain_low"]) < float(dense["gain_mean"]) < float(dense["gain_high"])
    (first, *_) = table(tmp_path / "tiny" / "correct.csv")
    assert (first["images"], len(first[CORRECT])) == (str(IMAGES), IMAGES // 4)
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert ("says nothing of other seeds" in text) is (over == "images")
    assert ("both are resampled" in text) is (over != "images")


def test_two_seeds_without_images_have_no_interval_in_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, FakeTraining(better_half, test=lambda value: value))
    run_studies([study_of((STUDY + PRIMARY).replace("[0, 1, 2]", "[0, 1]"), tmp_path)], tmp_path)
    row = table(tmp_path / "tiny" / "table.csv")[0]
    assert (row["gain_low"], row["gain_high"], row["gain_detectable"]) == ("", "", "")
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert "+20.75 (+20.00, +21.50)" in text and "have no interval" in text
    assert table(tmp_path / "tiny" / "primary.csv")[0]["verdict"] == "cannot tell"


# the share of the best iid arm's gain


def test_a_bad_run_over_iid_clients_is_not_rewarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: Mapping[tuple[str, str], float] = {
        ("iid", "all"): 0.9, ("iid", "head"): 0.55, ("classes", "all"): 0.7, ("classes", "head"): 0.6,
    }  # fmt: skip
    part = {"head": "head", "backbone": "all"}
    train(
        monkeypatch,
        FakeTraining(lambda config: values[config.sharding, part[config.trainable]], test=lambda value: value),
    )
    groups = '[[group]]\nname = "Nc"\n[[group]]\nname = "iid"\nsettings = { sharding = "iid" }\n'
    run_studies([study_of(STUDY.replace('reference = "dense"\n', "") + groups, tmp_path)], tmp_path)
    shares = {
        (row["group"], row["arm"]): row["gain_retained_percent"] for row in table(tmp_path / "tiny" / "table.csv")
    }
    assert float(shares["Nc", "dense"]) == pytest.approx(50.0)
    assert float(shares["Nc", "head alone"]) == pytest.approx(25.0), "and not 200 % of what the head gains on iid"
    assert shares["iid", "dense"] == ""


@pytest.mark.parametrize(
    ("heads", "said"),
    [(("lda", "lda"), "LDA head"), (("ncm", "ncm"), "nearest-class-mean head"), (("ridge", "lda"), "head")],
)
def test_tables_say_which_head_gains_are_over(
    heads: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, FakeTraining(better_half))
    text = STUDY.replace("learning-rate = 0.01", f'learning-rate = 0.01, head = "{heads[0]}"')
    text = text.replace('trainable = "head"', f'local-steps = 2, head = "{heads[1]}"')
    run_studies([study_of(text, tmp_path)], tmp_path)
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert f"| {said}, test % |" in written and f"gain over {said} [95 % CI]" in written
    assert f"{said[0].upper()}{said[1:]}: round 0" in written


# what a search tries

ALSO = SEARCHED.replace("keep = 2\n", 'keep = 2\nseeds = [0, 1]\nby = "loss"\nalso = { server-lr = [0.5, 1.0, 2.0] }\n')


class Losses(FakeTraining):
    """Writes validation losses from a formula."""

    def __call__(self, config: Config, deadline: float | None = None, starts: Starts | None = None) -> Any:
        self.runs.append(config)
        loss = self.accuracy(config)
        with Logbook(config) as logbook:
            for place in range(config.num_rounds + 1):
                logbook.write_round({"round": place, "val_accuracy": 0.5, "val_loss": loss, "test_accuracy": 0.5})


def loss_of(config: Config) -> float:
    """Least at a rate of 0.1 and a server step of 1, on average over seeds; each seed alone prefers another rate."""
    step = abs(np.log10(config.peak_rate) + 1 - (0.6 if config.seed else -0.6))
    return float(step + abs(np.log2(config.server_lr)) + 0.1 * config.seed)


def test_a_search_averages_over_its_seeds_and_tries_other_settings_with_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = train(monkeypatch, Losses(loss_of))
    study = study_of(ALSO, tmp_path)
    run_studies([study], tmp_path)
    search = [run for run in training.runs if run.num_rounds == 1]
    assert len(search) == 2 * 5 * 3, "seeds x rates x server steps"
    assert len(training.runs) == 30 + 4 + 2, "the two best for two rounds with both seeds, which are the final runs"
    lines = table(tmp_path / "searched" / "search.csv")
    chosen = [line for line in lines if line["chosen"] == "True"]
    assert {(line["learning_rate"], line["also"]) for line in chosen} == {("0.1", "server-lr = 1")}
    assert float(chosen[0]["val_loss"]) == pytest.approx(0.65), "the mean over both seeds"
    for row in table(tmp_path / "searched" / "table.csv"):
        assert (row["server_lr"], row["edge"]) == ("1.0", "False")
    arms = json.loads((tmp_path / "searched" / "settings.json").read_text())["arms"]
    assert [arm["settings"]["server-lr"] for arm in arms] == [1.0, 1.0]
    text = (tmp_path / "searched" / "README.md").read_text()
    assert "0.1, server-lr = 1" in text and "validation loss alone, averaged over seeds, among" in text
    before = len(training.runs)
    run_studies([study], tmp_path)
    assert len(training.runs) == before, "and nothing is run again"


def test_an_interrupted_search_goes_on_with_the_seed_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(ALSO, tmp_path)
    whole = train(monkeypatch, Losses(loss_of))
    run_studies([study], tmp_path / "whole")

    class Stopping(Losses):
        def __call__(self, config: Config, deadline: float | None = None, starts: Starts | None = None) -> Any:
            if len(self.runs) == 7:  # the first of two seeds of a trial is done
                raise KeyboardInterrupt
            return super().__call__(config, deadline, starts)

    first = train(monkeypatch, Stopping(loss_of))
    with pytest.raises(KeyboardInterrupt):
        run_studies([study], tmp_path / "cut")
    second = train(monkeypatch, Losses(loss_of))
    run_studies([study], tmp_path / "cut")
    names = [run.run_name for run in whole.runs]
    assert [run.run_name for run in (*first.runs, *second.runs)] == names
    for name in ("search.csv", "table.csv"):
        assert (tmp_path / "cut/searched" / name).read_text() == (tmp_path / "whole/searched" / name).read_text()


@pytest.mark.parametrize(("best", "edges"), [(2.0, "edge of server-lr: not tuned"), (1.0, "")])
def test_an_end_of_another_settings_values_is_not_tuned_either(
    best: float, edges: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, Losses(lambda config: float(abs(np.log10(config.peak_rate) + 1) + abs(config.server_lr - best))))
    run_studies([study_of(ALSO, tmp_path)], tmp_path)
    text = (tmp_path / "searched" / "README.md").read_text()
    assert (edges in text) if edges else ("not tuned)" not in text)


def test_the_limit_of_what_a_setting_accepts_is_no_end(tmp_path: Path) -> None:
    search = study_of(ALSO.replace("server-lr = [0.5, 1.0, 2.0]", "momentum = [0.0, 0.5, 0.9]"), tmp_path).search
    assert search is not None
    assert search.edges(0.1, (("momentum", 0.0),)) == ()
    assert search.edges(0.1, (("momentum", 0.9),)) == ("momentum",)
    assert search.edges(10.0, (("momentum", 0.9),)) == ("learning-rate", "momentum")


def test_a_trial_that_diverges_with_one_seed_is_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(ALSO, tmp_path)
    train(monkeypatch, Losses(loss_of))
    run_studies([study], tmp_path)
    results = StudyResults(study, tmp_path)
    (trial, *_) = results.scores(study.arms[0])
    run = results.trial_runs(study.arms[0], trial)[1]
    folder = tmp_path / "searched" / "runs" / run.run_name
    for file in folder.iterdir():
        file.unlink()
    (folder / "failure.json").write_text(json.dumps({"diverged": True, "cause": "NaN"}))
    assert StudyResults(study, tmp_path).scores(study.arms[0])[trial] == (-np.inf, -np.inf)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("server-lr = [0.5, 1.0, 2.0]", "server-lr = []", "expected a list of values"),
        ("server-lr = [0.5, 1.0, 2.0]", "learning-rate = [1.0]", "learning-rate is what a search decides by itself"),
        ("server-lr = [0.5, 1.0, 2.0]", "seed = [1]", "seed is set by the study itself"),
        ("server-lr = [0.5, 1.0, 2.0]", "server-lr = [-1.0]", "server-lr"),
        ("server-lr = [0.5, 1.0, 2.0]", "server-beta1 = [0.9]", "server-beta1"),
        ("seeds = [0, 1]\nby", "seed = 0\nseeds = [0, 1]\nby", "give seed or seeds, not both"),
        ("seeds = [0, 1]\nby", "seeds = [1, 1]\nby", "each once"),
        ('name = "dense"', 'name = "dense"\nsettings = { server-lr = 1.0 }', "is searched by .* and set"),
        ('name = "dense"', 'name = "dense"\nsearch = { seeds = [1] }', "search has no seed of its own"),
    ],
)
def test_a_search_that_cannot_be_is_refused_when_the_file_is_read(
    old: str, new: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        study_of(ALSO.replace(old, new), tmp_path)


def test_an_arm_may_leave_the_other_settings_out(tmp_path: Path) -> None:
    text = ALSO.replace('name = "dense"', 'name = "dense"\nsearch = { also = {} }\nsettings = { server-lr = 1.0 }')
    study = study_of(text, tmp_path)
    assert study.searched(study.arms[0]).also == ()  # type: ignore[union-attr]
