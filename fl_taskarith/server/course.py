"""Comments on the course of a run, from its rows alone: remarks while it trains, a verdict at its end."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from fl_taskarith.config.settings import Config
from fl_taskarith.storage.run_folder import Row, best_row

RISES = 3  # rounds on end in which the training loss rises, before it is remarked on
JUMP = 1.25  # factor by which it rises over them, unless it is above where it began
COLLAPSED = 0.5  # share of the solved head's accuracy below which a run counts as collapsed
DECADES = 4  # of the grid that a search is advised


def remarks(rows: Sequence[Row], config: Config) -> list[str]:
    """Return remarks on the last of `rows`; each is made once, and again when it has become twice as bad."""
    advice = f"learning-rate = {config.learning_rate} is probably too large: see `fl-taskarith search`."
    comments = []
    losses = [row["train_loss"] for row in rows if row.get("train_loss") is not None]
    rises = _rises(losses)
    began = losses[-1 - rises] if losses else 0.0
    if rises and rises % RISES == 0 and (losses[-1] > losses[0] or losses[-1] > JUMP * began):
        comments.append(
            f"The training loss has risen for {rises} rounds on end, from {began:.4g} to {losses[-1]:.4g}: {advice}"
        )
    if _is_reported(drops := _drops(rows)):
        start, now = rows[0]["val_accuracy"], rows[-1]["val_accuracy"]
        images = max(config.validation_size, 1)
        certain = drops[-1] > math.sqrt(start * (1 - start) / images)  # one standard error of an accuracy
        comments.append(
            f"The validation accuracy, {100 * now:.1f} %, is {100 * drops[-1]:.1f} points below round 0's "
            f"{100 * start:.1f} %: {advice if certain else f'no more than {images} images leave to chance.'}"
        )
    return comments


def rounds_since_best(rows: Sequence[Row], config: Config) -> int | None:
    """Return how many rounds before the last of `rows` the best one on validation was; None where it was not measured.

    Rounds before the last one of the head alone do not count, nor does one that was evaluated only for being the last.
    """
    watched = [row for row in rows if row["round"] >= config.head_rounds and not row["round"] % config.evaluate_every]
    best, last = best_row(watched), rows[-1]
    if best is None or watched[-1] is not last or last.get("val_accuracy") is None:
        return None
    return int(last["round"] - best["round"])


def stops_early(rows: Sequence[Row], config: Config) -> bool:
    """Whether a run ends after the last of `rows`, by `early-stopping-patience`."""
    waited = rounds_since_best(rows, config) if config.early_stopping_patience else None
    return waited is not None and waited >= config.early_stopping_patience


def gain(rows: Sequence[Row]) -> float | None:
    """Return the last test accuracy minus that of round 0, in percentage points; None without either."""
    tested = [row["test_accuracy"] for row in rows if row.get("test_accuracy") is not None]
    return 100 * (tested[-1] - tested[0]) if len(tested) > 1 and rows[0]["round"] == 0 else None


def verdict(rows: Sequence[Row], config: Config, folder: Path) -> list[str]:
    """Return a run's last lines: its test accuracy against the solved head's and, where it is not above, what to do."""
    last, points = rows[-1], gain(rows)
    if last.get("test_accuracy") is None or points is None:
        return []
    test = f"test {100 * last['test_accuracy']:.1f} %"
    if not config.solved:
        return [f'{test} (head = "{config.head}": this run has no ridge head to compare with)']
    head = f"the {config.head_words}"
    if points > 0:
        return [f"{test}: {points:.1f} points above {head}"]
    if config.peak_rate == 0:
        return [f"{test}: that of {head}, since learning-rate = 0 trains nothing"]
    line = f"{test}: {-points:.1f} points below {head}" if points < 0 else f"{test}: no better than {head}"
    cause, highest = _cause(rows, config)
    lowest = highest / 10**DECADES
    return [
        line,
        f"Likely cause: {cause}",
        f"What to do: fl-taskarith search {shlex.quote(str(folder))} --from {lowest:.3g} --to {highest:.3g}",
    ]


def _cause(rows: Sequence[Row], config: Config) -> tuple[str, float]:
    """Say why a run ends no better than its head alone, and the highest rate that a search should try."""
    rate, split = config.peak_rate, "val" if rows[-1].get("val_accuracy") is not None else "test"
    curve = [(row[f"{split}_accuracy"], row["round"]) for row in rows if row.get(f"{split}_accuracy") is not None]
    start, end = curve[0][0], curve[-1][0]
    best, best_round = max(curve[1:], key=lambda point: point[0])
    if config.byzantine_fraction and config.strategy in ("fedavg", "fedprox", "fedavgm", "scaffold", "fednova"):
        return (
            f"{100 * config.byzantine_fraction:g} % of the clients attack, and strategy = "
            f'"{config.strategy}" is not robust: choose median, trimmed-mean or cclip.',
            rate,
        )
    if end < COLLAPSED * start:
        return f"the features collapsed: learning-rate = {rate:g} is far too large for these clients.", rate / 10
    if best > start:
        return (
            f"it was {100 * (best - start):.1f} points above the {config.head_words} on {split} after round "
            f"{best_round} and fell: learning-rate = {rate:g} is too large for so many rounds.",
            rate,
        )
    if end == best and end > curve[1][0]:
        return (
            f"learning-rate = {rate:g} is too large at first; accuracy still rises at the end: more rounds may help.",
            rate,
        )
    if end >= start - 0.005:
        return f"hardly anything changed: learning-rate = {rate:g} is too small, or rounds too few.", rate * 100
    return f"learning-rate = {rate:g} is too large for these clients.", rate


def _rises(losses: Sequence[float]) -> int:
    """Count how many times in succession, up to the last one, a loss was above the one before."""
    rises = 0
    while rises + 1 < len(losses) and losses[-1 - rises] > losses[-2 - rises]:
        rises += 1
    return rises


def _is_reported(drops: Sequence[float]) -> bool:
    """Whether the last drop is reported: the first above 0 is, then each that is twice the last one reported."""
    last_reported, reported = 0.0, False
    for drop in drops:
        reported = drop > 0 and drop >= 2 * last_reported
        last_reported = drop if reported else last_reported
    return reported


def _drops(rows: Sequence[Row]) -> list[float]:
    """Return how far the validation accuracy of each later row is below round 0's; [] if the last row has none."""
    if rows[-1].get("val_accuracy") is None or rows[0].get("val_accuracy") is None:
        return []
    return [rows[0]["val_accuracy"] - row["val_accuracy"] for row in rows[1:] if row.get("val_accuracy") is not None]
