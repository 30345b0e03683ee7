"""What `learning-rate = "auto"` stands for."""

import csv
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, from_run_config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.learning_rates import classes_held, known_rate, search_from, table, with_known_rate

ROOT = Path(__file__).parents[2]
CIFAR = {"dataset": "cifar100", "model": "vit_small_patch14_dinov2", "trainable_blocks": 2, "num_clients": 100}


def rate(**settings: object) -> float:
    known = known_rate(Config(**settings))
    assert known is not None
    return known.rate


def test_the_quick_start_keeps_the_rate_and_the_name_that_it_had() -> None:
    config, known = with_known_rate(Config())
    assert config.learning_rate == 1.0 and known is not None
    assert config.fingerprint() == Config(learning_rate=1.0, precision="fp32", compile="off").fingerprint()
    assert "results/digits/heterogeneity/search.csv" in known.describe()


@pytest.mark.parametrize("head", ["lda", "ncm"])
def test_the_rates_of_the_ridge_head_serve_the_other_solved_heads_and_say_whose_they_are(head: str) -> None:
    config, known = with_known_rate(Config(head=head))
    assert known is not None and config.learning_rate == with_known_rate(Config())[0].learning_rate
    assert known.describe().endswith(", under a ridge head")
    assert "under a ridge head" not in known_rate(Config()).describe()  # type: ignore[union-attr]
    linear = known_rate(Config(head="linear", trainable="all", mask_rule="none"))
    assert linear is not None and linear.cell.head == "linear", "those of a trained head are of searches of their own"


def test_a_rate_that_is_given_stays() -> None:
    assert with_known_rate(Config(learning_rate=0.5)) == (Config(learning_rate=0.5), None)


@pytest.mark.parametrize("cell", table(), ids=lambda cell: f"{cell.dataset}-{cell.rule}-{cell.density:g}-{cell.loss}")
def test_every_rate_was_chosen_on_validation_in_the_search_that_its_cell_names(cell: object) -> None:
    with open(ROOT / cell.source, encoding="utf-8", newline="") as file:  # type: ignore[attr-defined]
        chosen = {float(line["learning_rate"]) for line in csv.DictReader(file) if line["chosen"] == "True"}
    assert set(cell.rates.values()) <= chosen  # type: ignore[attr-defined]


def test_more_skew_more_weights_and_more_steps_never_ask_for_a_larger_rate() -> None:
    for rule in ("none", "least-sensitive", "random"):
        by_skew = [rate(**CIFAR, mask_rule=rule, classes_per_client=nc) for nc in (1, 5, 10, 50, 100)]
        assert by_skew == sorted(by_skew), rule
        by_steps = [rate(**CIFAR, mask_rule=rule, local_steps=steps) for steps in (32, 16, 8, 4, 1)]
        assert by_steps == sorted(by_steps), rule
    by_density = [rate(**CIFAR, density=density, sharding="iid") for density in (1.0, 0.7, 0.5, 0.2, 0.1, 0.05)]
    assert by_density == sorted(by_density)
    assert rate(**CIFAR, density=0.7) == rate(**CIFAR, mask_rule="none"), "denser than any cell: as all weights"
    assert rate(**CIFAR, participation=0.01) == pytest.approx(rate(**CIFAR) / 10), "one client in place of ten"
    assert rate(**CIFAR, train_subset=2000) == pytest.approx(rate(**CIFAR) / 10), "20 images, not 200"
    assert rate(**CIFAR, strategy="krum") == pytest.approx(rate(**CIFAR) / 10), "the step of a single client"
    assert rate(**CIFAR, strategy="fedavgm") == pytest.approx(rate(**CIFAR) / 10), "steps add up to ten of them"


def test_dirichlet_shares_count_as_the_classes_that_they_amount_to() -> None:
    held = [classes_held(Config(**CIFAR, sharding="dirichlet", dirichlet_alpha=alpha)) for alpha in (1e-6, 1, 1e6)]
    assert held == pytest.approx([1, 2, 100], rel=0.02)
    one = rate(**CIFAR, mask_rule="none", classes_per_client=1)
    assert rate(**CIFAR, mask_rule="none", sharding="dirichlet", dirichlet_alpha=0.1) == one


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "synthetic"},
        {"dataset": "cifar100"},  # vit_glyph was not trained on it
        {"weights": "none"},
        {"head": "linear", "trainable": "head", "mask_rule": "none", "head_rounds": 2},
        {"strategy": "somewhere:Strategy"},
        {"task_vector_bank": "float32"},
    ],
)
def test_what_no_search_has_tried_is_refused_and_the_search_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="fl-taskarith search"):
        with_known_rate(Config(**settings))


def test_a_run_says_and_records_where_its_rate_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = simulate(num_rounds=1, results_dir=str(tmp_path), draw_curves=False, mask_rule="none")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("device cpu, fp32, compile off, ") and printed[0].endswith(" images/s")
    assert printed[1].startswith("learning-rate = 0.00316: validation chose 0.00316 for all weights, Nc = 2")
    assert history.rows[1]["learning_rate"] == 0.00316
    assert printed[1] in (history.folder / "run.json").read_text()
    assert (history.folder / "run.log").read_text().splitlines() == printed


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_rule": "none"},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"mask_rule": "most-sensitive"},
                {"classes_per_client": 1},
                {"head": "lda"},
                {"head": "ncm", "sharding": "iid"},
                {"head": "ncm", "classes_per_client": 1, "mask_rule": "none"},
            )
        ),
    ],
)
def test_runs_that_used_to_collapse_by_default_end_above_the_ridge_head(
    settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = simulate(
        results_dir=str(tmp_path), draw_curves=False, num_rounds=10, evaluate_every=10, clients_at_once=10, **settings
    )
    assert history.rows[-1]["test_accuracy"] > history.rows[0]["test_accuracy"]
    assert re.search(r"points above the [\w-]+ head$", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_the_search_needs_no_known_rate(tmp_path: Path) -> None:
    from fl_taskarith.cli.command import main

    words = ["weights=none", "num-clients=10", "train-subset=200", "validation-size=60", "test-subset=60",
             f"data-dir={tmp_path}"]  # fmt: skip
    options = ["--from", "1e-5", "--to", "0.1", "--per-decade", "1", "--rounds", "1", "--keep", "1"]
    assert main(["search", *options, *words, "--results-dir", str(tmp_path)]) == 0, "words may stand behind options"
    assert main(["simulate", *words, f"results-dir={tmp_path}"]) == 1
    assert dataclasses.replace(Config(), learning_rate=0.0).peak_rate == 0


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi"])
def test_adaptive_servers_are_refused_at_a_step_that_is_known_to_collapse(strategy: str) -> None:
    with pytest.raises(ConfigError, match="server-lr = 1 is the size of every step"):
        with_known_rate(Config(strategy=strategy))
    assert with_known_rate(Config(strategy=strategy, server_lr=0.01))[0].learning_rate == 1.0


def test_a_rate_that_would_be_zero_is_none(tmp_path: Path) -> None:
    assert known_rate(Config(momentum=1.0)) is None
    assert known_rate(Config(strategy="fedavgm", server_momentum=1.0)) is None


def test_the_defaults_of_flowers_run_config_are_not_taken_for_what_a_user_asks_for() -> None:
    for name in ("br-ifca.toml", "fed-em.toml"):
        given = Config().to_run_config() | tomllib.loads((ROOT / "conf" / name).read_text())
        assert from_run_config(given).dataset == "linear-regression"


def test_a_search_begins_two_decades_below_what_is_known() -> None:
    assert search_from(Config()) == 0.01
    assert search_from(Config(mask_rule="none")) == 1e-5
    assert search_from(Config(dataset="synthetic", mask_rule="none")) < search_from(Config(dataset="synthetic"))
