"""The report on BR-IFCA: README.md with its figures and tables, from what is in the CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from fl_taskarith.figures.series import by_seed, markdown, with_interval, with_sd
from fl_taskarith.figures.statistics import paired, summarise
from fl_taskarith.mixtures.studies import br_ifca_figures
from fl_taskarith.mixtures.studies.br_ifca_cells import ALPHAS, ATTACK_ALPHAS, ATTACKS, CLUSTERS, DIMENSIONS, grids
from fl_taskarith.mixtures.studies.br_ifca_figures import METHODS
from fl_taskarith.mixtures.studies.cells import CellTables
from fl_taskarith.mixtures.studies.coverage import chosen, coverage, findings
from fl_taskarith.storage.files import write_atomically

SURVIVES = 2.0  # times its own matched distance without attackers: what a method may reach and count as surviving

INTRODUCTION = """# Byzantine-robust clustered federated learning (BR-IFCA)

The setting of Tao, Yang, Kulkarni (arXiv 2306.00638): linear regression, θ*_k drawn from {0, 1}^d and scaled to norm 1,
σ² = 0.2, 40 clients per cluster with n = 100 points each, step γ = 0.01, T = 300 rounds, loss ‖y − Xθ‖²/2n. With that
factor ½ and γT = 3, about 5 % of the initial error is left after T rounds whatever the rule. θ starts uniformly in
balls of radius Δ_min/4 around θ*, as the theorem assumes; the published code starts from a random draw, which has a
figure of its own. α is the share of Byzantine clients in every cluster, β what the trimmed mean drops at each end and
what Krum reckons with; β = α unless said. The attack is that of the published code unless said: attackers have data of
a θ of norm 3 and report gradients taken at 3 θ_k. Points are means with 95 % t intervals over seeds. Within one seed
all methods see the same data, attackers and start, so differences are paired.

`fl-taskarith br-ifca` makes all of it and goes on where it was stopped (`--quick`: what is cheap, for 1 or 2 seeds)."""


def write_report(tables: CellTables, planned: Sequence[Any]) -> Path:
    """Write the figures and README.md into the study's folder; returns the README's path."""
    folder, runs = tables.folder, tables.frames["runs"]
    folder.mkdir(parents=True, exist_ok=True)
    figures = grids()
    of = {figure: chosen(runs, tables.fields, cells) for figure, cells in figures.items()}
    parts = [
        INTRODUCTION,
        findings(folder),
        "## Average distance against d\n\nThe published metric, to the nearest θ* of each estimate. At d = n = 100 "
        "local least squares are at their worst, and the two-stage baseline leaves the frame (numbers in the table):",
        br_ifca_figures.distance(of["distance"], "nearest_distance", folder),
        "The matched distance (Hungarian algorithm): every θ* has one estimate. Where the two differ, an estimate is "
        "counted twice and a cluster has none.",
        br_ifca_figures.distance(of["distance"], "matched_distance", folder),
        _distances(of["distance"]),
        "## From a random start\n\nθ starts from another draw of the law of θ*, so nothing ties an estimate to a "
        "cluster; α = β = 0.10.",
        br_ifca_figures.random_start(of["random-start"], folder),
        "## Attacks and breakdown\n\nK = 5, d = 20, β = α. Sign flip and inner product are scaled by 10. With all "
        "attackers on one cluster they are as many as before, α·200.",
        br_ifca_figures.attacks(of["attacks"], folder),
        f"Breakdown: the largest α at and below which the mean matched distance over seeds stays within {SURVIVES:g} "
        "times that of the same method without attackers.",
        _breakdown(of["attacks"]),
        "## β apart from α\n\nTrimmed mean at α = 0.10 (4 attackers among 40), K = 5, d = 20.",
        br_ifca_figures.betas(of["betas"], folder),
        coverage(tables, figures, planned),
    ]
    path = folder / "README.md"
    write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _distances(runs: pandas.DataFrame) -> str:
    """Matched distance per method at the smallest and the largest dimension, and the paired gain of trimming."""
    rows = []
    for alpha in ALPHAS:
        for k in CLUSTERS:
            for d in (DIMENSIONS[0], DIMENSIONS[2], DIMENSIONS[-1]):
                here = runs[(runs["alpha"] == alpha) & (runs["clusters"] == k) & (runs["dimension"] == d)]
                by = {method: by_seed(here[here["method"] == method], "matched_distance") for method in METHODS}
                cells = [with_sd(summarise(list(by[method].values()))) for method in METHODS]
                gain = paired(by["trimmed-mean"], by["mean"])
                rows.append([f"{alpha:.2f}", str(k), str(d), *cells, with_interval(gain)])
    header = ["α = β", "K", "d", *METHODS, "trimmed − mean [95 % CI]"]
    return "Matched distance, mean ± sd:\n\n" + markdown(header, rows)


def _breakdown(runs: pandas.DataFrame) -> str:
    rows = []
    panels = [*((attack, "spread") for attack in ATTACKS), ("scaled-model", "one-cluster")]
    for attack, placement in panels:
        here = runs[(runs["attack"] == attack) & (runs["placement"] == placement)]
        cells = [_largest_survived(here[here["method"] == method]) for method in METHODS]
        rows.append([attack if placement == "spread" else f"{attack}, one cluster", *cells])
    seeds = runs.groupby(["attack", "placement", "alpha"])["seed"].nunique()
    least = f"{int(seeds.min())} to {int(seeds.max())} seeds." if len(seeds) else "Not run."
    return markdown(["attack", *METHODS], rows) + f"\n\n{least}"


def _largest_survived(runs: pandas.DataFrame) -> str:
    """The largest α of the grid up to which the method survives every step; "none" if the first one breaks it."""
    means = runs.groupby("alpha")["matched_distance"].mean()
    if ATTACK_ALPHAS[0] not in means.index:
        return "not run"
    survived = "none"
    for alpha in ATTACK_ALPHAS[1:]:
        if alpha not in means.index:
            continue
        if means[alpha] > SURVIVES * means[ATTACK_ALPHAS[0]]:
            return survived
        survived = f"{alpha:.2f}"
    return f"{survived} (never)" if survived != "none" else "not run"
