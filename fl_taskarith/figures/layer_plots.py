"""How many clients share an input direction, layer by layer: where a round sums task vectors and where it averages."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fl_taskarith.config.settings import from_mapping
from fl_taskarith.figures.panels import Row, draw_bars, runs_note, spread
from fl_taskarith.figures.plots import draw_rows, line_look, save_figure
from fl_taskarith.figures.run_groups import Member
from fl_taskarith.figures.statistics import Summary, summarise

KINDS = {
    **{"attn.qkv": "queries, keys, values", "attn.proj": "attention output"},
    **{"mlp.fc1": "MLP, first", "mlp.fc2": "MLP, second"},
}
BLOCK = re.compile(r"blocks\.(\d+)\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight")


def plot_overlap(members: Sequence[Member], output: Path) -> list[Path]:
    """Draw the effective number of clients that share an input direction against depth, a panel per kind of layer.

    Points are means over rounds, and over runs with their spread. Nothing is drawn unless `strategy = "covariance"`
    measured it.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    lines = {member.label: points for member in members if (points := _points(member))}
    if not lines:
        return []
    labels = list(lines)
    heard = {member.label: from_mapping(member.settings).sampled_clients for member in members}

    def draw(row: Row, panels: Sequence[Axes]) -> None:
        for axes, (kind, words) in zip(panels, KINDS.items(), strict=True):
            for turn, place in enumerate(row.places):
                if found := lines[labels[place]].get(kind, {}):
                    look = {**line_look(turn), "label": labels[place]}
                    draw_bars(axes, list(found), list(found.values()), (1.0, heard[labels[place]]), **look)
            axes.set_ylim(0.5, max(heard[label] for label in labels) + 0.5)  # of all panels: heights compare
            axes.set_title(words, fontsize=9)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("clients that share a direction\n(1: updates are summed)")

    note = runs_note((member for member in members if member.label in lines), "bars")
    return save_figure(draw_rows(spread(len(labels)), labels, draw, (len(KINDS), 2.1, 2.4), note), output)


def _points(member: Member) -> dict[str, dict[float, Summary]]:
    """Return, by kind of layer and block, the overlap over the member's runs."""
    values: dict[str, dict[float, list[float]]] = {}
    for record in member.records:
        for name, value in ((record.get("layers") or {}).get("overlap") or {}).items():
            if (found := BLOCK.fullmatch(name)) and value is not None:
                values.setdefault(found[2], {}).setdefault(float(found[1]), []).append(float(value))
    return {kind: {block: summarise(each) for block, each in sorted(blocks.items())} for kind, blocks in values.items()}
