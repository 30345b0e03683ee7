"""Tables and figures of the web page, as Bokeh's models: sortable, with a value under the pointer."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas
from bokeh.models import ColumnDataSource, DataRange1d, FactorRange, HoverTool, LinearColorMapper
from bokeh.models.annotations import Whisker
from bokeh.models.widgets import DataTable, NumberFormatter, StringFormatter, TableColumn
from bokeh.palettes import Cividis256
from bokeh.plotting import figure

from fl_taskarith.figures.plots import COLOURS
from fl_taskarith.figures.setting_words import mask_words, mean_local_steps, sharding_words
from fl_taskarith.figures.statistics import summarise
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.storage.record_files import COUNT

FORMATS = {"learning rate": "0.[000000]", "learning_rate": "0.[000000]", "distance": "0.0000"}  # others have two digits
DASHES = ("solid", "dashed", "dotdash", "dotted")
ROW, HEADER, BAR, TALLEST = 26, 30, 18, 640  # pixels of a table; BAR scrolls sideways
WIDTH = 980  # pixels of the page
NUMBER, WORDS = (float, None), (str, None)
COMPARED = {  # columns of table.csv, and what they hold
    "group": WORDS, "arm": str, "learning_rate": NUMBER, "edge": (bool, str, None), "n": COUNT,
    **dict.fromkeys(("test_percent", "test_percent_sd", "val_percent", "gain_mean", "gain_low", "gain_high",
                     "difference_mean", "difference_low", "difference_high", "uplink_megabytes"), NUMBER),
}  # fmt: skip
TRIED = {"group": WORDS, "arm": str, "learning_rate": float, "also": WORDS, "rounds": COUNT,
         "val_accuracy": NUMBER}  # of search.csv  # fmt: skip
LETTER, LEGEND_ROW = 7.5, 24  # pixels, about


def table(frame: pandas.DataFrame, name: str) -> DataTable:
    """Return a table that a click on a column's head sorts; numbers sort as numbers."""
    columns = []
    for title in frame.columns:
        numeric = pandas.api.types.is_numeric_dtype(frame[title])
        whole = numeric and (frame[title].dropna() % 1 == 0).all()
        digits = "0" if whole else FORMATS.get(str(title), "0.00")
        formatter = NumberFormatter(format=digits, nan_format="–") if numeric else StringFormatter()
        letters = max([len(str(title)), *([8] if numeric else frame[title].astype(str).str.len())])
        columns.append(TableColumn(field=title, title=title, formatter=formatter, width=int(40 + LETTER * letters)))
    height = min(TALLEST, HEADER + BAR + ROW * max(1, len(frame)))
    return DataTable(
        source=ColumnDataSource({name: frame[name].tolist() for name in frame}), columns=columns, width=WIDTH,
        height=height, row_height=ROW, index_position=None, name=name, autosize_mode="none", sortable=True,
    )  # fmt: skip


def comparison(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return the columns of table.csv that a reader compares, under the names of the README's tables."""

    def interval(row: pandas.Series, name: str) -> str:
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        return "" if pandas.isna(low) else f"[{low:+.2f}, {high:+.2f}]"

    edge = rows["edge"].astype(str).eq("True")
    return pandas.DataFrame(
        {
            "group": rows["group"].fillna(""),
            "arm": rows["arm"],
            "learning rate": rows["learning_rate"],
            "tuned": edge.map({True: "no, an end of the grid", False: "yes"}),
            "test %": rows["test_percent"],
            "sd": rows["test_percent_sd"],
            "validation %": rows["val_percent"],
            "seeds": rows["n"],
            "gain over the head before training": rows["gain_mean"],
            "95 % interval": [interval(row, "gain") for _, row in rows.iterrows()],
            "difference to the reference": rows["difference_mean"],
            "its 95 % interval": [interval(row, "difference") for _, row in rows.iterrows()],
            "uplink MB a round": rows["uplink_megabytes"],
        }
    )


def accuracies(arms: Sequence[MeasuredArm], title: str) -> figure:
    """Draw test accuracy per arm: the mean with its sd, every seed a small ring."""
    shown = [arm for arm in arms if arm.test]
    points = [summarise(list(arm.test.values())) for arm in shown]
    source = ColumnDataSource({
        "arm": [arm.label for arm in shown], "mean": [point.mean for point in points],
        "low": [point.mean - point.sd if point.n > 1 else point.mean for point in points],
        "high": [point.mean + point.sd if point.n > 1 else point.mean for point in points],
        "sd": [f"{point.sd:.2f}" if point.n > 1 else "–" for point in points], "n": [point.n for point in points],
    })  # fmt: skip
    plot = figure(
        title=title, width=WIDTH, height=110 + 26 * len(shown), x_axis_label="test accuracy (%)",
        tools="pan,wheel_zoom,reset,save", y_range=FactorRange(factors=[arm.label for arm in reversed(shown)]),
        name="accuracies",
    )  # fmt: skip
    plot.add_layout(Whisker(base="arm", lower="low", upper="high", source=source, dimension="width"))
    for end in ("low", "high"):  # so that the axis reaches as far as the whiskers
        plot.scatter(end, "arm", source=source, alpha=0.0)
    plot.scatter([each for arm in shown for each in arm.test.values()], [arm.label for arm in shown for _ in arm.test],
                 size=5, line_color=COLOURS[1], fill_alpha=0.0)  # fmt: skip
    dots = plot.scatter("mean", "arm", source=source, size=8, color=COLOURS[0])
    plot.add_tools(
        HoverTool(
            renderers=[dots], tooltips=[("arm", "@arm"), ("mean", "@mean{0.00} %"), ("sd", "@sd"), ("seeds", "@n")]
        )
    )
    return plot


def curves(arms: Sequence[MeasuredArm], title: str, column: str = "test_percent") -> figure | None:
    """Draw accuracy against rounds, means with a band of ± sd; a click on a name in the legend hides its line."""
    lines = {arm.label: by_round(arm.curves.get(column, {})) for arm in arms}
    if not any(len(points) > 1 for points in lines.values()):
        return None
    plot = figure(
        title=title, width=WIDTH, height=max(380, 90 + LEGEND_ROW * len(lines)), name="curves",  # the legend fits
        x_axis_label="communication round (or epoch)",
        y_axis_label="test accuracy (%)", tools="pan,wheel_zoom,box_zoom,reset,save",
    )  # fmt: skip
    for turn, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        summaries = {number: summarise(values) for number, values in points.items()}
        sds = [0.0 if each.n < 2 else each.sd for each in summaries.values()]
        means = [each.mean for each in summaries.values()]
        source = ColumnDataSource({
            "round": list(summaries), "mean": means, "arm": [label] * len(means), "sd": sds,
            "low": [mean - sd for mean, sd in zip(means, sds, strict=True)],
            "high": [mean + sd for mean, sd in zip(means, sds, strict=True)],
        })  # fmt: skip
        colour = COLOURS[turn % (len(COLOURS) - 1)]
        plot.varea("round", "low", "high", source=source, fill_color=colour, fill_alpha=0.15, legend_label=label)
        line = plot.line("round", "mean", source=source, line_color=colour, line_width=2, legend_label=label,
                         line_dash=DASHES[turn // (len(COLOURS) - 1) % len(DASHES)])  # fmt: skip
        plot.add_tools(
            HoverTool(
                renderers=[line], tooltips=[("arm", "@arm"), ("round", "@round"), ("mean", "@mean{0.00} % ± @sd{0.00}")]
            )
        )
    plot.add_layout(plot.legend[0], "right")
    plot.legend.click_policy = "hide"
    plot.legend.label_text_font_size = "9pt"
    return plot


def by_round(curves: Mapping[int, Mapping[int, float]]) -> dict[int, list[float]]:
    """Return the values of all seeds by round, for the rounds that every seed has."""
    seeds = [dict(points) for points in curves.values()]
    shared = set.intersection(*(set(points) for points in seeds)) if seeds else set()
    return {number: [points[number] for points in seeds] for number in sorted(shared)}


def heat_map(arms: Sequence[MeasuredArm]) -> list[figure]:
    """Draw mean test accuracy for sharding × local steps, a map per mask; none where not both differ."""
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for arm in arms:
        if arm.test and arm.federated:
            place = f"{mean_local_steps(arm.settings):g}", sharding_words(arm.settings)
            cells.setdefault(mask_words(arm.settings), {})[place] = fmean(arm.test.values())
    maps = []
    everything = [value for each in cells.values() for value in each.values()]
    middle = (min(everything) + max(everything)) / 2 if everything else 0.0
    for mask, values in cells.items():
        steps = sorted({place[0] for place in values}, key=float)
        shardings = list(dict.fromkeys(place[1] for place in values))
        if len(steps) < 2 or len(shardings) < 2:
            continue
        source = ColumnDataSource({
            "J": [place[0] for place in values], "clients": [place[1] for place in values],
            "mean": list(values.values()), "text": [f"{value:.1f}" for value in values.values()],
            "ink": ["white" if value < middle else "black" for value in values.values()],
        })  # fmt: skip
        plot = figure(
            title=mask, width=160 + 90 * len(steps), height=130 + 44 * len(shardings), x_axis_label="local steps J",
            x_range=FactorRange(factors=steps), y_range=FactorRange(factors=shardings[::-1]), tools="save",
            name="heat-map",
        )  # fmt: skip
        mapper = LinearColorMapper(palette=Cividis256, low=min(everything), high=max(everything))
        tiles = plot.rect(
            "J", "clients", 1, 1, source=source, fill_color={"field": "mean", "transform": mapper}, line_color=None
        )
        plot.text("J", "clients", "text", source=source, text_align="center", text_baseline="middle", text_color="ink",
                  text_font_size="9pt")  # fmt: skip
        _hover(plot, tiles, [("J", "@J"), ("clients", "@clients"), ("test", "@mean{0.00} %")])
        plot.grid.grid_line_color = None
        maps.append(plot)
    return maps


def searches(tried: pandas.DataFrame, title: str) -> figure | None:
    """Draw validation accuracy against the learning rate for the last stage of every arm's search, from a group of
    search.csv.
    """
    tried = tried[tried["val_accuracy"].notna()]
    if tried.empty:
        return None
    others = tried["also"].fillna("")
    arms = tried.assign(arm=tried["arm"] + others.where(others == "", ", " + others)).groupby("arm", sort=False)
    plot = figure(title=f"Last stage of the search with several rates{title and ': '}{title}", name="search",
                  width=WIDTH, height=max(360, 90 + LEGEND_ROW * arms.ngroups), x_axis_type="log",
                  x_axis_label="learning rate", y_axis_label="validation accuracy (%)",
                  tools="pan,wheel_zoom,box_zoom,reset,save")  # fmt: skip
    for turn, (arm, rows) in enumerate(arms):
        lengths = rows.groupby("rounds")["learning_rate"].nunique()
        rung = rows[rows["rounds"] == max(lengths[lengths > 1].index, default=rows["rounds"].max())].sort_values(
            "learning_rate"
        )
        label = str(arm)
        source = ColumnDataSource(
            {"rate": rung["learning_rate"], "val": 100 * rung["val_accuracy"], "arm": [label] * len(rung)}
        )
        colour = COLOURS[turn % (len(COLOURS) - 1)]
        line = plot.line("rate", "val", source=source, line_color=colour, legend_label=label, line_width=1.5)
        plot.scatter("rate", "val", source=source, color=colour, legend_label=label, size=5)
        _hover(plot, line, [("arm", "@arm"), ("rate", "@rate"), ("validation", "@val{0.00} %")])
    plot.add_layout(plot.legend[0], "right")
    plot.legend.click_policy = "hide"
    plot.legend.label_text_font_size = "8pt"
    return plot


def mask_anatomy(summary: Mapping[str, Any], title: str) -> figure | None:
    """Draw the density of a mask in each kind of layer and, where it is known, in each block."""
    layers = {f"layer {name}" if name == "norm" else name: density  # which is the name of a kind, too
              for name, density in summary.get("density_by_layer", {}).items()}  # fmt: skip
    parts = {**summary.get("density_by_kind", {}), **layers}
    if not parts:
        return None
    plot = figure(
        title=f"{title}: density {summary.get('density', float('nan')):.3g}", width=WIDTH, height=320, tools="save",
        x_range=FactorRange(factors=list(parts)), y_range=DataRange1d(start=0), name="anatomy",
        y_axis_label="share of weights updated",
    )  # fmt: skip
    source = ColumnDataSource({"part": list(parts), "density": list(parts.values())})
    bars = plot.vbar("part", top="density", width=0.8, source=source, color=COLOURS[0])
    _hover(plot, bars, [("part", "@part"), ("density", "@density{0.0000}")])
    plot.xaxis.major_label_orientation = 0.9
    return plot


def _hover(plot: figure, renderer: Any, tips: Sequence[tuple[str, str]]) -> None:
    """Show `tips`, pairs of a name and a Bokeh format, under the pointer over a renderer."""
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=list(tips)))
