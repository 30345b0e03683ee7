"""The figures of the study of BR-IFCA."""

from pathlib import Path

import pandas
from matplotlib.axes import Axes

from fl_taskarith.figures.series import draw_line, save, share_legend, subplots
from fl_taskarith.mixtures.studies.br_ifca_cells import ALPHAS, ATTACKS, CLUSTERS, DIMENSIONS, TWO_STAGE

METHODS = ("mean", "median", "trimmed-mean", "geometric-median", "krum", TWO_STAGE)
FRAME = (0.02, 2.0)  # of distances against d; what leaves it stands in the table
NAMES = {
    "nearest_distance": "(1/K) Σ_k min_j ‖θ_k − θ*_j‖",
    "matched_distance": "matched (1/K) Σ_k ‖θ_k − θ*_π(k)‖",
}


def distance(runs: pandas.DataFrame, column: str, folder: Path) -> str:
    """Average distance against d: a column of panels per K, a row per α, a line per method."""
    figure, axes = subplots(len(ALPHAS), len(CLUSTERS), width=10.0, height=2.6, sharex=True, sharey=True)
    for row, alpha in zip(axes, ALPHAS, strict=True):
        for part, k in zip(row, CLUSTERS, strict=True):
            own = runs[(runs["alpha"] == alpha) & (runs["clusters"] == k)]
            _methods(part, own, "dimension", column)
            part.set_title(f"K = {k}, α = β = {alpha:.2f}", fontsize=9)
            part.set_xscale("log")
            part.set_xticks(DIMENSIONS, [str(d) for d in DIMENSIONS])
            part.minorticks_off()
            part.set_yscale("log")
            part.set_ylim(*FRAME)
    for part in axes[-1]:
        part.set_xlabel("dimension d")
    figure.supylabel(NAMES[column], fontsize=9)
    share_legend(figure, list(axes.flat), len(METHODS))
    return save(figure, folder / f"distance-{column.removesuffix('_distance')}")


def random_start(runs: pandas.DataFrame, folder: Path) -> str:
    """The published and the matched distance from a random start, against d."""
    figure, axes = subplots(2, len(CLUSTERS), width=10.0, height=2.4, sharex=True, sharey=True)
    for row, column in zip(axes, NAMES, strict=True):
        for part, k in zip(row, CLUSTERS, strict=True):
            _methods(part, runs[runs["clusters"] == k], "dimension", column)
            part.set_title(f"K = {k}", fontsize=9)
            part.set_xscale("log")
            part.set_xticks((20, 50, 100), ["20", "50", "100"])
            part.minorticks_off()
            part.set_ylim(0, 1.0)
        row[0].set_ylabel("published" if column == "nearest_distance" else "matched")
    for part in axes[-1]:
        part.set_xlabel("dimension d")
    share_legend(figure, list(axes.flat), len(METHODS))
    return save(figure, folder / "random-start")


def attacks(runs: pandas.DataFrame, folder: Path) -> str:
    """Matched distance against α, a panel per attack."""
    figure, axes = subplots(2, 3, width=10.0, height=2.7, sharex=True, sharey=True)
    panels = [*((attack, "spread") for attack in ATTACKS), ("scaled-model", "one-cluster")]
    for part, (attack, placement) in zip(axes.flat, panels, strict=True):
        own = runs[(runs["attack"] == attack) & (runs["placement"] == placement)]
        _methods(part, own, "alpha", "matched_distance")
        part.set_title(attack if placement == "spread" else f"{attack}, all on one cluster", fontsize=9)
        part.set_yscale("log")
        part.set_ylim(0.02, 20)
    for part in axes[-1]:
        part.set_xlabel("Byzantine share α (= β)")
    figure.supylabel(NAMES["matched_distance"], fontsize=9)
    share_legend(figure, list(axes.flat), len(METHODS))
    return save(figure, folder / "attacks")


def betas(runs: pandas.DataFrame, folder: Path) -> str:
    """Matched distance of the trimmed mean against β at α = 0.10."""
    figure, ((axes,),) = subplots(1, 1, width=4.8)
    for index, attack in enumerate(("scaled-model", "sign-flip", "alie")):
        draw_line(axes, runs[runs["attack"] == attack], "beta", "matched_distance", index, attack)
    axes.axvline(0.10, color="black", linewidth=0.8, linestyle=":", label="β = α")
    axes.set_yscale("log")
    axes.set_xlabel("trimmed share β at each end")
    axes.set_ylabel("matched distance")
    share_legend(figure, [axes], 4)
    return save(figure, folder / "betas")


def _methods(axes: Axes, runs: pandas.DataFrame, x: str, y: str) -> None:
    for index, method in enumerate(METHODS):
        draw_line(axes, runs[runs["method"] == method], x, y, index, method)
