"""Draws the sensitivity of the weights by kind of tensor, which of them a mask keeps, and where its threshold lies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.typing import LineStyleType
from torch import Tensor

from fl_taskarith.describe.mask_report import DescribedMask
from fl_taskarith.figures.plots import COLOURS, STYLE, save_figure
from fl_taskarith.masking.anatomy import KINDS, by_kind
from fl_taskarith.masking.rules import mask_rule

KEY_BIASES = "key biases"
BINS = 60
WIDTH = 68  # characters of a line of the title
OUTLIERS = 1e-4  # share of the scores at either end that the axis leaves to its outermost bins


@dataclass(frozen=True)
class KindScores:
    """Scores of the weights of one kind, and which of them the mask keeps: two arrays [entries]."""

    scores: np.ndarray
    kept: np.ndarray


def scores_by_kind(scores: Mapping[str, Tensor], described: DescribedMask) -> dict[str, KindScores]:
    """Return the scores of each kind in the order of `KINDS`, and last those of key biases, whose gradient is zero.

    Args:
        scores: of every maskable tensor, in the shapes of the mask; of none where the rule does not score.
        described: the mask that was made of them.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in (*KINDS, KEY_BIASES)}
    for name, values in scores.items():
        kept = by_kind(name, described.mask.tensors[name])
        for kind, part in by_kind(name, values).items():
            place = KEY_BIASES if kind == "k" and name.endswith(".bias") else kind
            parts[place].append((part.flatten().cpu().numpy(), kept[kind].flatten().cpu().numpy()))
    return {
        kind: KindScores(*(np.concatenate(arrays) for arrays in zip(*each, strict=True)))
        for kind, each in parts.items()
        if each
    }


def thresholds(kinds: Mapping[str, KindScores], described: DescribedMask, absolute: float = 0.0) -> dict[str, float]:
    """Return where the rule cuts these scores, by words for it: in the first calibration round, or in a single one.

    Where every round has the same `absolute` threshold, the setting `sensitivity-threshold`, there is that one alone.
    """
    if absolute:
        return {f"threshold: {absolute:g}": absolute}
    everything = np.concatenate([each.scores for each in kinds.values()])
    densities, rounds = described.facts["densities"], described.facts["calibration_rounds"]
    ordered = np.sort(everything)
    if mask_rule(described.facts["rule"]).keeps_largest:
        ordered = ordered[::-1]

    def cut(density: float) -> float:
        return float(ordered[max(0, round(density * len(ordered)) - 1)])

    if rounds == 1:
        return {"threshold": cut(densities[-1])}
    return {
        f"threshold of round 1 of {rounds}: {100 * densities[0]:.3g} % left": cut(densities[0]),
        f"threshold of a single round: {100 * densities[-1]:.3g} % left": cut(densities[-1]),
    }


def plot_sensitivity(
    kinds: Mapping[str, KindScores], described: DescribedMask, output: Path, absolute: float = 0.0
) -> list[Path]:
    """Draw a histogram of the scores of each kind on a common logarithmic axis; writes output.png and output.pdf.

    Each is as high as its largest bin, in which it counts weights: all of them in grey, those that the mask keeps in
    blue. Scores of 0, and those of key biases, which are rounding errors, are told in words.

    Args:
        kinds: mean squared gradients of the pretrained model, as the first calibration round has them.
        described: the mask that was made of them.
        absolute: the setting `sensitivity-threshold`; 0 where a density decides.

    Raises:
        CheckpointError: a file cannot be written.
    """
    drawn = {kind: each for kind, each in kinds.items() if kind != KEY_BIASES and each.scores.any()}
    positive = np.concatenate([each.scores[each.scores > 0] for each in drawn.values()] or [np.ones(1)])
    low, high = np.log10(np.quantile(positive, [OUTLIERS, 1 - OUTLIERS]))
    edges = np.logspace(np.floor(low), np.ceil(high) + (np.floor(low) == np.ceil(high)), BINS + 1)
    cuts = thresholds(kinds, described, absolute)
    lines: list[tuple[LineStyleType, float]] = list(zip(("--", ":"), cuts.values(), strict=False))
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, grid = pyplot.subplots(
            max(1, len(drawn)), figsize=(4.2, 1.6 + 0.33 * len(drawn)), layout="constrained", sharex=True, squeeze=False
        )
        for axes, (kind, each) in zip(grid[:, 0], drawn.items(), strict=False):
            _draw_kind(axes, kind, each, edges)
            for style, place in lines:
                axes.axvline(np.clip(place, edges[0], edges[-1]), color=COLOURS[1], linestyle=style, linewidth=1.3)
        last = grid[-1, 0]
        last.set_xscale("log")
        last.set_xlabel("sensitivity: mean squared gradient", fontsize=8)
        last.tick_params(labelsize=8, bottom=True)
        last.minorticks_off()
        handles = [Patch(facecolor="0.85", edgecolor="0.3", linewidth=0.6), Patch(facecolor=COLOURS[0]),
                   *(Line2D([], [], color=COLOURS[1], linestyle=style) for style, _ in lines)]  # fmt: skip
        words = ["all weights of the kind", "kept by the mask", *cuts]
        figure.legend(handles, words, loc="outside lower center", fontsize=7, ncols=2, frameon=False)
        title = [fill(line, WIDTH) for line in (described.title, *zero_lines(kinds))]
        figure.suptitle("\n".join(title), fontsize=8, parse_math=False)
        return save_figure(figure, output)


def describe_sensitivity(kinds: Mapping[str, KindScores]) -> dict[str, dict[str, float]]:
    """Return the median score of each kind, and how many of its scores are 0."""
    return {
        kind: {"median": float(np.median(each.scores)), "zeros": int((each.scores == 0).sum())}
        for kind, each in kinds.items()
    }


def zero_lines(kinds: Mapping[str, KindScores]) -> list[str]:
    """Return lines on what a logarithmic axis has no place for: scores of 0, and those of key biases."""
    zeros = {kind: int((each.scores == 0).sum()) for kind, each in kinds.items() if kind != KEY_BIASES}
    lines = [f"not drawn, score 0: {number:,} weights of {kind}" for kind, number in zeros.items() if number]
    if KEY_BIASES in kinds:
        largest, number = kinds[KEY_BIASES].scores.max(), len(kinds[KEY_BIASES].scores)
        error = f", up to {largest:.0e} by rounding" if largest else ""
        lines.append(f"not drawn: {number:,} key biases (gradient 0{error})")
    return lines


def _draw_kind(axes: Axes, kind: str, each: KindScores, edges: np.ndarray) -> None:
    """Draw all scores of a kind and the kept ones among them, in the same bins."""
    for chosen, look in ((each.scores > 0, {"facecolor": "0.85", "edgecolor": "0.3", "linewidth": 0.6}),
                         ((each.scores > 0) & each.kept, {"facecolor": COLOURS[0]})):  # fmt: skip
        counts, _ = np.histogram(np.clip(each.scores[chosen], edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, fill=True, **look)
    axes.set_yticks([])
    axes.set_ylabel(kind, rotation=0, ha="right", va="center", fontsize=8)
    axes.tick_params(which="both", bottom=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    share = 100 * each.kept.mean()
    axes.text(1.01, 0.5, f"{len(each.kept):,}\n{share:.3g} % kept", transform=axes.transAxes, fontsize=6.5, va="center")
