"""The figures of the study of federated EM."""

import math
from pathlib import Path

import numpy as np
import pandas

from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLES
from fl_taskarith.figures.series import draw_line, save, share_legend, subplots, summary_by
from fl_taskarith.mixtures.studies.em_cells import SUCCESS

CLUSTERS = (2, 3, 5, 10)


def trajectories(rows: pandas.DataFrame, folder: Path) -> str:
    """Error against iteration at several m/n; a run that has stopped keeps its last error."""
    figure, (axes,) = subplots(1, 2, sharey=True)
    for part, snr in zip(axes, (1.0, 2.0), strict=True):
        here = rows[rows["snr"] == snr]
        settings = here[["clients", "examples"]].drop_duplicates().sort_values("clients")
        for index, (m, n) in enumerate(settings.itertuples(index=False, name=None)):
            own = here[(here["clients"] == m) & (here["examples"] == n)]
            errors = own.pivot_table(index="iteration", columns="seed", values="error").ffill()
            low, middle, high = (errors.quantile(share, axis=1) for share in (0.25, 0.5, 0.75))
            colour = COLOURS[index]
            part.plot(middle.index, middle, color=colour, linestyle=STYLES[index],
                      label=f"m = {m}, n = {n}, m/n = {m / n:.3g}")  # fmt: skip
            part.fill_between(middle.index, low, high, color=colour, alpha=0.15, linewidth=0)
        part.set_xlim(0, 20)
        part.set_yscale("log")
        part.set_title(f"SNR = {snr:g}", fontsize=9)
        part.set_xlabel("iteration")
    axes[0].set_ylabel("largest ‖θ_k − θ*_k‖ / Δ_min")
    share_legend(figure, axes, 2)
    return save(figure, folder / "error-against-iteration")


def iterations(runs: pandas.DataFrame, snr: float, folder: Path) -> str:
    """Iterations to the tolerance and to accuracy, against m at fixed n and against n at fixed m."""
    here = runs[runs["snr"] == snr]
    figure, axes = subplots(2, 2, sharey="row", height=2.4)
    for row, column in enumerate(("iterations", "iterations_to_accuracy")):
        by_m, by_n = axes[row]
        for index, n in enumerate((5, 6, 7, 8)):
            draw_line(by_m, here[here["examples"] == n], "clients", column, index, f"n = {n}")
        for index, m in enumerate((100, 1000)):
            draw_line(by_n, here[here["clients"] == m], "examples", column, index + 4, f"m = {m}")
        by_m.set_ylabel("iterations to 1e-6" if row == 0 else "iterations to accuracy")
        for part in (by_m, by_n):
            part.set_xscale("log")
            part.set_ylim(bottom=0)
    axes[1][0].set_xlabel("clients m")
    axes[1][1].set_xlabel("points per client n")
    figure.suptitle(f"SNR = {snr:g}", fontsize=9)
    share_legend(figure, list(axes.flat), 6)
    return save(figure, folder / f"iterations-snr-{snr:g}")


def rate_points(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Mean error of every setting beside σ√(Kd/(mn)), with K and d."""
    keys = ["clients", "examples", "dimension", "clusters", "snr"]
    points = summary_by(runs, keys, "error").reset_index()
    points["rate"] = (
        points["clusters"] * points["dimension"] / (points["clients"] * points["examples"])
    ) ** 0.5 / points["snr"]
    return points


def rate(runs: pandas.DataFrame, folder: Path) -> str:
    """Final error against the statistical rate, with the line of slope 1 through the middle."""
    points = rate_points(runs)
    figure, ((axes,),) = subplots(1, 1, width=5.0, height=3.6)
    for (k, d), own in points.groupby(["clusters", "dimension"]):
        axes.plot(own["rate"], own["mean"], linestyle="", markersize=4, markerfacecolor="none",
                  color=COLOURS[CLUSTERS.index(k)], marker=MARKERS[(10, 20, 50).index(d)],
                  label=f"K = {k}, d = {d}")  # fmt: skip
    if len(points):
        ends = np.array([points["rate"].min(), points["rate"].max()])
        factor = math.exp(float(np.mean(np.log(points["mean"] / points["rate"]))))
        axes.plot(ends, factor * ends, color="black", linewidth=0.9, label="slope 1")
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("σ√(Kd/(mn)) / Δ_min")
    axes.set_ylabel("largest ‖θ_k − θ*_k‖ / Δ_min")
    share_legend(figure, [axes], 4)
    return save(figure, folder / "final-error")


def success(runs: pandas.DataFrame) -> pandas.DataFrame:
    """The runs with a column `success`, 0 or 1."""
    bound = np.minimum(SUCCESS * runs["known_clusters_error"], 0.5)
    return runs.assign(success=(runs["error"] <= bound).astype(float))


def knees(runs: pandas.DataFrame) -> dict[int, float]:
    """By K: the SNR from which on at least half of the runs succeed, interpolated; nan if there is none."""
    found = {}
    for k in CLUSTERS:
        rates = success(runs[runs["clusters"] == k]).groupby("snr")["success"].mean()
        below = rates.index[rates < 0.5]
        above = rates.index[rates.index > below.max()] if len(below) else []
        if not len(below) or not len(above):
            found[k] = math.nan
            continue
        low, high = below.max(), above[0]
        part = (0.5 - rates[low]) / (rates[high] - rates[low])
        found[k] = float(math.exp(math.log(low) + part * math.log(high / low)))
    return found


def snr(runs: pandas.DataFrame, folder: Path) -> str:
    """Success rate against SNR for several K, and the SNR of half success against K beside √K."""
    figure, ((curves, knee),) = subplots(1, 2)
    for index, k in enumerate(CLUSTERS):
        draw_line(curves, success(runs[runs["clusters"] == k]), "snr", "success", index, f"K = {k}", share=True)
    curves.set_xscale("log")
    ticks = (0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 4.0)
    curves.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    curves.minorticks_off()
    curves.set_xlabel("SNR = Δ_min/σ")
    curves.set_ylabel("success rate")
    found = {k: value for k, value in knees(runs).items() if not math.isnan(value)}
    if found:
        clusters = np.array(list(found))
        knee.plot(clusters, list(found.values()), "o", color=COLOURS[0], label="SNR of 50 % success")
        scale = math.exp(float(np.mean(np.log(np.array(list(found.values())) / np.sqrt(clusters)))))
        knee.plot(clusters, scale * np.sqrt(clusters), "--", color="black", linewidth=0.9, label=f"{scale:.2f} √K")
        knee.set_xscale("log")
        knee.set_yscale("log")
        knee.set_xticks(CLUSTERS, [str(k) for k in CLUSTERS])
        knee.minorticks_off()
        marks = (0.3, 0.4, 0.6, 0.8, 1.0, 1.2)
        knee.set_yticks(marks, [f"{mark:g}" for mark in marks])
        knee.set_ylim(0.2, 1.3)
    knee.set_xlabel("clusters K")
    share_legend(figure, [curves, knee], 6)
    return save(figure, folder / "success-against-snr")


def separation(runs: pandas.DataFrame, folder: Path) -> str:
    """Error and iterations against Δ_max at fixed Δ_min."""
    return _two_panels(runs, "farthest", "Δ_max / Δ_min", [(200, 3), (1000, 3), (1000, 5)], folder / "separation")


def radius(runs: pandas.DataFrame, folder: Path) -> str:
    """Success rate against the radius of the start."""
    figure, ((axes,),) = subplots(1, 1, width=4.4)
    for index, k in enumerate(CLUSTERS):
        draw_line(axes, success(runs[runs["clusters"] == k]), "radius", "success", index, f"K = {k}", share=True)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("radius of the start / Δ_min")
    axes.set_ylabel("success rate")
    share_legend(figure, [axes], 4)
    return save(figure, folder / "radius")


def pooled(runs: pandas.DataFrame, folder: Path) -> str:
    """Error and iterations of federated and pooled EM against m."""
    figure, (axes,) = subplots(1, 2)
    index = 0
    for level in (1.0, 2.0, 4.0):
        for method in ("federated", "pooled"):
            own = runs[(runs["snr"] == level) & (runs["method"] == method)]
            for part, column in zip(axes, ("error", "iterations"), strict=True):
                draw_line(part, own, "clients", column, index, f"{method}, SNR = {level:g}")
            index += 1
    for part, label in zip(axes, ("largest ‖θ_k − θ*_k‖ / Δ_min", "iterations to 1e-6"), strict=True):
        part.set_xscale("log")
        part.set_yscale("log")
        part.set_xlabel("clients m")
        part.set_ylabel(label)
    share_legend(figure, axes, 3)
    return save(figure, folder / "pooled")


def _two_panels(runs: pandas.DataFrame, x: str, label: str, settings: list[tuple[int, int]], output: Path) -> str:
    figure, (axes,) = subplots(1, 2)
    for index, (m, k) in enumerate(settings):
        own = runs[(runs["clients"] == m) & (runs["clusters"] == k)]
        for part, column in zip(axes, ("error", "iterations"), strict=True):
            draw_line(part, own, x, column, index, f"m = {m}, K = {k}")
    for part, name in zip(axes, ("largest ‖θ_k − θ*_k‖ / Δ_min", "iterations to 1e-6"), strict=True):
        part.set_xscale("log", base=2)
        part.set_ylim(bottom=0)
        part.set_xlabel(label)
        part.set_ylabel(name)
    share_legend(figure, axes, len(settings))
    return save(figure, output)
