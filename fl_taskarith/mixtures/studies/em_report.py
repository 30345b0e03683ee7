"""What the report on federated EM shows: its charts as tables, and the numbers that its template states."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from scipy.stats import linregress
from scipy.stats import t as student

from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLES
from fl_taskarith.figures.series import Chart, Panel, Where, select, summary_by
from fl_taskarith.mixtures.studies.em_cells import CLUSTERS, LOGARITHMIC, NOISES, QUICK_SEEDS, SEEDS, SUCCESS, points_of

ERROR = "largest ‖θ_k − θ*_k‖ / Δ_min"
TO_TOLERANCE = "iterations to 1e-6"
FROM_ZERO = {"ylim": (0, None)}
SNR_TICKS = (0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 4.0)
OF_CLUSTERS = [(f"K = {k}", {"clusters": k}) for k in CLUSTERS]


def charts() -> dict[str, list[Chart]]:
    """Return the charts of each grid of `em_cells.grids`."""
    rate = {"yscale": "log", "xlabel": "σ√(Kd/(mn)) / Δ_min", "ylabel": ERROR}
    success = {"xlabel": "SNR = Δ_min/σ", "ylabel": "success rate"}
    radius = {"ylim": (0, 1.05), "xlabel": "radius of the start / Δ_min", "ylabel": "success rate"}
    separations = [(f"m = {m}, K = {k}", {"clients": m, "clusters": k}) for m, k in ((200, 3), (1000, 3), (1000, 5))]
    methods = [
        (f"{method}, SNR = {snr:g}", {"snr": snr, "method": method})
        for snr in (1.0, 2.0, 4.0) for method in ("federated", "pooled")
    ]  # fmt: skip
    snr_panels = [Panel("snr", "success", OF_CLUSTERS, options=success, ticks=SNR_TICKS, log=10, share=True),
                  Panel(draw=draw_knees, options={"xlabel": "clusters K"})]  # fmt: skip
    radius_panel = Panel("radius", "success", OF_CLUSTERS, options=radius, log=2, share=True)
    trajectories = [_trajectories(1.0, ERROR), _trajectories(2.0)]
    return {
        "trajectories": [Chart("error-against-iteration", [trajectories], 2, sharey=True)],
        "iterations": [_iterations(snr) for snr in (2.0, 1.0)],
        "rate": [
            Chart(
                "final-error",
                [
                    [
                        Panel(
                            draw=draw_rate,
                            where={"snr": snr},
                            log=10,
                            options=rate | {"title": f"SNR = {snr:g}", "ylabel": ERROR if snr == NOISES[0] else ""},
                        )
                        for snr in NOISES
                    ]
                ],
                4,
                width=9.0,
                height=3.2,
                sharex=True,
                sharey=True,
            )
        ],
        "logarithmic": [_logarithmic()],
        "snr": [Chart("success-against-snr", [snr_panels], 6)],
        "separation": [_error_and_iterations("separation", "farthest", separations, 2, FROM_ZERO, "Δ_max / Δ_min")],
        "radius": [Chart("radius", [[radius_panel]], 4, width=4.4)],
        "pooled": [_error_and_iterations("pooled", "clients", methods, 10, {"yscale": "log"}, "clients m")],
    }


def _trajectories(snr: float, ylabel: str = "") -> Panel:
    options = {"xlim": (0, 20), "yscale": "log", "title": f"SNR = {snr:g}", "xlabel": "iteration", "ylabel": ylabel}
    return Panel(where={"snr": snr}, options=options, draw=draw_quartiles)


def _iterations(snr: float) -> Chart:
    """Return the chart of iterations to the tolerance and to accuracy, against m at fixed n and n at fixed m."""
    sides = (("clients", "clients m", [(f"n = {n}", {"examples": n}) for n in (5, 6, 7, 8)], 0),
             ("examples", "points per client n", [(f"m = {m}", {"clients": m}) for m in (100, 1000)], 4))  # fmt: skip
    rows = (("iterations", TO_TOLERANCE), ("iterations_to_accuracy", "iterations to accuracy"))
    panels = [
        [
            Panel(x, y, lines, {"snr": snr}, look, log=10, options=FROM_ZERO
                  | {"xlabel": words if y == rows[-1][0] else "", "ylabel": ylabel if x == "clients" else ""})
            for x, words, lines, look in sides
        ]
        for y, ylabel in rows
    ]  # fmt: skip
    return Chart(f"iterations-snr-{snr:g}", panels, 6, height=2.4, sharey="row", title=f"SNR = {snr:g}")


def _logarithmic() -> Chart:
    """Return the chart of iterations against m where n grows with log m, so that m is exponential in n."""
    lines = [(f"n = {words}", {"growth": words}) for words in LOGARITHMIC]
    panels = [
        Panel("clients", "iterations", lines, {"snr": snr}, log=10, options=FROM_ZERO
              | {"title": f"SNR = {snr:g}", "xlabel": "clients m", "ylabel": TO_TOLERANCE if snr == 2.0 else ""})
        for snr in (2.0, 1.0)
    ]  # fmt: skip
    return Chart("iterations-n-log-m", [panels], 2, height=2.6)


def _error_and_iterations(
    name: str, x: str, lines: Sequence[tuple[str, Where]], log: int, limits: Mapping[str, Any], xlabel: str
) -> Chart:
    """Return the chart of the error, and beside it of the iterations, against `x`."""
    panels = [
        Panel(x, y, lines, options={**limits, "xlabel": xlabel, "ylabel": ylabel}, log=log)
        for y, ylabel in (("error", ERROR), ("iterations", TO_TOLERANCE))
    ]
    return Chart(name, [panels], 3)


def derived(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the runs with `success`, 0 or 1, and `growth`: the words of the rule by which n follows m, if by one."""
    pairs = list(zip(runs["clients"], runs["examples"], strict=True))
    growth = [next((words for words, factor in LOGARITHMIC.items() if n == points_of(m, factor)), "") for m, n in pairs]
    return with_success(runs).assign(growth=growth)


def with_success(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the runs with a column `success`, 0 or 1."""
    bound = np.minimum(SUCCESS * runs["known_clusters_error"], 0.5)
    return runs.assign(success=(runs["error"] <= bound).astype(float))


def draw_quartiles(axes: Axes, rows: pandas.DataFrame) -> None:
    """Draw the median error and its quartiles against the iteration; a run that has stopped keeps its last error."""
    settings = rows[["clients", "examples"]].drop_duplicates().sort_values("clients")
    for index, (m, n) in enumerate(settings.itertuples(index=False, name=None)):
        own = select(rows, {"clients": m, "examples": n})
        errors = own.pivot_table(index="iteration", columns="seed", values="error").ffill()
        low, middle, high = (errors.quantile(share, axis=1) for share in (0.25, 0.5, 0.75))
        label = f"m = {m}, n = {n}, m/n = {m / n:.3g}"
        axes.plot(middle.index, middle, color=COLOURS[index], linestyle=STYLES[index], label=label)
        axes.fill_between(middle.index, low, high, color=COLOURS[index], alpha=0.15, linewidth=0)


def rate_points(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return the mean error of every setting beside σ√(Kd/(mn)), with K and d."""
    keys = ["clients", "examples", "dimension", "clusters", "snr"]
    points = summary_by(runs, keys, "error").reset_index()
    ratio = points["clusters"] * points["dimension"] / (points["clients"] * points["examples"])
    return points.assign(rate=ratio**0.5 / points["snr"])


def draw_rate(axes: Axes, runs: pandas.DataFrame) -> None:
    """Draw the final error against the statistical rate, with the line of slope 1 through the middle."""
    points = rate_points(runs)
    for (k, d), own in points.groupby(["clusters", "dimension"]):
        axes.plot(own["rate"], own["mean"], linestyle="", markersize=4, markerfacecolor="none",
                  color=COLOURS[CLUSTERS.index(k)], marker=MARKERS[(10, 20, 50).index(d)],
                  label=f"K = {k}, d = {d}")  # fmt: skip
    if len(points):
        ends = np.array([points["rate"].min(), points["rate"].max()])
        factor = math.exp(float(np.mean(np.log(points["mean"] / points["rate"]))))
        axes.plot(ends, factor * ends, color="black", linewidth=0.9, label="slope 1")


def knees(runs: pandas.DataFrame) -> dict[int, float]:
    """Return by K the SNR from which on at least half of the runs succeed, interpolated; NaN if there is none."""
    knee_of = dict.fromkeys(CLUSTERS, math.nan)
    for k in CLUSTERS:
        rates = runs[runs["clusters"] == k].groupby("snr")["success"].mean()
        low = rates.index[rates < 0.5].max()  # NaN without any
        if (above := rates.index[rates.index > low]).empty:
            continue
        part = (0.5 - rates[low]) / (rates[above[0]] - rates[low])
        knee_of[k] = float(math.exp(math.log(low) + part * math.log(above[0] / low)))
    return knee_of


def draw_knees(axes: Axes, runs: pandas.DataFrame) -> None:
    """Draw the SNR of half success against K beside √K."""
    known = pandas.Series(knees(runs)).dropna()
    if known.empty:
        return
    axes.plot(known.index, known, "o", color=COLOURS[0], label="SNR of 50 % success")
    scale = math.exp(float(np.mean(np.log(known / np.sqrt(known.index)))))
    axes.plot(known.index, scale * np.sqrt(known.index), "--", color="black", linewidth=0.9, label=f"{scale:.2f} √K")
    marks = (0.3, 0.4, 0.6, 0.8, 1.0, 1.2)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(CLUSTERS, [str(k) for k in CLUSTERS])
    axes.minorticks_off()
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_ylim(0.2, 1.3)


def numbers(frames: Mapping[str, pandas.DataFrame]) -> dict[str, object]:
    """Return what the template states beside charts, from the frame of each grid."""
    points = rate_points(frames["rate"])
    fits = {snr: _rate_fit(own) for snr, own in points.groupby("snr") if len(own) > 2}
    known = pandas.Series(knees(frames["snr"])).dropna()
    return {
        "seeds": SEEDS,
        "quick_seeds": QUICK_SEEDS,
        "points": points,
        "fits": fits,
        "knees": knees(frames["snr"]),
        "knee": log_log_slope(known.index.to_series(), known),
    }


def _rate_fit(points: pandas.DataFrame) -> dict[str, float | None]:
    """Return the log-log slope of the mean error on the rate, and the factor between them at slope 1."""
    factor = math.exp(float(np.log(points["mean"].astype(float) / points["rate"]).mean()))
    return {"settings": len(points), "seeds": points["count"].min(), "factor": factor,
            **(log_log_slope(points["rate"], points["mean"]) or {})}  # fmt: skip


def log_log_slope(x: pandas.Series, y: pandas.Series) -> dict[str, float] | None:
    """Return the slope of log `y` on log `x`, half the width of its 95 % interval and R²; None below three points."""
    if len(x) < 3:
        return None
    fit = linregress(np.log(x.to_numpy(dtype=float)), np.log(y.to_numpy(dtype=float)))
    return {"slope": fit.slope, "half": float(student.ppf(0.975, len(x) - 2)) * fit.stderr, "r2": fit.rvalue**2}
