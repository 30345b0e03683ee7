"""Rounds of runs that differ in one setting, each run in a process of its own: on cached tokens; several at once."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fl_taskarith.bench import harness
from fl_taskarith.bench.run_process import Start, alternate_runs
from fl_taskarith.storage.files import scratch_folder

SPLITS = {"train_subset": harness.CLIENTS * 100, "validation_size": 100, "calibration_size": 0, "test_subset": 100}


def bench_prefix(options: Namespace) -> harness.Result:
    """Alternate rounds of 10 clients x 4 steps of all blocks, of the last ones, and of those on cached tokens.

    Synthetic images, flips as the only augmentation in every arm. Making the cache is not timed.

    Raises:
        RuntimeError: the last blocks learn otherwise with the cache than without.
    """
    last: dict[str, object] = {"augmentation": "flip", "trainable_blocks": options.trainable_blocks}
    arms = {"all blocks": {**last, "trainable_blocks": 0}, "last blocks": last,
            "cached": {**last, "prefix_cache": "float16"}}  # fmt: skip
    figures, lines = _compare(arms, options)
    harness.require_equal(figures["train_loss"], "last blocks", "cached", 1e-2)
    seconds = figures["seconds_per_round"]
    lines.append(f"against the last blocks without a cache: {seconds['last blocks'] / seconds['cached']:.2f}")
    return harness.Result(seconds["all blocks"] / seconds["cached"], figures, lines)


def bench_together(options: Namespace) -> harness.Result:
    """Alternate rounds of 10 clients x 4 steps of all weights, so many `clients` at once; one thread each.

    The ratio is that of one by one to the fastest of the others.

    Raises:
        RuntimeError: the clients learn otherwise together than alone.
    """
    arms = {f"{at_once} at once": {"augmentation": "none", "clients_at_once": at_once, "threads": 1}
            for at_once in sorted({1, *options.clients})}  # fmt: skip
    figures, lines = _compare(arms, options)
    alone, *others = arms
    for name in others:
        harness.require_equal(figures["train_loss"], alone, name, 1e-3)
    seconds = figures["seconds_per_round"]
    return harness.Result(seconds[alone] / min(seconds[name] for name in others), figures, lines)


def bench_covariance(options: Namespace) -> harness.Result:
    """Alternate rounds of 10 clients x 4 steps under FedAvg and covariance aggregation, in both of its forms.

    The ratio is that of the least-squares form to FedAvg: what a round costs more.
    """
    plain: dict[str, object] = {
        "augmentation": "none",
        "learning_rate": 1e-6,
        "trainable_blocks": options.trainable_blocks,
    }
    arms = {"fedavg": plain, "least squares": {**plain, "strategy": "covariance"},
            "bounded": {**plain, "strategy": "covariance", "covariance_form": "bounded"}}  # fmt: skip
    figures, lines = _compare(arms, options)
    seconds = figures["seconds_per_round"]
    return harness.Result(seconds["least squares"] / seconds["fedavg"], figures, lines)


def _compare(arms: Mapping[str, Mapping[str, object]], options: Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return figures and lines of runs with the settings of each arm.

    `outside_clients` is the time of the last round beside the clients', as a share of theirs: both met the same load.
    """
    with scratch_folder() as folder:
        places = {arm: {"data_dir": str(folder), "results_dir": str(folder / arm.replace(" ", "-"))} for arm in arms}
        starts = {arm: Start(harness.round_settings(options, **places[arm], **SPLITS, **arms[arm])) for arm in arms}
        runs = alternate_runs(starts, options.repeats)
    measured = {arm: run.seconds for arm, run in runs.items()}
    losses = {arm: run.last_row["train_loss"] for arm, run in runs.items()}
    outside = {arm: run.last_row["overhead_seconds"] / run.last_row["train_seconds"] for arm, run in runs.items()}
    per_round = harness.medians(measured)
    notes = {arm: f"loss {loss:.4f}, {100 * outside[arm]:.1f} % outside the clients" for arm, loss in losses.items()}
    figures = {"clients": harness.CLIENTS, "local_steps": harness.LOCAL_STEPS, "seconds": measured,
               "seconds_per_round": per_round, "outside_clients": outside, "train_loss": losses}  # fmt: skip
    return figures, harness.time_lines(per_round, harness.STEPS * options.batch_size, notes)
