"""Kill runs at random instants, resume them, and compare with runs that nobody killed.

    python tests/trials/kill.py --kills 3           # every strategy under both kinds of mask, 3 SIGKILLs each
    python tests/trials/kill.py --kills 20 --cases "fedavg, all weights" "scaffold, random"

Exit status 0 if every resumed run ended with the same rows (timing columns apart), weights, mask, clients' accuracies,
last checkpoint and clients' states, bit for bit.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import numbers, same_bits
from safetensors.torch import load_file

from fl_taskarith.cli.command import main as command
from fl_taskarith.config.effects import idle_reason
from fl_taskarith.config.fields import STRATEGIES
from fl_taskarith.config.settings import from_mapping, parse_overrides
from fl_taskarith.masking.mask import load_mask
from fl_taskarith.storage.checkpoint import load_latest_checkpoint
from fl_taskarith.storage.client_files import read_client_state
from fl_taskarith.storage.run_folder import TIMING_COLUMNS, read_rounds

ROUNDS_PER_KILL = 3  # a life lasts up to one and a half rounds beyond the start, so all kills fit into one run
TINY = [
    *("num-clients=8", "participation=0.5", "classes-per-client=5", "local-steps=1", "batch-size=8"),
    *("train-subset=400", "validation-size=60", "test-subset=60"),
    *("learning-rate=0.01", "calibration-size=20", "calibration-rounds=2", "calibration-per-client=4"),
    *("checkpoint-every=1", "evaluate-every=1", "threads=1"),
]
ON_REGRESSION = [
    *("dataset=linear-regression", "mask-rule=none", "num-clients=200", "participation=1.0", "checkpoint-every=1"),
    *("tolerance=0.0", "threads=1", "learning-rate=0.1"),
]
DENSE = ["mask-rule=none"]
BY_SERVER = ["mask-rule=least-sensitive"]
BY_CLIENTS = [*BY_SERVER, "mask-source=clients"]
SETTINGS = {  # what some strategies need, or need for their state to matter
    "fedprox": ["proximal-mu=0.1"],
    "fednova": ["local-steps-min=1", "local-steps-max=3"],
    "cclip": ["clipping-start=previous"],
    "br-ifca": ["num-clusters=2", "client-groups=half-turn"],
    "gram-anchored": ["gram-anchor=0.1"],
    "centralized": ["schedule=plateau"],
}


def _cases() -> dict[str, list[str]]:
    """Settings by name: every strategy under a mask that is scored by data and one that is not, and some without."""
    cases = {}
    on_images = [name for name in (*STRATEGIES, "centralized") if name != "fed-em"]
    scored = {"least-sensitive by server": BY_SERVER, "least-sensitive by clients": BY_CLIENTS}
    for strategy in on_images:
        number = 0 if strategy == "centralized" else len(strategy)  # its own, whichever others there are
        source, rule = list(scored)[number % 2], ("random", "lowest-magnitude")[number // 2 % 2]
        for mask, words in ((source, scored[source]), (rule, [f"mask-rule={rule}"])):
            cases[f"{strategy}, {mask}"] = words
    cases |= {f"{strategy}, all weights": DENSE for strategy in ("fedavg", "scaffold", "fedbn", "centralized")}
    cases["fedavg, least-sensitive by each client"] = [*BY_SERVER, "mask-source=own"]
    cases["fedavg, bank, refreshed head, random"] = [
        *("mask-rule=random", "task-vector-bank=bfloat16", "bank-decay=0.9", "sampling=cyclic", "ridge-refresh=2"),
    ]
    cases = {name: [f"strategy={name.partition(',')[0]}", *SETTINGS.get(name.partition(",")[0], []), *TINY,
                    "draw-curves=false", *words] for name, words in cases.items()}  # fmt: skip
    cases["fedavg, head rounds, random"] = [
        *TINY, "head=linear", "head-rounds=3", "mask-rule=random", "draw-curves=true",
    ]  # fmt: skip
    for strategy in ("fed-em", "br-ifca"):
        cases[f"{strategy}, regression"] = [f"strategy={strategy}", *ON_REGRESSION, "draw-curves=false"]
    return {name: _with_effect(words) for name, words in cases.items()}


def _with_effect(words: list[str]) -> list[str]:
    """Without those that the others leave without an effect, which the command line refuses."""
    config = from_mapping(parse_overrides(words))
    return [word for word in words if idle_reason(config, word.partition("=")[0]) is None]


CASES = _cases()
SHORT = ("fedavg, all weights", "scaffold, least-sensitive by server", "fedbn, random", "centralized, all weights")


@dataclass(frozen=True)
class Outcome:
    """Of one run: kills that hit it alive, rounds completed before each, and what ended otherwise than undisturbed."""

    case: str
    kills: int
    rounds_at_kill: list[int]
    differences: list[str]


def kill_and_compare(case: str, kills: int, folder: Path, seed: int = 0) -> Outcome:
    """Run `case` undisturbed, then again under `kills` SIGKILLs at random instants, in `folder`.

    A fork server that has torch imported starts the processes, so that a kill hits the run rather than its imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fl_taskarith.server.simulate", "fl_taskarith.figures.plots", "sklearn.datasets"])

    def start(name: str) -> multiprocessing.process.BaseProcess:
        rounds = f"num-rounds={ROUNDS_PER_KILL * kills}"
        words = ["simulate", *CASES[case], rounds, f"results-dir={folder}", f"run-name={name}"]
        process = context.Process(target=_run, args=(words,))
        process.start()
        return process

    def finish(name: str) -> None:
        process = start(name)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{case}: the run {name} ended with status {process.exitcode}")

    finish("undisturbed")
    rows = read_rounds(folder / "undisturbed")
    duration = sum(row[name] or 0.0 for row in rows for name in TIMING_COLUMNS)

    # Kill number i strikes after a round drawn at random, in order, and after a random part of the next one.
    instants = random.Random(f"{seed} {case}")
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
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"{case}: the killed run ended with status {process.exitcode} of itself")
        rounds_at_kill.append(_rounds_done(folder / "killed"))
    if json.loads((folder / "killed" / "run.json").read_text())["status"] != "finished":
        finish("killed")
    if (folder / "killed-2").exists():
        raise RuntimeError(f"{case}: a killed run was begun anew instead of being continued")
    return Outcome(case, len(rounds_at_kill), rounds_at_kill, differences(folder / "undisturbed", folder / "killed"))


INSTANTS = {  # in words: the function before whose call number so many the process is killed
    "before the mask of round 0 is written": ("fl_taskarith.server.run.save_mask", 1),
    "between mask and first checkpoint": ("fl_taskarith.storage.run_folder.save_checkpoint", 1),
    "between row and checkpoint of round 1": ("fl_taskarith.storage.run_folder.save_checkpoint", 2),
    "before the model is written": ("fl_taskarith.server.run.export_model", 1),
    "between the best model and the last": ("fl_taskarith.server.run.export_model", 2),
    "between model and run.json": ("fl_taskarith.storage.run_folder.now", 1),
    "between run.json and SHA256SUMS": ("fl_taskarith.storage.run_folder.write_checksums", 1),
}


def differences_after_kill_at(instant: str, folder: Path) -> list[str]:
    """What a run that was killed at `instant` and then started again does not have as an undisturbed one has it.

    The undisturbed one in `folder` serves all instants.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fl_taskarith.server.simulate", "fl_taskarith.figures.plots", "sklearn.datasets"])
    words = ["simulate", *CASES["fedbn, random"], "num-rounds=3", f"results-dir={folder}"]
    killed = f"killed-{'-'.join(instant.split())}"
    lives = [] if (folder / "undisturbed").exists() else [("undisturbed", ("", 0))]
    for name, place in [*lives, (killed, INSTANTS[instant]), (killed, ("", 0))]:
        process = context.Process(target=_run_until, args=([*words, f"run-name={name}"], *place))
        process.start()
        process.join()
        if process.exitcode != (-signal.SIGKILL if place[0] else 0):
            return [f"the run {name} ended with status {process.exitcode}"]
    begun_anew = ["a folder of its own"] if (folder / f"{killed}-2").exists() else []
    return begun_anew + differences(folder / "undisturbed", folder / killed)


def _run_until(words: list[str], function: str, call: int) -> None:
    """Run a command; the process is killed before the call number `call` of `function`, if one is named."""
    if function:
        module, _, name = function.rpartition(".")
        original, calls = getattr(importlib.import_module(module), name), []

        def counted(*given: object, **named: object) -> object:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        setattr(importlib.import_module(module), name, counted)
    _run(words)


def differences(whole: Path, other: Path) -> list[str]:
    """What two finished runs do not have alike, bit for bit; the timing columns are theirs."""
    different = []
    if numbers(whole) != numbers(other):
        different.append("rounds.csv")
    models = [sorted(path.name for path in folder.glob("model*.safetensors")) for folder in (whole, other)]
    if models[0] != models[1] or not models[0]:
        different.append("names of models")
    for name in set(models[0]) & set(models[1]):  # several of them where clients are in clusters
        if not same_bits(load_file(whole / name), load_file(other / name)):
            different.append(f"weights in {name}")
    if any((folder / "mask.safetensors").exists() for folder in (whole, other)):
        (mask, facts), (other_mask, other_facts) = (load_mask(folder / "mask.safetensors") for folder in (whole, other))
        if facts != other_facts or not same_bits(mask.tensors, other_mask.tensors):
            different.append("mask")
    tables = [folder / "clients.csv" for folder in (whole, other)]
    if any(table.exists() for table in tables) and tables[0].read_bytes() != tables[1].read_bytes():
        different.append("clients.csv")
    frozen = [{path.name for path in (folder / "client-states").glob("*.safetensors")} for folder in (whole, other)]
    if frozen[0] != frozen[1]:
        different.append("the frozen head and mask of clients")
    return different + _differences_of_checkpoints(whole, other)


def _differences_of_checkpoints(whole: Path, other: Path) -> list[str]:
    """Of the last ones, and of the clients' states that they refer to, by names that carry checksums."""
    one, two = (load_latest_checkpoint(folder / "checkpoints") for folder in (whole, other))
    assert one is not None and two is not None
    different = [f"{group} of the checkpoint" for group in ("trained", "frozen", "strategy_state")
                 if not same_bits(getattr(one, group), getattr(two, group))]  # fmt: skip
    if (one.round, one.client_states) != (two.round, two.client_states):
        different.append("names of clients' states")
    for partition, name in two.client_states.items():
        read_client_state(other / "client-states", partition, name)  # an error if it is not what its name says
    return different


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
        time.sleep(0.002)


def _rounds_done(folder: Path) -> int:
    """The last round in rounds.csv; -1 before round 0."""
    try:
        return (folder / "rounds.csv").read_text().count("\n") - 2
    except OSError:
        return -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parsed = parser.parse_args()
    failed, kills = False, 0
    for case in parsed.cases:
        with tempfile.TemporaryDirectory() as folder:
            outcome = kill_and_compare(case, parsed.kills, Path(folder), parsed.seed)
        failed |= bool(outcome.differences) or not outcome.kills
        kills += outcome.kills
        ended = f"DIFFERENT: {', '.join(outcome.differences)}" if outcome.differences else "identical"
        print(f"{case}: {outcome.kills} kills after rounds {outcome.rounds_at_kill}; {ended}", flush=True)
    print(f"{kills} kills of {len(parsed.cases)} runs")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
