"""Kill runs at random instants, resume them, and compare with runs that nobody killed.

    python tests/kill.py --kills 20          # federated, masked and centralized, 20 SIGKILLs each

Exit status 0 if every resumed run ended with the same rows (timing columns apart) and the same weights, bit for bit.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import final_weights, numbers, same_bits

from fl_taskarith.cli import main as command
from fl_taskarith.logbook import TIMING_COLUMNS, read_rounds

ROUNDS_PER_KILL = 3  # a life lasts up to one and a half rounds beyond the start, so all kills fit into one run
COMMON = ["checkpoint-every=1", "evaluate-every=1", "threads=1"]
RUNS = {
    "federated": ["num-clients=10", "participation=0.4", "mask-rule=none", *COMMON],
    "masked": ["num-clients=10", "participation=0.4", "mask-rule=least-sensitive", *COMMON],
    "centralized": [
        "strategy=centralized",
        "train-subset=400",
        "schedule=plateau",
        "mask-rule=none",
        *COMMON,
    ],
}


@dataclass(frozen=True)
class Outcome:
    """Of one run: kills that hit it alive, rounds completed before each kill, and whether it ended identical."""

    kind: str
    kills: int
    rounds_at_kill: list[int]
    same_rows: bool
    same_weights: bool

    @property
    def identical(self) -> bool:
        return self.same_rows and self.same_weights


def kill_and_compare(kind: str, kills: int, folder: Path, seed: int = 0) -> Outcome:
    """Run `kind` undisturbed, then again under `kills` SIGKILLs at random instants, in `folder`.

    A fork server that has torch imported starts the processes, so that a kill hits the run rather than its imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fl_taskarith.simulation", "fl_taskarith.study.plots"])

    def start(name: str) -> multiprocessing.process.BaseProcess:
        rounds = f"num-rounds={ROUNDS_PER_KILL * kills}"
        words = ["simulate", *RUNS[kind], rounds, f"results-dir={folder}", f"run-name={name}"]
        process = context.Process(target=_run, args=(words,))
        process.start()
        return process

    undisturbed = start("undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    duration = sum(row[name] or 0.0 for row in read_rounds(folder / "undisturbed") for name in TIMING_COLUMNS)

    # Kill number i strikes after a round drawn at random, in order, and after a random part of the next one.
    instants = random.Random(seed)
    rows = read_rounds(folder / "undisturbed")
    moments = sorted(instants.randint(-1, len(rows) - 3) for _ in range(kills))
    rounds_at_kill: list[int] = []
    for moment in moments:
        process = start("killed")
        _wait_until(process, folder / "killed", moment)
        process.join(instants.uniform(0.0, 1.5 * duration / len(rows)))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break  # it finished before this kill
        rounds_at_kill.append(_rounds_done(folder / "killed"))
    if json.loads((folder / "killed" / "run.json").read_text())["status"] != "finished":
        last = start("killed")
        last.join()
        assert last.exitcode == 0
    assert not (folder / "killed-2").exists(), "a killed run was begun anew instead of being continued"

    return Outcome(
        kind,
        len(rounds_at_kill),
        rounds_at_kill,
        numbers(folder / "undisturbed") == numbers(folder / "killed"),
        same_bits(final_weights(folder / "undisturbed"), final_weights(folder / "killed")),
    )


def _run(words: list[str]) -> None:
    sys.stdout = open("/dev/null", "w")
    sys.exit(command(words))


def _wait_until(process: multiprocessing.process.BaseProcess, folder: Path, server_round: int) -> None:
    """Until the run is alive, which it shows by writing its run.json anew, and past a round; or until it ends."""

    def written() -> int:
        try:
            return (folder / "run.json").stat().st_mtime_ns
        except OSError:
            return 0

    before = written()
    while process.is_alive() and (written() == before or _rounds_done(folder) < server_round):
        time.sleep(0.005)


def _rounds_done(folder: Path) -> int:
    """The last round in rounds.csv; -1 before round 0."""
    try:
        return (folder / "rounds.csv").read_text().count("\n") - 2
    except OSError:
        return -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    failed = False
    for kind in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = kill_and_compare(kind, parsed.kills, Path(folder), parsed.seed)
        failed |= not outcome.identical or outcome.kills < parsed.kills
        print(
            f"{kind}: {outcome.kills} kills after rounds {outcome.rounds_at_kill}; rows identical: "
            f"{outcome.same_rows}; weights identical: {outcome.same_weights}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
