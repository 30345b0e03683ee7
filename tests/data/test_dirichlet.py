"""Dirichlet shards, and the command that shows any shards."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.sharding import _draw_classes, dirichlet_logs, make_shards
from fl_taskarith.describe.shard_histogram import class_histogram, show_shards
from fl_taskarith.errors import ConfigError


def histogram(labels: np.ndarray, shards: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.bincount(labels[shard], minlength=labels.max() + 1) for shard in shards])


ALPHAS = st.floats(-6, 3).map(lambda exponent: 10**exponent)


@given(st.integers(1, 60), st.one_of(ALPHAS, st.sampled_from([5e-324, 1e-300, 1e6])), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_example_has_one_owner_and_sizes_are_equal(num_clients: int, alpha: float, seed: int) -> None:
    labels = np.repeat(np.arange(5), np.random.default_rng(seed).integers(12, 40, size=5))
    shards = make_shards(labels, num_clients, "dirichlet", 1, seed, alpha)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    owned = histogram(labels, shards) > 0
    if alpha < 3e-6:  # the pairs of client and class form a forest, as where a line is cut in two ways
        assert owned.sum() <= num_clients + 5 - 1


def mean_classes(labels: np.ndarray, num_clients: int, alpha: float, seeds: int) -> float:
    """Classes per client, the mean over clients and seeds."""
    drawn = [make_shards(labels, num_clients, "dirichlet", 1, seed, alpha) for seed in range(seeds)]
    return float(np.mean([(histogram(labels, shards) > 0).sum(1).mean() for shards in drawn]))


def test_a_smaller_alpha_is_more_skewed_down_to_one_class_per_client() -> None:
    labels = np.repeat(np.arange(100), 500)
    found = [mean_classes(labels, 100, alpha, 1) for alpha in (1.0, 0.1, 0.01, 0.001)]
    assert found == sorted(found, reverse=True)
    assert found[1:] == [pytest.approx(2.2, abs=0.4), pytest.approx(1.2, abs=0.3), pytest.approx(1.0, abs=0.2)]


@given(ALPHAS, st.integers(2, 12), st.integers(2, 30))
@settings(max_examples=25, deadline=None)
def test_skew_never_grows_with_alpha(alpha: float, classes: int, num_clients: int) -> None:
    labels = np.repeat(np.arange(classes), 60)
    more, less = (mean_classes(labels, num_clients, each, 8) for each in (alpha, 10 * alpha))
    assert more <= less + 0.3


def test_a_client_whose_classes_are_used_up_draws_by_its_own_shares_among_those_left() -> None:
    left, logs = np.array([3, 0, 5, 0, 900]), np.array([-1000.0, 0.0, -5000.0, -1.0, -90000.0])
    taken = _draw_classes(logs, np.full(5, 1000), left, 10, np.random.default_rng(0))
    assert taken.tolist() == [3, 0, 5, 0, 2], "e^-1000 before e^-5000 before e^-90000, however many are left"
    assert left.tolist() == [0, 0, 0, 0, 898]


@pytest.mark.parametrize(("alpha", "digest"), [(1.0, "8e1b1bc7a286dfe0"), (100.0, "c9d43c5ae3c06673")])
def test_shards_where_nothing_underflows_stay_as_they_were(alpha: float, digest: str) -> None:
    shards = make_shards(np.repeat(np.arange(100), 50), 20, "dirichlet", 1, 0, alpha)
    assert hashlib.sha256(np.concatenate(shards).astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_a_large_alpha_is_iid_and_a_small_one_gives_few_classes() -> None:
    labels = np.repeat(np.arange(10), 1000)
    tiny, small, large = (
        histogram(labels, make_shards(labels, 50, "dirichlet", 1, 0, alpha)) for alpha in (1e-6, 1.0, 1e6)
    )
    iid = histogram(labels, make_shards(labels, 50, "iid", 1, 0))
    assert large.std() == pytest.approx(iid.std(), rel=0.2)
    assert abs(large - 20).max() < 20, "every client, the last one too"
    assert np.median((tiny > 0).sum(1)) == 1
    assert 1.2 < (small > 0).sum(1).mean() < 6


def test_class_shares_follow_the_dirichlet_distribution() -> None:
    """Over clients the mean is p and the variance p(1 − p)/(α + 1), but for the noise of 80 draws and of 150 seeds."""
    labels, alpha = np.repeat(np.arange(4), [800, 400, 200, 200]), 3.0
    shares = []
    for seed in range(150):
        counts = histogram(labels, make_shards(labels, 20, "dirichlet", 1, seed, alpha))
        shares.append(counts[0] / counts[0].sum())  # one client of each: which is dealt first is random
    p = np.array([0.5, 0.25, 0.125, 0.125])
    found = np.array(shares)
    assert np.abs(found.mean(0) - p).max() < 0.05
    expected = p * (1 - p) / (alpha + 1)
    assert np.abs(found.var(0) / expected - 1).max() < 0.4


def test_shares_are_dirichlet_even_where_the_concentrations_underflow() -> None:
    generator = np.random.default_rng(0)
    first = [softmax(dirichlet_logs(np.array([0.4, 1.1, 0.5]), generator))[0] for _ in range(4000)]
    assert stats.kstest(first, stats.beta(0.4, 1.6).cdf).pvalue > 1e-3
    draws = np.array([softmax(dirichlet_logs(np.full(10, 1e-9), generator)) for _ in range(500)])
    assert (draws.max(1) > 0.999).all(), "one class each"
    assert np.bincount(draws.argmax(1), minlength=10).min() > 20, "any of them"


def test_it_depends_on_the_shard_seed_alone() -> None:
    labels = np.repeat(np.arange(10), 50)
    first, same, other = (make_shards(labels, 10, "dirichlet", 1, seed, 0.5) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_run_with_dirichlet_shards(quick_config: Config) -> None:
    history = simulate(quick_config, sharding="dirichlet", dirichlet_alpha=0.5, num_rounds=1)
    assert "dir0.5" in history.folder.name


def test_the_histogram_is_that_of_the_run(quick_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["sharding=dirichlet", "num-clients=30", "shard-seed=2", f"results-dir={tmp_path}"]
    assert main(["shards", *arguments]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "shards" / "digits-dir1-k30-s2"
    config = load(overrides={"sharding": "dirichlet", "num_clients": 30, "shard_seed": 2})
    counts, classes = class_histogram(config)
    with open(folder / "histogram.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["client", "examples", *classes]
    assert [[int(cell) for cell in row[2:]] for row in rows[1:]] == counts.tolist()
    assert counts.sum() == 1157
    assert "... and 10 more clients" in printed
    assert str(folder / "histogram.pdf") in printed
    assert (folder / "histogram.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "words"),
    [(50, 1, "no assignment of classes makes the sizes differ less"), (5, 2, "the least is not known"), (10, 5, "")],
)
def test_whether_sizes_could_be_closer_is_told(
    num_clients: int, classes_per_client: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = load(overrides={"num_clients": num_clients, "classes_per_client": classes_per_client})
    show_shards(config, tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("examples per client: ")]
    assert len(told) == bool(words)
    assert all(line.endswith(words) for line in told)


def test_a_run_tells_and_notes_the_least_difference_of_sizes(
    quick_config: Config, capsys: pytest.CaptureFixture
) -> None:
    history = simulate(quick_config, classes_per_client=1, num_rounds=1)
    noted = json.loads((history.folder / "run.json").read_text(encoding="utf-8"))["shards"]
    assert noted["least_spread"] == noted["largest"] - noted["smallest"] > 1
    assert "examples each; no assignment of classes makes the sizes differ less" in capsys.readouterr().out
    iid = simulate(quick_config, sharding="iid", num_rounds=1)
    assert "least_spread" not in json.loads((iid.folder / "run.json").read_text(encoding="utf-8"))["shards"]


def test_many_classes_are_named_by_the_largest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    show_shards(load(overrides={"dataset": "synthetic", "classes_per_client": 3, "num_clients": 100}), tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("7 "))
    assert "3: colour" in line


def test_a_centralized_run_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no clients"):
        show_shards(load(overrides={"strategy": "centralized"}), tmp_path)
