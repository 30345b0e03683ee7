"""The report on federated EM: README.md with its figures and tables, from what is in the CSVs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from scipy.stats import linregress
from scipy.stats import t as student

from fl_taskarith.figures.series import by_seed, markdown, with_interval, with_sd
from fl_taskarith.figures.statistics import paired, summarise
from fl_taskarith.mixtures.studies import em_figures
from fl_taskarith.mixtures.studies.cells import CellTables
from fl_taskarith.mixtures.studies.coverage import chosen, coverage, findings
from fl_taskarith.mixtures.studies.em_cells import CLIENTS, QUICK_SEEDS, SEEDS, grids
from fl_taskarith.mixtures.studies.em_figures import knees, rate_points
from fl_taskarith.storage.files import write_atomically

INTRODUCTION = f"""# Federated EM for mixtures of linear regressions

m clients with n points each belong to K clusters; x ~ N(0, I_d), y = ⟨x, θ*_z⟩ + ε, ε ~ N(0, σ²), one z per client
(Tao, Chandak, Kulkarni, arXiv 2408.05819). All θ* lie at distance Δ_min = 1 from one another, so SNR = Δ_min/σ = 1/σ.
EM starts uniformly in balls of radius Δ_min/4 around them and stops when no θ_k moves by more than 1e-6, or after 300
iterations. The error is the least over permutations of the largest ‖θ_k − θ*_k‖. Points are means with 95 % t intervals
over seeds. `fl-taskarith fed-em` makes all of it and goes on where it was stopped (`--quick`: {QUICK_SEEDS} of {SEEDS}
seeds)."""


def write_report(tables: CellTables, planned: Sequence[Any]) -> Path:
    """Write the figures and README.md into the study's folder; returns the README's path."""
    folder, runs = tables.folder, tables.frames["runs"]
    folder.mkdir(parents=True, exist_ok=True)
    figures = grids()
    of = {figure: chosen(runs, tables.fields, cells) for figure, cells in figures.items()}
    parts = [
        INTRODUCTION,
        findings(folder),
        "## Error against iteration\n\nMedian and quartiles over seeds, at about equal numbers of points m·n.",
        em_figures.trajectories(tables.frames["trajectories"], folder),
        "## Iterations against m and n\n\nUntil no θ_k moves by more than 1e-6 (top), and until the error is within "
        "10 % of its final value (bottom). K = 3, d = 10.",
        *(em_figures.iterations(of["iterations"], snr, folder) for snr in (2.0, 1.0)),
        "## Final error against σ√(Kd/(mn))",
        em_figures.rate(of["rate"], folder),
        _slope(of["rate"]),
        "## Success against SNR\n\nSuccess: an error of at most twice that of least squares with known clusters, and "
        "below Δ_min/2. m = 1000, n = 10, d = 10.",
        em_figures.snr(of["snr"], folder),
        _knees(of["snr"]),
        "## Largest separation at fixed smallest one\n\nOne cluster lies at Δ_max from all others, SNR = 1, n = 8, "
        "d = 10.",
        em_figures.separation(of["separation"], folder),
        "## Radius of the start\n\nSNR = 2, m = 1000, n = 8, d = 10.",
        em_figures.radius(of["radius"], folder),
        "## Against pooled EM\n\nPooled EM has the same points and a responsibility per point: it does not know that a "
        "client's points share a cluster. K = 3, n = 8, d = 10.",
        em_figures.pooled(of["pooled"], folder),
        _pooled(of["pooled"]),
        coverage(tables, figures, planned),
    ]
    path = folder / "README.md"
    write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _slope(runs: pandas.DataFrame) -> str:
    points = rate_points(runs)
    if len(points) < 3:
        return "Slope: not run."
    x, y = np.log(points["rate"].to_numpy(dtype=float)), np.log(points["mean"].to_numpy(dtype=float))
    fit = linregress(x, y)
    ratio = math.exp(float(np.mean(y - x)))
    return (
        f"Least squares of log mean error on log σ√(Kd/(mn)) over {len(points)} settings: slope {fit.slope:.3f} ± "
        f"{_half(fit.stderr, len(points)):.3f} (95 %), R² = {fit.rvalue**2:.4f}; at slope 1 the factor is {ratio:.2f}. "
        f"{int(points['count'].min())} to {int(points['count'].max())} seeds per setting."
    )


def _half(standard_error: float, points: int) -> float:
    """Half the width of a slope's 95 % interval from a straight line through so many points."""
    return float(student.ppf(0.975, points - 2)) * standard_error


def _knees(runs: pandas.DataFrame) -> str:
    found = knees(runs)
    rows = [[str(k), "not reached" if math.isnan(snr) else f"{snr:.2f}",
             "–" if math.isnan(snr) else f"{snr / math.sqrt(k):.2f}"] for k, snr in found.items()]  # fmt: skip
    table = markdown(["K", "SNR of 50 % success", "divided by √K"], rows)
    finite = {k: snr for k, snr in found.items() if not math.isnan(snr)}
    if len(finite) < 3:
        return table
    fit = linregress(np.log(list(finite)), np.log(list(finite.values())))
    half = _half(fit.stderr, len(finite))
    return f"{table}\n\nLog-log slope of that SNR on K: {fit.slope:.2f} ± {half:.2f} (95 %; √K: 0.5)."


def _pooled(runs: pandas.DataFrame) -> str:
    rows = []
    for snr in (1.0, 2.0, 4.0):
        for m in (CLIENTS[0], 1000, CLIENTS[-1]):
            here = runs[(runs["snr"] == snr) & (runs["clients"] == m)]
            by = {method: here[here["method"] == method] for method in ("federated", "pooled")}
            cells = [with_sd(summarise(list(by[method]["error"]))) for method in by]
            cells.append(with_interval(paired(by_seed(by["pooled"], "error"), by_seed(by["federated"], "error"))))
            cells += [with_sd(summarise(list(by[method]["iterations"]))) for method in by]
            rows.append([f"{snr:g}", str(m), *cells])
    header = ["SNR", "m", "error, federated", "error, pooled", "pooled − federated [95 % CI]",
              "iterations, federated", "iterations, pooled"]  # fmt: skip
    return markdown(header, rows)
