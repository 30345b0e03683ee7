"""What the rows of a study's tables say: every arm over its seeds, against its reference, matched by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_taskarith.figures.statistics import Paired, Summary, paired, summarise
from fl_taskarith.study.frame import ArmResults, Key, StudyFrame


@dataclass(frozen=True)
class Comparison:
    """One row. Accuracies are in percent, gain and difference in points, `uplink` in 10⁶ bytes per round.

    Attributes:
        accuracies: test accuracy after the last round, by `statistics.run_key`.
        ridge: test accuracy of the solved head before training, whatever its kind. gain: over it.
        difference: to the reference; None for the reference itself and where there is none.
        norm: ‖θ_T − θ_0‖₂ of the global model.
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


def compare(frame: StudyFrame) -> list[Comparison]:
    """Compare every arm of the study, in its order, with its reference."""
    rows = []
    of_arm = {results.arm.title: results for results in frame.arms}
    for results in frame.arms:
        arm, reference = results.arm, frame.study.reference_of(results.arm)
        measured = {
            column: frame.by_seed(arm, column)
            for column in ("ridge_test_percent", "test_percent", "val_percent", "task_vector_norm", "uplink_megabytes")
        }
        ridge, test, val, norm, uplink = (summarise(list(values.values())) for values in measured.values())
        accuracies = measured["test_percent"]
        is_reference = reference is not None and reference.title == arm.title
        difference = None
        if reference is not None and not is_reference:
            others = frame.by_seed(reference, "test_percent")
            difference = paired(accuracies, others, results.correct, of_arm[reference.title].correct)
        gain = paired(accuracies, measured["ridge_test_percent"], results.correct, results.head_correct)
        rows.append(Comparison(results, accuracies, ridge, test, val, gain, is_reference, difference, norm, uplink))
    return rows


def head_words(rows: Sequence[Comparison]) -> str:
    """Return what a table of these rows calls the head before training: "ridge head", or "head" if kinds differ."""
    return (
        "ridge head"
        if all(row.results.settings.get("head", "ridge") in ("ridge", "linear") for row in rows)
        else "head"
    )
