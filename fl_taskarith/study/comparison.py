"""What the rows of a study's tables say: every arm over its seeds, against its reference, matched by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import NamedTuple

from fl_taskarith.figures.setting_words import solved_head_words
from fl_taskarith.figures.statistics import Paired, Summary, judge_family, paired, share_of_gain, summarise
from fl_taskarith.study.definition import Arm, Contrast
from fl_taskarith.study.frame import ArmResults, Key, StudyFrame


@dataclass(frozen=True)
class Comparison:
    """One row. Accuracies are in percent, gain and difference in points, `uplink` in 10⁶ bytes per round.

    Attributes:
        accuracies: test accuracy after the last round, by `statistics.run_key`.
        ridge: test accuracy of the solved head before training, whatever its kind. gain: over it.
        difference: to the reference; None for the reference itself and where there is none.
        norm: ‖θ_T − θ_0‖₂ of the global model.
        retained: of a federated arm whose clients have unlike data, its mean gain in percent of that of `best_iid`;
            NaN where there is no such arm, or none that gains.
    """

    results: ArmResults
    accuracies: Mapping[Key, float]
    ridge: Summary
    test: Summary
    val: Summary
    gain: Paired
    is_reference: bool
    difference: Paired | None
    norm: Summary
    uplink: Summary
    retained: float = nan


def compare(frame: StudyFrame) -> list[Comparison]:
    """Compare every arm of the study, in its order, with its reference."""
    rows = []
    for results in frame.arms:
        arm, reference = results.arm, frame.study.reference_of(results.arm)
        measured = {
            column: frame.by_seed(arm, column)
            for column in ("ridge_test_percent", "test_percent", "val_percent", "task_vector_norm", "uplink_megabytes")
        }
        ridge, test, val, norm, uplink = (summarise(list(values.values())) for values in measured.values())
        accuracies = measured["test_percent"]
        is_reference = reference is not None and reference.title == arm.title
        difference = None if reference is None or is_reference else _difference(frame, arm, reference)
        gain = paired(accuracies, measured["ridge_test_percent"], results.correct, results.head_correct)
        rows.append(Comparison(results, accuracies, ridge, test, val, gain, is_reference, difference, norm, uplink))
    return [_with_retained(row, rows) for row in rows]


def _difference(frame: StudyFrame, arm: Arm, other: Arm) -> Paired:
    correct = {results.arm.title: results.correct for results in frame.arms}
    values, others = (frame.by_seed(each, "test_percent") for each in (arm, other))
    return paired(values, others, correct[arm.title], correct[other.title])


def best_iid(row: Comparison, rows: Sequence[Comparison]) -> Comparison | None:
    """Return the arm over iid clients that validation ranks first among those of as many local steps as `row` has.

    Arms that do not train, or whose rate is not tuned, do not count.
    """
    tuned = [
        other for other in rows
        if _division(other) == "iid" and _steps(other) == _steps(row) and other.val.n and other.test.n
        and other.results.choice is not None and other.results.choice.rate and not other.results.choice.edge
    ]  # fmt: skip
    return max(tuned, key=lambda other: other.val.mean, default=None)


def _with_retained(row: Comparison, rows: Sequence[Comparison]) -> Comparison:
    if _division(row) in ("iid", "centralized") or (best := best_iid(row, rows)) is None:
        return row
    return replace(row, retained=share_of_gain(row.gain, best.gain))


def _division(row: Comparison) -> str:
    settings = row.results.settings
    return "centralized" if settings["strategy"] == "centralized" else str(settings["sharding"])


def _steps(row: Comparison) -> tuple[int, ...]:
    settings = row.results.settings
    local = [int(settings[key]) for key in ("local-steps", "local-steps-min", "local-steps-max")]
    return (int(settings["num-rounds"]) * local[0], *local[1:])


class PrimaryRow(NamedTuple):
    """A primary contrast: its difference in points, its p value as Holm adjusts it to the family, and a verdict."""

    contrast: Contrast
    difference: Paired
    p: float
    verdict: str


def compare_primary(frame: StudyFrame) -> list[PrimaryRow]:
    """Judge the primary contrasts as one family; what was not run, or is not tuned, counts in it as p = 1."""
    pairs = [_difference(frame, *contrast) for contrast in frame.study.contrasts]
    at_edge = {each.arm.title for each in frame.arms if each.choice is not None and each.choice.edge}
    judged = judge_family(pairs, [any(arm.title in at_edge for arm in each) for each in frame.study.contrasts])
    return [
        PrimaryRow(contrast, difference, p, verdict)
        for contrast, difference, (p, verdict) in zip(frame.study.contrasts, pairs, judged, strict=True)
    ]


def head_words(rows: Sequence[Comparison]) -> str:
    """Return what a table of these rows calls the head before training: "ridge head", "LDA head", or only "head"."""
    return solved_head_words([row.results.settings for row in rows])
