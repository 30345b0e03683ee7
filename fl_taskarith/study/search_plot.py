"""The figure of a search: what it chose by, validation accuracy or loss, against the learning rate, a line per rung."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from matplotlib import pyplot

from fl_taskarith.figures.plots import STYLE, line_look, save_figure
from fl_taskarith.study.search import DIVERGED, Choice, Score, Trial


def plot_search(scores: Mapping[Trial, Score], by: str, choice: Choice | None, title: str, output: Path) -> list[Path]:
    """Draw what was tried so far; writes output.png and output.pdf, and nothing while nothing was tried.

    A rate that diverged stands as a cross at the lower edge; a dotted line marks the chosen one.

    Raises:
        CheckpointError: the output cannot be written.
    """
    if not scores:
        return []
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(figsize=(4.8, 3.0), layout="constrained")
        for turn, rounds in enumerate(sorted({trial.rounds for trial in scores})):
            rung = sorted((trial.rate, score) for trial, score in scores.items() if trial.rounds == rounds)
            points = [(rate, -score[1] if by == "loss" else 100 * score[0]) for rate, score in rung if score > DIVERGED]
            name = f"after {rounds} round{'s' * (rounds > 1)}"
            if points:
                look: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, **line_look(turn)}
                axes.plot(*zip(*points, strict=True), label=name, **look)
        lost = sorted({trial.rate for trial, score in scores.items() if score == DIVERGED})
        if lost:
            axes.plot(lost, [0.03] * len(lost), "kx", transform=axes.get_xaxis_transform(), label="diverged")
        if choice is not None:
            edge = " (an end of the grid: not tuned)" if choice.edge else ""
            axes.axvline(choice.rate, color="k", linewidth=0.9, linestyle=":", label=f"chosen: {choice.rate:g}{edge}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss" if by == "loss" else "validation accuracy (%)")
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.0)
        return save_figure(figure, output)
