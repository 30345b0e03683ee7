"""Try every fault, count what came of it, and write the table results/reliability/README.md.

    python tests/trials/reliability.py                      # all of it: about 10 minutes on two cores
    python tests/trials/reliability.py --quick              # a short form of all of it: 2 minutes
    python tests/trials/reliability.py --part damage        # one part; the others' counts stay as they were
    python tests/trials/reliability.py --part kills --cases "fedbn, random" "scaffold, random"

Counts are kept in trials.json beside the table, by row, so that parts add up to one table. Exit status 1 if anything
was lost in any row of it.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))  # shared fixtures

import bad_inputs
import damage
import fuzz
import kill
import malice
import writing
from client_faults import client_faults
from trials import Tally

from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.paths import results_root

Row = dict[str, object]
Rows = Iterator[tuple[str, Tally]]  # (group, tally) of each row as it is done


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many trials of each kind."""

    kills: int = 3  # of each case
    damages: int = 400  # of each kind of file
    writes: int | None = None  # None: every one
    limits: int = 10
    disks: int = 10
    configurations: int = 3000  # of each of three forms
    runs: int = 60
    inputs: int = 1000  # of each kind of bad_inputs


QUICK = Sizes(kills=1, damages=40, writes=4, limits=2, disks=3, configurations=300, runs=8, inputs=60)


def kills(sizes: Sizes, seed: int, cases: list[str], quick: bool) -> Rows:
    """A row per case."""
    for case in cases or (kill.SHORT if quick else kill.CASES):
        tally = Tally(f"SIGKILL: {case}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = kill.kill_and_compare(case, sizes.kills, Path(folder), seed)
            except Exception as error:
                tally.lose(f"{type(error).__name__}: {error}")
            else:
                for number in range(outcome.kills):
                    tally.settle("continued to the same bits", outcome.differences, f"kill {number}")
        yield "kills", tally
    with tempfile.TemporaryDirectory() as folder:
        for instant in () if cases else kill.INSTANTS:
            tally = Tally(f"SIGKILL {instant}")
            tally.settle("completed to the same bits", kill.differences_after_kill_at(instant, Path(folder)), instant)
            yield "kills", tally


def damages(sizes: Sizes, seed: int) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        yield from (("damage", tally) for tally in damage.all_kinds(Path(folder), sizes.damages, seed))


def writes(sizes: Sizes, seed: int) -> Rows:
    tries: list[Callable[..., Tally]] = [
        lambda config: writing.fault_at_every_write(config, sizes.writes),
        lambda config: writing.limited_files(config, sizes.limits, seed),
        lambda config: writing.small_disks(config, sizes.disks, seed),
        writing.read_only_folders,
    ]
    for each in tries:
        with tempfile.TemporaryDirectory() as folder:
            yield "writing", each(dataclasses.replace(damage.TINY, results_dir=folder))


def configurations(sizes: Sizes, seed: int) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        yield from (("configuration", tally) for tally in fuzz.fuzz(sizes.configurations, Path(folder), seed))
        yield "configuration", fuzz.accepted_ones_run(sizes.runs, Path(folder), seed)


def inputs(sizes: Sizes, seed: int) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        yield from (("inputs", tally) for tally in bad_inputs.bad_inputs(sizes.inputs, Path(folder), seed))


def malicious(sizes: Sizes, seed: int) -> Rows:
    for each in (malice.malicious_files, malice.run_names):
        with tempfile.TemporaryDirectory() as folder:
            yield "malice", each(Path(folder))


def clients(sizes: Sizes, seed: int) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        yield from (("clients", tally) for tally in client_faults(Path(folder)))


PARTS: dict[str, Callable[..., Rows]] = {
    "kills": kills,
    "damage": damages,
    "writing": writes,
    "configuration": configurations,
    "inputs": inputs,
    "malice": malicious,
    "clients": clients,
}
TITLES = {
    "kills": "Runs killed at random instants",
    "damage": "Files damaged at random positions",
    "writing": "Writes that fail",
    "configuration": "Configurations drawn at random",
    "inputs": "Inputs drawn at random",
    "malice": "Code and paths in what is read",
    "clients": "Clients at fault",
}


def describe(rows: dict[str, Row]) -> str:
    """The table, by part."""
    lines = [
        "# Reliability",
        "",
        "Written by `python tests/trials/reliability.py`, which tried what it counts. A trial is lost where a number "
        "differs from the run without the fault, where code from a file was run, or where an error is a traceback in "
        "place of words that name the key, file or client.",
    ]
    for part, title in TITLES.items():
        mine = {fault: row for fault, row in rows.items() if row["part"] == part}
        if not mine:
            continue
        total, lost = (sum(int(str(row[column])) for row in mine.values()) for column in ("trials", "lost"))
        lines += ["", f"## {title}", "", "| fault | trials | outcome | lost |", "|---|---|---|---|"]
        for fault, row in mine.items():
            outcomes = row["outcomes"]
            assert isinstance(outcomes, dict)
            told = "; ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "not possible here"
            lines.append(f"| {fault} | {row['trials']} | {told} | {row['lost']} |")
        lines.append(f"| **together** | **{total}** | | **{lost}** |")
    machines = {f"{row['processor']}, Python {row['python']}, torch {row['torch']}" for row in rows.values()}
    return "\n".join([*lines, "", "On " + "; ".join(sorted(machines)) + ".", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials of each")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=kill.CASES, default=[], metavar="CASE", help="of the part kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder (default: reliability in the results of the checkout)")
    parsed = parser.parse_args()
    output = parsed.output or results_root("") / "reliability"
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "trials.json"
    rows: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    sizes = QUICK if parsed.quick else Sizes()
    logging.getLogger("fl_taskarith").addHandler(logging.NullHandler())  # else every run of ours prints its rounds
    versions = environment()
    for part in parsed.part:
        more = (parsed.cases, parsed.quick) if part == "kills" else ()
        for group, tally, seconds in _timed(PARTS[part](sizes, parsed.seed, *more)):
            rows[tally.fault] = {
                "part": group, "trials": tally.trials, "lost": len(tally.lost), "outcomes": dict(tally.outcomes),
                "told": tally.lost[:5], "seed": parsed.seed, "seconds": round(seconds, 1),
                "processor": versions["machine"]["processor"], "python": versions["versions"]["python"],
                "torch": versions["versions"]["torch"], "commit": versions["git_commit"],
            }  # fmt: skip
            write_atomically(kept, json.dumps(rows, indent=1) + "\n")
            print(f"{tally.fault}: {dict(tally.outcomes)} ({seconds:.1f} s)", *tally.lost[:5], sep="\n  ", flush=True)
    write_atomically(output / "README.md", describe(rows))
    print(output / "README.md")
    return int(any(row["lost"] for row in rows.values()))


def _timed(rows: Rows) -> Iterator[tuple[str, Tally, float]]:
    """Each row with its seconds; what the runs in it print is left out."""
    while True:
        started = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            row = next(rows, None)
        if row is None:
            return
        yield *row, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
