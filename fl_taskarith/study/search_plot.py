"""The figure of a search: what validation shows against the learning rate, a line per rung and other values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from matplotlib import pyplot

from fl_taskarith.figures.plots import STYLE, line_look, save_figure
from fl_taskarith.study.search import DIVERGED, Also, Choice, Score, Trial, also_words


def plot_search(
    scores: Mapping[Trial, Score], choice: Choice | None, title: str, output: Path, by: str = "accuracy"
) -> list[Path]:
    """Draw what was tried so far; writes output.png and output.pdf, and nothing while nothing was tried.

    It shows what the search goes by, accuracy or loss. A rate that diverged stands as a cross at the lower edge; a
    dotted line marks the chosen one.

    Raises:
        CheckpointError: the output cannot be written.
    """
    if not scores:
        return []
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(figsize=(4.8, 3.0), layout="constrained")
        lines: dict[tuple[int, Also], list[tuple[float, float]]] = {}
        for trial, score in scores.items():
            if score > DIVERGED:
                measured = 100 * score[0] if by == "accuracy" else -score[1]
                lines.setdefault((trial.rounds, trial.also), []).append((trial.rate, measured))
        for turn, ((rounds, also), points) in enumerate(sorted(lines.items(), key=lambda line: line[0][0])):
            name = ", ".join([f"after {rounds} round{'s' * (rounds > 1)}", *([also_words(also)] if also else [])])
            look: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, **line_look(turn)}
            axes.plot(*zip(*sorted(points), strict=True), label=name, **look)
        lost = sorted({trial.rate for trial, score in scores.items() if score == DIVERGED})
        if lost:
            axes.plot(lost, [0.03] * len(lost), "kx", transform=axes.get_xaxis_transform(), label="diverged")
        if choice is not None:
            edge = " (an end of the grid: not tuned)" if choice.edge else ""
            name = ", ".join([f"{choice.rate:g}", *([also_words(choice.also)] if choice.also else [])])
            axes.axvline(choice.rate, color="k", linewidth=0.9, linestyle=":", label=f"chosen: {name}{edge}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation accuracy (%)" if by == "accuracy" else "validation loss")
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.0)
        return save_figure(figure, output)
