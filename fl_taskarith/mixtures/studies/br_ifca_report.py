"""What the report on BR-IFCA shows: its charts as tables, and the numbers that its template states."""

from collections.abc import Mapping

import numpy as np
import pandas
from matplotlib.axes import Axes
from scipy.stats import t as student

from fl_taskarith.figures.series import Chart, Panel
from fl_taskarith.mixtures.studies.br_ifca_cells import (
    ALPHAS,
    ATTACK_ALPHAS,
    ATTACKS,
    CLUSTERS,
    DIMENSIONS,
    PER_CLUSTER,
    POINTS,
    TWO_STAGE,
)

SURVIVES = 2.0  # times its own matched distance without attackers: what a method may reach and count as surviving
METHODS = ("mean", "median", "trimmed-mean", "geometric-median", "krum", TWO_STAGE)
LINES = [(method, {"method": method}) for method in METHODS]
NEAREST, MATCHED = "nearest_distance", "matched_distance"
NAMES = {NEAREST: "(1/K) Σ_k min_j ‖θ_k − θ*_j‖", MATCHED: "matched (1/K) Σ_k ‖θ_k − θ*_π(k)‖"}
PLACED = [*((attack, "spread") for attack in ATTACKS), ("scaled-model", "one-cluster")]


def charts() -> dict[str, list[Chart]]:
    """Return the charts of each grid of `br_ifca_cells.grids`."""
    return {
        "distance": [_distance(column) for column in (NEAREST, MATCHED)],
        "random-start": [_random_start()],
        "attacks": [_attacks()],
        "betas": [_betas()],
        "rate": [_rate()],
        "rounds": [_rounds()],
    }


def _distance(column: str) -> Chart:
    """Return the chart of a distance against d: a column of panels per K, a row per α, a line per method."""
    panels = [
        [
            Panel("dimension", column, LINES, {"alpha": alpha, "clusters": k}, ticks=DIMENSIONS, log=10, options={
                "title": f"K = {k}, α = β = {alpha:.2f}", "yscale": "log",
                "ylim": (0.02, 2.0),  # what leaves it stands in the table
                "xlabel": "dimension d" if alpha == ALPHAS[-1] else ""})
            for k in CLUSTERS
        ]
        for alpha in ALPHAS
    ]  # fmt: skip
    name = f"distance-{column.removesuffix('_distance')}"
    return Chart(name, panels, len(METHODS), 10.0, 2.6, sharex=True, sharey=True, ylabel=NAMES[column])


def _random_start() -> Chart:
    """Return the chart of the published and the matched distance from a random start, against d."""
    panels = [
        [
            Panel("dimension", column, LINES, {"clusters": k}, ticks=(20, 50, 100), log=10, options={
                "title": f"K = {k}", "ylim": (0, 1.0), "ylabel": words if k == CLUSTERS[0] else "",
                "xlabel": "dimension d" if column == MATCHED else ""})
            for k in CLUSTERS
        ]
        for column, words in ((NEAREST, "published"), (MATCHED, "matched"))
    ]  # fmt: skip
    return Chart("random-start", panels, len(METHODS), 10.0, 2.4, sharex=True, sharey=True)


def _attacks() -> Chart:
    """Return the chart of the matched distance against α, a panel per attack."""
    panels = [
        Panel("alpha", MATCHED, LINES, {"attack": attack, "placement": placement}, options={
            "title": attack if placement == "spread" else f"{attack}, all on one cluster", "yscale": "log",
            "ylim": (0.02, 20), "xlabel": "Byzantine share α (= β)" if index >= 3 else ""})
        for index, (attack, placement) in enumerate(PLACED)
    ]  # fmt: skip
    return Chart("attacks", [panels[:3], panels[3:]], len(METHODS), 10.0, 2.7, True, True, ylabel=NAMES[MATCHED])


def _betas() -> Chart:
    """Return the chart of the trimmed mean's matched distance against β at α = 0.10."""

    def mark_alpha(axes: Axes, _: pandas.DataFrame) -> None:
        axes.axvline(0.10, color="black", linewidth=0.8, linestyle=":", label="β = α")

    lines = [(attack, {"attack": attack}) for attack in ("scaled-model", "sign-flip", "alie")]
    options = {"yscale": "log", "xlabel": "trimmed share β at each end", "ylabel": "matched distance"}
    return Chart("betas", [[Panel("beta", MATCHED, lines, options=options, draw=mark_alpha)]], 4, width=4.8)


def _rate() -> Chart:
    """Return the chart of the matched distance against n, and against m/K, at α = 0.10 after `LONG` rounds."""
    sides = (("examples", "points per client n", POINTS, {"per_cluster": 40}),
             ("per_cluster", "clients per cluster m/K", PER_CLUSTER, {"examples": 100}))  # fmt: skip
    panels = [
        Panel(x, MATCHED, LINES[:-1], where, ticks=ticks, log=10, options={
            "yscale": "log", "xlabel": words, "title": "n = 100" if x == "per_cluster" else "m/K = 40",
            "ylabel": "matched distance" if x == "examples" else ""})
        for x, words, ticks, where in sides
    ]  # fmt: skip
    return Chart("rate", [panels], len(METHODS) - 1, 8.0, 2.8, sharey=True)


def _rounds() -> Chart:
    """Return the chart of the matched distance against T, a panel per n, at α = 0.10."""
    panels = [
        Panel("rounds", MATCHED, LINES[:-1], {"examples": n}, ticks=(50, 100, 200, 500, 1000), log=10, options={
            "yscale": "log", "xlabel": "rounds T", "title": f"n = {n}",
            "ylabel": "matched distance" if n == 25 else ""})
        for n in (25, 100, 400)
    ]  # fmt: skip
    return Chart("rounds", [panels], len(METHODS) - 1, 9.0, 2.8, sharex=True, sharey=True)


def rate_of(runs: pandas.DataFrame) -> dict[str, object]:
    """Fit log matched distance = a + b log n + c log(m/K) to the means of one method; return b and c with 95 % halves.

    Args:
        runs: of one method; an empty frame gives an empty dict.
    """
    means = runs.groupby(["examples", "per_cluster"])[MATCHED].mean().reset_index()
    if len(means) < 4:
        return {}
    design = np.column_stack([np.ones(len(means)), np.log(means["examples"]), np.log(means["per_cluster"])])
    target = np.log(means[MATCHED].to_numpy())
    found, _, _, _ = np.linalg.lstsq(design, target, rcond=None)
    freedom = len(means) - design.shape[1]
    variance = float(((target - design @ found) ** 2).sum()) / freedom
    halves = student.ppf(0.975, freedom) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return {"settings": len(means), "n": found[1], "n_half": halves[1], "m": found[2], "m_half": halves[2]}


def numbers(frames: Mapping[str, pandas.DataFrame]) -> dict[str, object]:
    """Return what the template states beside charts and means, from the frame of each grid."""
    seeds = frames["attacks"].groupby(["attack", "placement", "alpha"])["seed"].nunique()
    return {
        "methods": METHODS,
        "placed": PLACED,
        "survives": f"{SURVIVES:g}",
        "survived": largest_survived,
        "iterative": METHODS[:-1],
        "rate_of": rate_of,
        "attack_seeds": f"{seeds.min()} to {seeds.max()} seeds." if len(seeds) else "Not run.",
    }


def derived(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the runs as they are."""
    return runs


def largest_survived(runs: pandas.DataFrame) -> str:
    """Return the largest α of the grid up to which a method survives every step, from its runs; "none" without one."""
    means = runs.groupby("alpha")["matched_distance"].mean()
    if ATTACK_ALPHAS[0] not in means.index:
        return "not run"
    survived = "none"
    for alpha in (alpha for alpha in ATTACK_ALPHAS[1:] if alpha in means.index):
        if means[alpha] > SURVIVES * means[ATTACK_ALPHAS[0]]:
            return survived
        survived = f"{alpha:.2f}"
    return f"{survived} (never)" if survived != "none" else "not run"
