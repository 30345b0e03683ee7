"""Figures over a set of runs: curves with a band over seeds, Nc against J, sweeps of a setting, clients' drift."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from fl_taskarith.errors import ConfigError
from fl_taskarith.study.plots import COLOURS, STYLE, STYLES, off_scale, save_figure
from fl_taskarith.study.run_set import Member, last_test_accuracy, mean_of, sharding_words

log = logging.getLogger("fl_taskarith")

SWEPT = {"density": "density (share of weights updated)", "calibration-rounds": "calibration rounds R"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = len(COLOURS) * len(STYLES)  # that can be told apart
TICKS = (1.0, 3.0)  # of a decade of bytes
LEGEND_COLUMNS = 4  # at most
LABEL_WIDTH = 0.06  # inches that a character of the legend takes, about


def plot_set(members: Sequence[Member], output: Path) -> list[Path]:
    """Every figure for which the members differ in the right settings; OUTPUT.png and .pdf, OUTPUT-heat-map.png, ...

    Raises:
        ConfigError: there is nothing to draw.
        CheckpointError: a figure cannot be written.
    """
    paths = []
    if len(members) <= LINES:
        paths += plot_bands(members, output)
        paths += plot_drift(members, output.with_name(f"{output.name}-drift"))
    paths += plot_heat_map(members, output.with_name(f"{output.name}-heat-map"))
    for key in SWEPT:
        paths += plot_sweep(members, key, output.with_name(f"{output.name}-{key}"))
    if len(members) > LINES:
        reason = f"{len(members)} different settings, and no more than {LINES} lines can be told apart"
        if not paths:
            raise ConfigError(f"{output} would show {reason}. Name the folders of fewer runs.")
        log.warning("No curves of %s: %s.", output, reason)
    return paths


def plot_bands(members: Sequence[Member], output: Path) -> list[Path]:
    """Test accuracy and loss against rounds, accuracy against bytes if any were sent: means, and bands of one sd."""
    with pyplot.rc_context(cast(Any, STYLE)):
        sending = any(max(_megabytes(member).values(), default=0.0) > 0 for member in members)  # not without clients
        panels = 3 if sending else 2
        longest = max(len(member.label) for member in members)
        fitting = int(3.0 * panels / (0.6 + LABEL_WIDTH * longest))
        columns = max(1, min(LEGEND_COLUMNS, len(members), fitting))
        size = (3.0 * panels, 2.9 + 0.16 * -(-len(members) // columns))
        figure, (rounds, loss, *others) = pyplot.subplots(1, panels, figsize=size, layout="constrained")
        finals = {index: end.mean for index, member in enumerate(members)
                  if (end := member.over_runs(last_test_accuracy)).n}  # fmt: skip
        lost = {list(finals)[place] for place in off_scale(list(finals.values()))}
        for index in sorted(range(len(members)), key=lambda index: index in lost):  # then axes hold still
            member, label = members[index], members[index].label
            if index in lost:
                label += f" (ends at {finals[index]:.1f} %, off the scale)"
                for axes in (rounds, loss, *others):
                    axes.set_ylim(axes.get_ylim())
            look = {"color": COLOURS[index % len(COLOURS)], "linestyle": _style(index)}
            _band(rounds, member.curve("test_accuracy", 100.0), look, label)
            _band(loss, member.curve("test_loss"), look, label)
            sent = _megabytes(member)
            for traffic in others if max(sent.values(), default=0.0) > 0 else ():
                _band(
                    traffic, [(sent[number], point) for number, point in member.curve("test_accuracy", 100.0)], look, ""
                )
        epochs = {member.settings["strategy"] == "centralized" for member in members}
        for axes, name in ((rounds, "test accuracy (%)"), (loss, "test cross-entropy (nats)")):
            axes.set_xlabel({1: "epoch" if True in epochs else "round"}.get(len(epochs), "round or epoch"))
            axes.set_ylabel(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for traffic in others:
            traffic.set_xlabel("sent so far, both ways (MB)")
            traffic.set_ylabel("test accuracy (%)")
            sent_by_any = [sent for line in traffic.lines for sent in line.get_xdata()]
            if min(sent_by_any, default=0.0) > 0:
                traffic.set_xscale("log")
                traffic.xaxis.set_major_locator(LogLocator(subs=TICKS))
            else:  # nothing is sent in round 0 without a ridge head or a mask
                first = min((sent for sent in sent_by_any if sent > 0), default=1.0)
                traffic.set_xscale("symlog", linthresh=first, linscale=0.25)
                traffic.set_xlim(left=0)
                traffic.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=first, subs=TICKS))
            traffic.xaxis.set_major_formatter("{x:g}")
            traffic.xaxis.set_minor_formatter(NullFormatter())
        handles, labels = rounds.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
        return save_figure(figure, output)


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


def _band(axes: Axes, points: Sequence[tuple[float, Any]], look: dict[str, str], label: str) -> None:
    if not points:
        return
    where = [place for place, _ in points]
    mean = np.array([point.mean for _, point in points])
    axes.plot(where, mean, linewidth=1.3, label=label, **cast(Any, look))
    if all(point.n > 1 for _, point in points):
        spread = np.array([point.sd for _, point in points])
        axes.fill_between(where, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)
