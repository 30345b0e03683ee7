"""The numbers of a study's tables, from its results folders alone. Accuracies are in percent, differences in points."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.figures.statistics import Paired, Summary, paired, summarise
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.results import Outcome, State, StudyResults
from fl_taskarith.study.search import Choice

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class ArmResults:
    """One arm over its seeds.

    Attributes:
        choice: the learning rate, None while the search is not over.
        settings: of its runs, seed and learning rate apart.
        outcomes: of the final runs by seed; empty while the rate is not known.
        problem: why nothing can be said of the arm, in words.
        ridge, test, val: accuracy by seed, of the ridge head before training and of the last round.
        norm: ‖θ_T − θ_0‖₂ of the global model by seed.
        uplink: 10⁶ bytes per training round, all clients, by seed.
    """

    arm: Arm
    choice: Choice | None
    settings: Mapping[str, Scalar]
    outcomes: Mapping[int, Outcome]
    problem: str
    ridge: BySeed
    test: BySeed
    val: BySeed
    norm: BySeed
    uplink: BySeed

    @property
    def density(self) -> float | None:
        """Share of the maskable weights that are updated, as its runs found it, else as set; None without a mask."""
        if self.settings.get("mask-rule", "none") == "none":
            return None
        found = [outcome.record["mask"]["density"] for outcome in self.outcomes.values()
                 if outcome.record and "density" in outcome.record.get("mask", {})]  # fmt: skip
        return float(fmean(found) if found else self.settings["density"])

    @property
    def causes(self) -> dict[int, str]:
        """Of the runs that ended badly, by seed."""
        return {seed: f"{outcome.state}: {outcome.cause}" for seed, outcome in self.outcomes.items()
                if outcome.state in (State.DIVERGED, State.FAILED)}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What a row of the table says; `difference` is None for the reference and where there is none."""

    results: ArmResults
    ridge: Summary
    test: Summary
    val: Summary
    gain: Paired
    is_reference: bool
    difference: Paired | None
    norm: Summary
    uplink: Summary


def compare(results: StudyResults) -> list[Comparison]:
    """Every arm of the study, in its order, against its reference, matched by seed."""
    measured = {arm.title: _measure(results, arm) for arm in results.study.arms}
    rows = []
    for arm in results.study.arms:
        this, reference = measured[arm.title], results.study.reference_of(arm)
        others = None if reference is None or reference.title == arm.title else measured[reference.title]
        rows.append(
            Comparison(
                results=this,
                ridge=_over_seeds(this.ridge),
                test=_over_seeds(this.test),
                val=_over_seeds(this.val),
                gain=paired(this.test, this.ridge),
                is_reference=reference is not None and others is None,
                difference=None if others is None else paired(this.test, others.test),
                norm=_over_seeds(this.norm),
                uplink=_over_seeds(this.uplink),
            )
        )
    return rows


def _over_seeds(values: BySeed) -> Summary:
    return summarise(list(values.values()))


def _measure(results: StudyResults, arm: Arm) -> ArmResults:
    settings = results.study.config(arm, None, None, results.study.seeds[0], results.runs).to_run_config()
    choice: Choice | None = None
    outcomes: dict[int, Outcome] = {}
    problem = ""
    try:
        choice = results.choice(arm)
        runs: list[Config] = [] if choice is None else results.final_runs(arm, choice)
        outcomes = {run.seed: results.outcome(run) for run in runs}
    except FlTaskarithError as error:  # one damaged folder must not keep the rest out of the table
        problem = f"failed: {error}"

    def by_seed(measure: Callable[[list[Row]], float | None]) -> dict[int, float]:
        values = {seed: measure(list(outcome.rows)) for seed, outcome in outcomes.items() if outcome.rows}
        return {seed: value for seed, value in values.items() if value is not None}

    return ArmResults(
        arm=arm,
        choice=choice,
        settings=settings,
        outcomes=outcomes,
        problem=problem,
        ridge=by_seed(lambda rows: _percent(rows[0], "test_accuracy")) if settings["head"] == "ridge" else {},
        test=by_seed(lambda rows: _percent(rows[-1], "test_accuracy")),
        val=by_seed(lambda rows: _percent(rows[-1], "val_accuracy")),
        norm=by_seed(lambda rows: rows[-1].get("task_vector_norm")),
        uplink=by_seed(_uplink),
    )


def _percent(row: Row, column: str) -> float | None:
    value = row.get(column)
    return None if value is None else 100 * float(value)


def _uplink(rows: list[Row]) -> float | None:
    """Mean over the training rounds, in MB (10⁶ bytes); None without one, as at a learning rate of 0."""
    trained = [row for row in rows if row["round"] > 0 and row.get("learning_rate") != 0.0]
    sent = [row["uplink_bytes"] for row in trained if row.get("uplink_bytes") is not None]
    return fmean(sent) / 1e6 if sent else None
