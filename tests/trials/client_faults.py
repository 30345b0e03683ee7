"""Every fault of a client, by "stop" and by "skip", in the sequential engine; counted for the table of reliability."""

import dataclasses
import json
from pathlib import Path

from conftest import final_weights, same_bits
from damage import TINY
from faults import FAULTS, FaultyApp, with_fault
from trials import Tally

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ClientFailure
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.run_folder import read_rounds

AT_FAULT = (1, 6)


def client_faults(folder: Path) -> list[Tally]:
    """A row per fault, a trial per policy."""
    config = dataclasses.replace(TINY, results_dir=str(folder), participation=1.0, num_rounds=1)
    sound = final_weights(simulate(config, run_name="sound").folder)
    skipped = _skipped(config, "raises")
    tallies = []
    for fault in FAULTS:
        tally = Tally(f"a client {fault}")
        tally.settle("stops, naming the client", _differences_by_stop(config, fault), "stop")
        run = _skipped(config, fault) if fault != "raises" else skipped
        row = read_rounds(run)[1]
        wrong = [] if (row["clients"], row["failed_clients"]) == (6, 2) else [f"counted {row['failed_clients']}"]
        if not same_bits(final_weights(run), final_weights(skipped)) or same_bits(final_weights(run), sound):
            wrong.append("weights are not those of the other clients")
        tally.settle("goes on as if it had not answered, and counts it", wrong, "skip")
        tallies.append(tally)
    return tallies


def _skipped(config: Config, fault: str) -> Path:
    return run_federation(with_fault(config, fault, "skip"), FaultyApp(fault, AT_FAULT)).folder


def _differences_by_stop(config: Config, fault: str) -> list[str]:
    stopping = with_fault(config, fault, "stop")
    try:
        run_federation(stopping, FaultyApp(fault, AT_FAULT))
    except ClientFailure as error:
        if not (str(error).startswith("Client 1 ") and FAULTS[fault][1] in str(error)):
            return [f"said {error}"]
    else:
        return ["the run finished"]
    record = json.loads((Path(stopping.results_dir) / stopping.run_name / "run.json").read_text())
    return [] if record["status"] == "failed" and "Client 1 " in record["cause"] else ["run.json does not say so"]
