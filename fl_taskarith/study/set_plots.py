"""Figures over a set of runs: curves with a band over seeds, Nc against J, sweeps of a setting, clients' drift."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from fl_taskarith.study.plots import COLOURS, STYLE, STYLES, off_scale, save_figure
from fl_taskarith.study.run_set import Member, last_test_accuracy, last_validation_accuracy, mean_of, sharding_words

SWEPT = {"density": "density (share of weights updated)", "calibration-rounds": "calibration rounds R"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CLEAR = 10  # lines of a figure that can be told apart
GREY = {"color": "0.75", "linestyle": "-", "zorder": 0}
TICKS = (1.0, 3.0)  # of a decade of bytes
LEGEND_COLUMNS = 4  # at most
LABEL_WIDTH = 0.06  # inches that a character of the legend takes, about


def possible_figures(output: Path) -> list[Path]:
    """Every file that `plot_set`, or a figure of a single run, may write for `output`."""
    names = (output.name, *(f"{output.name}-{suffix}" for suffix in ("heat-map", "drift", *SWEPT)))
    return [output.with_name(name + ending) for name in names for ending in (".png", ".pdf")]


def plot_set(members: Sequence[Member], output: Path) -> list[Path]:
    """Every figure for which the members differ in the right settings; OUTPUT.png and .pdf, OUTPUT-heat-map.png, ...

    Raises:
        CheckpointError: a figure cannot be written.
    """
    paths = plot_bands(members, output)
    for suffix, draw in (("heat-map", plot_heat_map), ("drift", plot_drift)):
        paths += draw(members, output.with_name(f"{output.name}-{suffix}"))
    for key in SWEPT:
        paths += plot_sweep(members, key, output.with_name(f"{output.name}-{key}"))
    return paths


def plot_bands(members: Sequence[Member], output: Path) -> list[Path]:
    """Test accuracy and loss against rounds, accuracy against bytes if any were sent: means, and bands of one sd.

    Of more than `CLEAR` members those with the best validation accuracy at the end are told apart, the others are grey.
    """
    sending = any(max(_megabytes(member).values(), default=0.0) > 0 for member in members)  # not without clients
    panels = 3 if sending else 2
    shown = _clearest(members)
    longest = max(len(members[index].label) for index in shown)
    columns = max(1, min(LEGEND_COLUMNS, len(shown), int(3.0 * panels / (0.6 + LABEL_WIDTH * longest))))
    entries = len(shown) + (len(shown) < len(members))
    with pyplot.rc_context(cast(Any, STYLE)):
        size = (3.0 * panels, 2.9 + 0.16 * -(-entries // columns))
        figure, (rounds, loss, *traffic) = pyplot.subplots(1, panels, figsize=size, layout="constrained")
        finals = {index: end.mean for index in shown if (end := members[index].over_runs(last_test_accuracy)).n}
        lost = {list(finals)[place] for place in off_scale(list(finals.values()))}
        for index in sorted(shown, key=lambda index: index in lost):
            label = members[index].label
            if index in lost:
                label += f" (ends at {finals[index]:.1f} %, off the scale)"
                _hold((rounds, loss, *traffic))
            turn = shown.index(index)
            look = {"color": COLOURS[turn % len(COLOURS)], "linestyle": _style(turn)}
            _curves(members[index], (rounds, loss, *traffic), look, label)
        _hold((rounds, loss, *traffic))
        hidden = [member for index, member in enumerate(members) if index not in shown]
        for number, member in enumerate(hidden):
            _curves(member, (rounds, loss, *traffic), GREY, f"{len(hidden)} others" if number == 0 else "")
        epochs = {member.settings["strategy"] == "centralized" for member in members}
        for axes, name in ((rounds, "test accuracy (%)"), (loss, "test cross-entropy (nats)")):
            axes.set_xlabel({1: "epoch" if True in epochs else "round"}.get(len(epochs), "round or epoch"))
            axes.set_ylabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in traffic:
            _scale_bytes(axes, [megabytes for each in members for megabytes in _megabytes(each).values()])
        handles, labels = rounds.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
        return save_figure(figure, output)


def _clearest(members: Sequence[Member]) -> list[int]:
    """Places of the members that a figure tells apart, in their order."""
    if len(members) <= CLEAR:
        return list(range(len(members)))
    ends = {index: member.over_runs(last_validation_accuracy) for index, member in enumerate(members)}
    best = sorted(ends, key=lambda index: ends[index].mean if ends[index].n else -1.0, reverse=True)
    return sorted(best[: len(COLOURS)])


def _hold(panels: Sequence[Axes]) -> None:
    """What is drawn from here on does not move the axes."""
    for axes in panels:
        axes.set_ylim(axes.get_ylim())


def _curves(member: Member, panels: Sequence[Axes], look: Mapping[str, Any], label: str) -> None:
    rounds, loss, *traffic = panels
    accuracy = member.curve("test_accuracy", 100.0)
    _band(rounds, accuracy, look, label)
    _band(loss, member.curve("test_loss"), look, label)
    sent = _megabytes(member)
    for axes in traffic if max(sent.values(), default=0.0) > 0 else ():
        _band(axes, [(sent[number], point) for number, point in accuracy], look, "")


def _scale_bytes(axes: Axes, sent: Sequence[float]) -> None:
    """A log axis of megabytes; where some are 0 (round 0 without head and mask), 0 a little left of the others."""
    axes.set_xlabel("sent so far, both ways (MB)")
    axes.set_ylabel("test accuracy (%)")
    if min(sent, default=0.0) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
    else:
        first = min((megabytes for megabytes in sent if megabytes > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=first, linscale=0.25)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=first, subs=TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def plot_heat_map(members: Sequence[Member], output: Path) -> list[Path]:
    """Mean test accuracy for sharding x local steps, a panel per mask; nothing unless both differ."""
    members = _federated(members)
    shardings, steps, panels = _axes_of(members)
    if len(shardings) < 2 or len(steps) < 2 or _collide(members):
        return []
    cells = {(_panel(each), sharding_words(each.settings), each.settings["local-steps"]): each for each in members}
    means = {place: member.over_runs(last_test_accuracy) for place, member in cells.items()}
    low, high = min(each.mean for each in means.values()), max(each.mean for each in means.values())
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, grid = pyplot.subplots(
            1, len(panels), figsize=(1.2 + 2.9 * len(panels), 0.9 + 0.42 * len(shardings)), layout="constrained",
            squeeze=False, sharey=True,
        )  # fmt: skip
        for axes, panel in zip(grid[0], panels, strict=True):
            table = np.full((len(shardings), len(steps)), np.nan)
            for row, sharding in enumerate(shardings):
                for column, local_steps in enumerate(steps):
                    point = means.get((panel, sharding, local_steps))
                    if point is None or not point.n:
                        axes.text(column, row, "not run", ha="center", va="center", fontsize=7)
                        continue
                    table[row, column] = point.mean
                    light = point.mean < (low + high) / 2
                    text = f"{point.mean:.1f}" + (f" ± {point.sd:.1f}" if point.n > 1 else "")
                    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="w" if light else "k")
            image = axes.imshow(table, vmin=low, vmax=high, cmap="cividis", aspect="auto")
            axes.set_xticks(range(len(steps)), [str(each) for each in steps])
            axes.set_yticks(range(len(shardings)), shardings)
            axes.set_xlabel("local steps J")
            axes.set_title(panel, fontsize=9)
        figure.colorbar(image, ax=list(grid[0]), label="test accuracy (%)")
        return save_figure(figure, output)


def plot_drift(members: Sequence[Member], output: Path) -> list[Path]:
    """‖τ_k‖ and the pairwise cosine of task vectors, means over all rounds, against sharding; a line per J and mask.

    Nothing unless shardings differ and cosines were logged.
    """
    members = _federated(members)
    shardings, steps, panels = _axes_of(members)
    if (
        len(shardings) < 2
        or _collide(members)
        or not any(each.over_runs(mean_of("client_cosine")).n for each in members)
    ):
        return []
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, grid = pyplot.subplots(1, 2, figsize=(7.2, 3.1), layout="constrained")
        measures = (("client_update_norm", "‖τ$_k$‖, mean over clients"), ("client_cosine", "cosine between clients"))
        for axes, (column, name) in zip(grid, measures, strict=True):
            for number, panel in enumerate(panels):
                for index, local_steps in enumerate(steps):
                    line = {
                        sharding_words(each.settings): each.over_runs(mean_of(column))
                        for each in members
                        if _panel(each) == panel and each.settings["local-steps"] == local_steps
                    }
                    places = [place for place, sharding in enumerate(shardings) if sharding in line]
                    points = [line[shardings[place]] for place in places]
                    axes.errorbar(
                        places,
                        [point.mean for point in points],
                        yerr=[point.sd if point.n > 1 else 0.0 for point in points],
                        color=COLOURS[index % len(COLOURS)],
                        linestyle=STYLES[number % len(STYLES)],
                        marker=MARKERS[index % len(MARKERS)],
                        markerfacecolor="none" if number else None,
                        markersize=4,
                        capsize=2,
                        linewidth=1.2,
                        label=f"{panel}, J = {local_steps}",
                    )
            axes.set_xticks(range(len(shardings)), shardings)
            axes.set_ylabel(name)
        grid[0].set_yscale("log")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(steps)), fontsize=8)
        return save_figure(figure, output)


def plot_sweep(members: Sequence[Member], key: str, output: Path) -> list[Path]:
    """Final test accuracy against a numeric setting, a line per sharding; nothing unless it differs under one rule."""
    lines: dict[str, dict[float, Member]] = {}
    drawn = [each for each in _federated(members)
             if each.settings["mask-rule"] == "least-sensitive" and _usual(each, members, key)]  # fmt: skip
    for member in drawn:
        lines.setdefault(sharding_words(member.settings), {})[float(member.settings[key])] = member
    if sum(map(len, lines.values())) < len(drawn):  # they differ in something else too, and would hide one another
        return []
    if max((len(line) for line in lines.values()), default=0) < 2:
        return []
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(figsize=(4.2, 3.0), layout="constrained")
        for index, (sharding, line) in enumerate(lines.items()):
            values = sorted(line)
            points = [line[value].over_runs(last_test_accuracy) for value in values]
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.errorbar(
                values,
                [point.mean for point in points],
                yerr=[point.sd if point.n > 1 else 0.0 for point in points],
                capsize=3,
                linewidth=1.3,
                markersize=4.5,
                linestyle=STYLES[index % len(STYLES)],
                label=sharding,
                **cast(Any, look),
            )
        axes.set_xscale("log")
        ticks = sorted({value for line in lines.values() for value in line})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(SWEPT[key])
        axes.set_ylabel("test accuracy (%)")
        axes.legend(fontsize=8)
        return save_figure(figure, output)


def _usual(member: Member, members: Sequence[Member], key: str) -> bool:
    """Whether `member` has the most common values of the other swept settings."""
    for other in SWEPT:
        values = [each.settings[other] for each in members if each.settings["mask-rule"] == "least-sensitive"]
        if other != key and member.settings[other] != max(values, key=values.count):
            return False
    return True


def _axes_of(members: Sequence[Member]) -> tuple[list[str], list[int], list[str]]:
    """Shardings (from few classes per client to iid), local steps and panels of members."""

    def evenness(member: Member) -> tuple[int, float]:
        kind = str(member.settings["sharding"])
        by = {"classes": "classes-per-client", "dirichlet": "dirichlet-alpha"}
        return (2, 0.0) if kind == "iid" else (int(kind == "classes"), float(member.settings[by[kind]]))

    ordered = sorted(members, key=evenness)
    shardings = list(dict.fromkeys(sharding_words(each.settings) for each in ordered))
    steps = sorted({int(each.settings["local-steps"]) for each in members})
    return shardings, steps, list(dict.fromkeys(map(_panel, members)))


def _federated(members: Sequence[Member]) -> list[Member]:
    return [each for each in members if each.settings["strategy"] != "centralized"]


def _collide(members: Sequence[Member]) -> bool:
    """Whether two members differ in something that these figures have no place for, and would hide one another."""
    places = [(_panel(each), sharding_words(each.settings), each.settings["local-steps"]) for each in members]
    return len(set(places)) < len(places)


def _panel(member: Member) -> str:
    rule = member.settings["mask-rule"]
    return "all weights" if rule == "none" else f"{rule}, density {member.settings['density']:g}"


def _megabytes(member: Member) -> dict[int, float]:
    """10⁶ bytes sent and received until the end of each round, of the first run."""
    rows = member.runs[0]
    sent = accumulate((row.get("uplink_bytes") or 0) + (row.get("downlink_bytes") or 0) for row in rows)
    return {row["round"]: total / 1e6 for row, total in zip(rows, sent, strict=True)}


def _style(index: int) -> str:
    """No two of len(COLOURS) * len(STYLES) lines have the same colour and style, and neighbours differ in both."""
    turn, colour = divmod(index, len(COLOURS))
    return STYLES[(colour + turn) % len(STYLES)]


def _band(axes: Axes, points: Sequence[tuple[float, Any]], look: Mapping[str, Any], label: str) -> None:
    if not points:
        return
    where = [place for place, _ in points]
    mean = np.array([point.mean for _, point in points])
    axes.plot(where, mean, linewidth=1.3, label=label, **cast(Any, look))
    if look is not GREY and all(point.n > 1 for _, point in points):
        spread = np.array([point.sd for _, point in points])
        axes.fill_between(where, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)
