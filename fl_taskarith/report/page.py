"""One web page of everything in a results folder: needs no server, no internet, and no other file."""

import contextlib
import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas

from fl_taskarith.describe.runs_at_hand import results
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.statistics import seed_words
from fl_taskarith.report.read_results import REMEDY, StudyFolder, read_studies
from fl_taskarith.storage.files import make_folder, require_new, write_atomically
from fl_taskarith.storage.record_files import COUNT, read_csv, read_json

try:
    from bokeh.embed import file_html
    from bokeh.layouts import column, row
    from bokeh.models.layouts import TabPanel, Tabs
    from bokeh.models.widgets import Div
    from bokeh.resources import INLINE

    from fl_taskarith.report.page_parts import (
        COMPARED,
        NUMBER,
        TRIED,
        WIDTH,
        accuracies,
        comparison,
        curves,
        heat_map,
        mask_anatomy,
        searches,
        table,
    )
except ImportError as missing:
    raise ConfigError('Bokeh, which draws the page, is not installed: pip install "fl-taskarith[html]".') from missing

PAGE = "index.html"
OURS = '<meta name="generator" content="fl-taskarith">'  # in a page that may be written anew
SUMMARY = {"density?": float, "density_by_kind?": {str: float}, "density_by_layer?": {str: float}}  # of a mask


def write_page(root: Path, output: Path, overwrite: bool = True) -> Path:
    """Write index.html in the folder `output`: tables, curves, maps, searches, masks, settings and provenance.

    A page that another program wrote there is never replaced.

    Args:
        root: the folder of one study, or of several, or of runs.
        output: is made where it is missing.
        overwrite: whether an index.html in it may be replaced.

    Raises:
        ConfigError: a file would be lost.
        CheckpointError: there are no results in `root`, or they are damaged.
    """
    require_new([output / PAGE], overwrite)
    with contextlib.suppress(OSError):
        if OURS not in (output / PAGE).read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(f"{output / PAGE} was not written by fl-taskarith report: move it, or choose --output.")
    panels = [TabPanel(child=column(*parts), title=title) for title, parts in _tabs(root)]
    if not panels:
        raise CheckpointError(f"{root} holds no results: expected a run, or table.csv of a study, in it or below it.")
    make_folder(output)
    title = f"Results in {root.resolve().name}"
    page = file_html(Tabs(tabs=panels), INLINE, title=title)
    write_atomically(output / PAGE, page.replace("<head>", f"<head>\n    {OURS}", 1))
    return output / PAGE


def _tabs(root: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield the title and the parts of every tab that has any."""
    try:
        studies = read_studies(root)
    except CheckpointError:
        if any(root.rglob("table.csv")):
            raise
        studies = []
    for study in studies:
        yield study.name, list(_of_study(study))
    if runs := list(_of_runs(root)):
        yield "runs", runs
    if masks := list(_of_masks(root)):
        yield "masks", masks


def _of_study(study: StudyFolder) -> Iterator[Any]:
    rows = _csv(study.folder / "table.csv", COMPARED)
    title = study.record.get("title", study.name)
    seeds = ", ".join(map(str, study.record["seeds"]))
    yield _text(
        f"<h2>{html.escape(str(title))}</h2><p>Seeds: {html.escape(seeds)}. Test accuracy is of the last round; "
        "learning rates are chosen on validation. A click on the head of a column sorts.</p>"
    )
    yield table(comparison(rows), "comparison")
    if maps := heat_map(study.arms):
        yield _text("<h3>Mean test accuracy (%) by data and local steps</h3>")
        yield row(*maps)
    groups = rows["group"].fillna("").tolist()
    for group in dict.fromkeys(groups):
        arms = [arm for arm, name in zip(study.arms, groups, strict=True) if name == group]
        if any(arm.test for arm in arms):
            yield accuracies(arms, group)
            if (lines := curves(arms, group)) is not None:
                yield lines
            for arm in arms:
                if lost := arm.below_the_head:
                    ends = ", ".join(f"{seed_words(key)} at {arm.test[key]:.2f} %" for key in lost)
                    yield _text(f"<p>{html.escape(arm.label)}: {ends} ended below the head it began with.</p>")
    if (study.folder / "search.csv").exists():
        tried = _csv(study.folder / "search.csv", TRIED).fillna({"group": ""})
        yield from filter(None, (searches(lines, group) for group, lines in tried.groupby("group", sort=False)))
    yield from _settings(study)
    yield _text(
        f"<h3>Provenance</h3><p>Machines: {html.escape('; '.join(study.record['machines']) or 'not recorded')}.</p>"
    )
    yield table(
        _csv(study.folder / "runs.csv", {}).drop(columns=["mask_rule", "strategy", "sharding"], errors="ignore"), "runs"
    )


def _settings(study: StudyFolder) -> Iterator[Any]:
    """Yield the settings in which arms differ, by arm, and those that all share."""
    frame = pandas.DataFrame([dict(arm.settings) for arm in study.arms]).astype(str)
    varied = [key for key in frame if frame[key].nunique() > 1]
    frame.insert(0, "arm", [arm.label for arm in study.arms])
    if varied:
        yield _text("<h3>Settings that differ</h3>")
        yield table(frame[["arm", *varied]], "varied-settings")
    yield _text("<h3>Settings of all arms</h3>")
    shared = [(key, frame[key].iloc[0]) for key in frame.columns[1:] if key not in varied]
    yield table(pandas.DataFrame(shared, columns=["setting", "value"]), "shared-settings")


def _of_runs(root: Path) -> Iterator[Any]:
    frame = results(str(root.resolve()))
    if not frame.empty:
        yield _text("<h2>Runs</h2>")
        yield table(frame.dropna(axis="columns", how="all"), "runs")


def _of_masks(root: Path) -> Iterator[Any]:
    for path in sorted(root.rglob("summary.json")):
        if (found := mask_anatomy(read_json(path, SUMMARY, REMEDY), path.parent.name)) is not None:
            yield found


def _csv(path: Path, columns: Mapping[str, Any]) -> pandas.DataFrame:
    """Return a table by its columns; those without a shape in `columns` hold text."""
    frame = pandas.DataFrame(read_csv(path, columns, REMEDY))
    if frame.empty:
        return pandas.DataFrame(columns=list(columns))
    return frame.astype({name: float for name, shape in columns.items() if shape in (NUMBER, float, COUNT)})


def _text(markup: str) -> Div:
    return Div(text=markup, width=WIDTH)
