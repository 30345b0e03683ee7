"""Write the pages of findings from their templates: every measured number in a sentence is computed from a CSV.

    python -m tests.docs.pages            # say which committed pages differ from their templates and CSVs
    python -m tests.docs.pages --write    # write them

A page PAGE.md below results/ has its template PAGE.md.j2 beside it. A template calls `study(...)`, `diff(...)` and the
other functions of this file, so that a number and the table it comes from cannot part. What no CSV holds (the duration
of a study, a figure from a profiler) is marked by `stated("...")`.
"""

import argparse
import functools
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas
from scipy import stats

from fl_taskarith.figures.markdown import bound
from fl_taskarith.figures.statistics import FEWEST, holm, paired, run_key
from fl_taskarith.report.read_results import MeasuredArm, read_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
WIDTH = 120  # characters of a line of text


class StudyTables:
    """The committed CSVs of one study; arms are named "GROUP: ARM"."""

    def __init__(self, folder: Path) -> None:
        """Read table.csv, runs.csv, curves.csv and, if it has one, search.csv of the study in `folder`."""
        self.folder = folder
        self.table = pandas.read_csv(folder / "table.csv")
        self.runs = pandas.read_csv(folder / "runs.csv")
        self.curves = pandas.read_csv(folder / "curves.csv")
        searched = folder / "search.csv"
        self.search = pandas.read_csv(searched) if searched.exists() else pandas.DataFrame()

    def __getitem__(self, key: str) -> pandas.Series:
        """Return the test accuracies in % of an arm's finished runs, by seed.

        Where the study has correct.csv, `attrs` holds the arm as reports read it, with the images that it has right.
        """
        values = self.column(key, "test_percent")
        group, arm = key.split(": ", 1) if ": " in key else ("", key)
        if (group, arm) in self.measured:
            values.attrs["arm"] = self.measured[group, arm]
        return values

    @functools.cached_property
    def measured(self) -> Mapping[tuple[str, str], MeasuredArm]:
        """The arms by group and name; none where it is not known which images they have right."""
        known = (self.folder / "correct.csv").exists()
        return {(arm.group, arm.label): arm for arm in read_study(self.folder).arms} if known else {}

    def column(self, key: str, name: str) -> pandas.Series:
        """Return a column of runs.csv for an arm's finished runs, by seed or by pair of seeds."""
        rows = self._rows(self.runs, key)
        rows = rows[rows["state"] == "done"]
        shards = rows["shard_seed"] if "shard_seed" in rows else rows["seed"]
        keys = map(run_key, rows["seed"], shards)
        return pandas.Series(dict(zip(keys, rows[name], strict=True)), dtype=float)

    def row(self, key: str) -> pandas.Series:
        """Return the arm's row of table.csv."""
        rows = self._rows(self.table, key)
        if len(rows) != 1:
            raise KeyError(f"{len(rows)} rows of table.csv are called {key!r}.")
        return rows.iloc[0]

    def gain(self, key: str, digits: int = 2, signed: bool = True) -> str:
        """Return the gain over the ridge head in points with its 95 % interval or, of two seeds, with both gains."""
        row = self.row(key)
        if np.isnan(row.gain_low):
            return diff(self[key], self.column(key, "ridge_test_percent"), digits, signed)
        return interval(row.gain_mean, row.gain_low, row.gain_high, digits, signed)

    def contrast(self, key: str, against: str, digits: int = 2) -> str:
        """Return a contrast of primary.csv in points, named before the runs, with its 95 % interval."""
        row = self._primary(key, against)
        return interval(row["mean"], row.low, row.high, digits, signed=True)

    def p(self, key: str, against: str) -> float:
        """Return the p value of a contrast of primary.csv, as Holm adjusts it."""
        return float(self._primary(key, against).p_holm)

    def _primary(self, key: str, against: str) -> pandas.Series:
        rows = self._rows(pandas.read_csv(self.folder / "primary.csv"), key)
        (row,) = [row for _, row in rows.iterrows() if f"{row.against_group}: {row.against}" == against]
        return row

    def rate(self, *keys: str) -> str:
        """Return the learning rate that all of these arms ran at."""
        (rate,) = {f"{self.row(key).learning_rate:g}" for key in keys}
        return rate

    def best_arm(self, group: str = "iid") -> str:
        """Return the name of the tuned arm of a group that validation ranks first, of those at J = 4 that train."""
        rows = self.table[(self.table.group == group) & ~self.table.edge.eq(True) & (self.table.learning_rate > 0)]
        rows = rows[rows.local_steps == 4] if "local_steps" in rows else rows
        return f"{group}: {rows.loc[rows.val_percent.idxmax()].arm}"

    def share(self, key: str, group: str = "iid", of: str = "") -> str:
        """Return the arm's gain over the ridge head as a share of that of the arm `of`, or the best one of `group`."""
        return f"{100 * self.row(key).gain_mean / self.row(of or self.best_arm(group)).gain_mean:.0f} %"

    def share_of_accuracy(self, key: str, group: str = "iid") -> str:
        """Return the arm's accuracy as a share of that of the best arm of `group`."""
        return f"{100 * self[key].mean() / self[self.best_arm(group)].mean():.1f} %"

    def counts(self, group: str = "", column: str = "gain", reference: str = "ridge head") -> Mapping[str, int]:
        """Return how many comparisons there are of a group, or of all: `all`, `sure` (intervals without 0), `holm`.

        Where all seeds differ by the same amount, no interval can be computed, and the comparison counts in `all` only.
        """
        rows = self.table[(self.table.arm != reference) & (self.table[f"{column}_n"] >= FEWEST)]
        rows = rows[rows.group == group] if group else rows
        mean, sd, n = (rows[f"{column}_{part}"] for part in ("mean", "sd", "n"))
        tested = sd > 1e-9
        p = 2 * stats.t.sf(np.abs(mean[tested]) / (sd[tested] / np.sqrt(n[tested])), n[tested] - 1)
        sure = (rows[f"{column}_low"] > 0) | (rows[f"{column}_high"] < 0)
        return {"all": len(rows), "sure": int((sure & tested).sum()), "holm": rejected(p)}

    def first(self, key: str, target: float) -> pandas.Series:
        """Return round and uplink_megabytes, since round 0, where the mean on validation first reaches `target`."""
        means = self._means(key, "val_percent")
        return means[means.val_percent >= target - 1e-9].iloc[0]

    def reached(self, key: str, target: float) -> str:
        """Write round and uplink, since round 0, where the mean validation accuracy first reaches `target` %."""
        means = self._means(key, "val_percent")
        there = means[means.val_percent >= target - 1e-9]
        if there.empty:
            return "not at all"
        return f"{there['round'].iloc[0]} rounds and {there.uplink_megabytes.iloc[0]:.0f} MB"

    def last(self, key: str) -> pandas.Series:
        """Return the last evaluated round's means over seeds: val_percent, uplink_megabytes since round 0."""
        return self._means(key, "val_percent").iloc[-1]

    def best(self, key: str) -> float:
        """Return the best mean over seeds of the validation accuracy in % at any evaluated round after round 0."""
        means = self._means(key, "val_percent")
        return float(means[means["round"] > 0].val_percent.max())

    def searched(self, key: str, rate: float, rounds: int) -> float:
        """Return the validation accuracy in % that the search measured for an arm at a rate after so many rounds."""
        rows = self._rows(self.search, key)
        (value,) = rows[(rows.learning_rate == rate) & (rows.rounds == rounds)].val_accuracy
        return 100 * float(value)

    def _means(self, key: str, column: str) -> pandas.DataFrame:
        """Return a column of curves.csv and uplink_megabytes, means over seeds, by round."""
        return self._rows(self.curves, key).groupby("round")[[column, "uplink_megabytes"]].mean().reset_index()

    def _rows(self, frame: pandas.DataFrame, key: str) -> pandas.DataFrame:
        group, arm = key.split(": ", 1) if ": " in key else ("", key)
        return frame[(frame.group == group) & (frame.arm == arm)]


def interval(mean: float, low: float, high: float, digits: int = 1, signed: bool = False) -> str:
    """Write a mean with its interval, for example "3.1 [2.2, 4.0]"."""
    sign = "+" if signed else ""
    middle = f"{round(mean, digits) + 0.0:{sign}.{digits}f}"  # no -0.0
    if low == high:
        return f"{middle} (all seeds alike)"
    return f"{middle} [{bound(low, digits, sign)}, {bound(high, digits, sign)}]"


def acc(values: pandas.Series, digits: int = 2) -> str:
    """Write mean ± sample standard deviation."""
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def diff(a: pandas.Series, b: pandas.Series, digits: int = 1, signed: bool = False) -> str:
    """Write the mean of a - b over common seeds with its paired 95 % interval or, of two seeds without one, both."""
    correct = [each.attrs["arm"].correct for each in (a, b) if "arm" in each.attrs]
    pairs = paired(dict(a), dict(b), *(correct if len(correct) == 2 else ()))
    if pairs.over:
        return interval(pairs.mean, pairs.low, pairs.high, digits, signed)
    whole, *each = (f"{value:{'+' if signed else ''}.{digits}f}" for value in (pairs.mean, *pairs.values))
    return f"{whole} ({' and '.join(each)} in the two seeds)" if len(each) == 2 else whole


def gap(a: pandas.Series, b: pandas.Series, digits: int = 1) -> str:
    """Write the mean of a - b over common seeds, without an interval."""
    common = [key for key in a.index if key in b.index]
    return f"{(a[common] - b[common]).mean():.{digits}f}"


def survivors(pairs: Sequence[tuple[pandas.Series, pandas.Series]]) -> int:
    """Return how many of the paired differences survive Holm's correction at 5 %."""
    return rejected([paired(dict(a), dict(b)).p for a, b in pairs])


def rejected(p: Sequence[float]) -> int:
    """Return how many of the p values Holm's step-down procedure rejects at 5 %."""
    return sum(value <= 0.05 for value in holm(p))


def stated(text: str) -> str:
    """Return the text: a number that no CSV holds."""
    return text


@functools.cache
def study(name: str) -> StudyTables:
    """Return the tables of the study results/NAME."""
    return StudyTables(RESULTS / name)


@functools.cache
def frame(name: str) -> pandas.DataFrame:
    """Return the CSV results/NAME."""
    return pandas.read_csv(RESULTS / name)


def select(name: str, **conditions: Any) -> pandas.DataFrame:
    """Return the rows of results/NAME that have these values, or one of a list of them."""
    rows = frame(name)
    for key, value in conditions.items():
        rows = rows[rows[key].isin(value) if isinstance(value, list) else rows[key] == value]
    if rows.empty:
        raise KeyError(f"No row of {name} has {conditions}.")
    return rows


def mean(name: str, column: str, **conditions: Any) -> float:
    """Return the mean of a column of results/NAME over the rows that have these values."""
    return float(select(name, **conditions)[column].mean())


def span(values: Any, digits: int = 0) -> str:
    """Write the smallest and the largest of several numbers, for example "12 to 18"."""
    return f"{np.min(values):.{digits}f} to {np.max(values):.{digits}f}"


def log_fit(x: Any, y: Any) -> Mapping[str, float]:
    """Return `slope` of log y on log x, and the `factor` between y and x at slope 1."""
    x, y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    return {"slope": float(stats.linregress(x, y).slope), "factor": float(np.exp((y - x).mean()))}


@functools.cache
def record(name: str) -> Any:
    """Return the JSON file results/NAME."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def templates() -> list[Path]:
    """Return all templates of pages."""
    return sorted(RESULTS.rglob("*.md.j2"))


def render(template: Path) -> str:
    """Return the page that a template and the committed CSVs give."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    functions = (acc, diff, gap, interval, study, frame, record, mean, select, span, log_fit, stated, survivors)
    environment.globals.update({each.__name__: each for each in functions}, np=np)
    return reflow(environment.from_string(template.read_text(encoding="utf-8")).render())


def reflow(text: str) -> str:
    """Break paragraphs and list items anew at WIDTH characters; tables, code, headings and figures stay as they are."""
    lines: list[str] = []
    code = False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        words = bool(line.strip()) and not code and not line.lstrip().startswith(("|", "#", "![", "<!--", "```"))
        if words and not line.startswith("- ") and lines and lines[-1].startswith("\0"):
            lines[-1] += " " + line.strip()
        else:
            lines.append(("\0" if words else "") + line)
    return "\n".join(_wrapped(line[1:]) if line.startswith("\0") else line for line in lines) + "\n"


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    words = re.sub(r"(?<=\w) ([=±]) (?=\S)", "\0\\1\0", " ".join(line.split()))  # "Nc = 1" stays on one line
    words = re.sub(r"(?<=\d) %", "\0%", words)
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ).replace("\0", " ")


def insert_findings(report: Path, findings: str) -> None:
    """Replace the section of findings in the report of a study on regression data, as writing its report would."""
    before, after = report.read_text(encoding="utf-8").split("## What it shows\n\n")
    after = after[after.index("\n\n## ") :]
    report.write_text(f"{before}## What it shows\n\n{findings.strip()}{after}", encoding="utf-8")


def main(words: Sequence[str]) -> int:
    """Write or check all pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages")
    write = parser.parse_args(words).write
    stale = 0
    for template in templates():
        page, text = template.with_suffix(""), render(template)
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(("written: " if write else "differs: ") + str(page.relative_to(ROOT)))
        if write:
            page.write_text(text, encoding="utf-8")
            if page.name == "findings.md":
                insert_findings(page.with_name("README.md"), text)
    if not stale:
        print("All pages say what the tables say.")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
