"""A round without any training: our engine against Flower's own, on Ray, for the same clients and weights."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_taskarith.bench.harness import Result, measure, medians, random_model, round_settings, seconds_of, time_lines
from fl_taskarith.bench.round import Federation
from fl_taskarith.client.app import answer
from fl_taskarith.client.local_work import MetricValue
from fl_taskarith.client.queries import tell_partition
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import payload_bytes, to_record, to_tensors
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.training.schedules import step_coefficient_sum
from fl_taskarith.workspace.machine import available_threads, choose_device

ROUNDS = 3  # measured together, as rounds follow one another in a federation
CORES_PER_CLIENT = 2  # what Flower's simulation gives each client by default

app = ClientApp()


@app.query("partition")
def on_partition(message: Message, context: Context) -> Message:
    """Tell which partition this client holds, as SuperNodes are asked at the start."""
    return answer(tell_partition, message, context)


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """Reply without any training."""
    return answer(reply_at_once, message, context)


def reply_at_once(message: Message, partition: int) -> RecordDict:
    """Put the weights on the client's device, as every client does, and send them straight back as a task vector."""
    config, current = read_settings(message.content.config_records["config"])
    weights = to_tensors(message.content.array_records["arrays"], choose_device(config.device))
    steps = step_coefficient_sum(config, config.local_steps, current.learning_rate)
    metrics: dict[str, MetricValue] = {"num-examples": 1, "step-coefficient-sum": steps}
    metrics |= dict.fromkeys(("train-loss", "train-seconds"), 0.0)
    return RecordDict({"arrays": to_record(weights), "metrics": MetricRecord(metrics)})


def bench_engine(options: Namespace) -> Result:
    """Alternate `FedAvg.start` on both engines within one process, all clients taking part, on random weights.

    Ray has `actors` processes; 0 is what Flower's default of two cores per client gives on this machine. They start for
    the handshake, which is not timed. The first rounds on each engine are reported apart and not compared.

    Raises:
        RuntimeError: the two engines do not end on the same weights.
    """
    config = round_settings(options, num_clients=options.clients)
    actors = options.actors or min(options.clients, max(1, available_threads() // CORES_PER_CLIENT))
    device = choose_device(options.device)
    figures: dict[str, Any] = {"actors": actors, "rounds_of_a_turn": ROUNDS}

    def compare(grid: Grid) -> None:
        # All of torch's work is in this thread, which is Flower's: OpenMP threads of two would outnumber the cores.
        torch.set_num_threads(available_threads())
        model = random_model(config.model, config.input_size, device)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()
                   if name not in HEAD_PARAMETERS}  # fmt: skip
        figures["parameters"] = sum(value.numel() for value in weights.values())
        figures["payload_bytes"] = payload_bytes(to_record(weights))
        grids = {"ours": SequentialGrid(app, options.clients), "ray": SuperNodeGrid(grid, config)}
        federations = {name: Federation(each, config, weights, ROUNDS) for name, each in grids.items()}
        figures["first_turn_seconds"] = {name: seconds_of(each, device) for name, each in federations.items()}
        ours, rays = (to_tensors(federations[name].arrays, device) for name in grids)
        if ours.keys() != rays.keys() or not all(torch.equal(ours[name], rays[name]) for name in ours):
            raise RuntimeError("the two engines ended on different weights")
        figures["seconds"] = measure(federations, options.repeats, device)

    _with_ray(compare, options.clients, actors, on_gpu=device.type == "cuda")
    per_round = figures["seconds_per_round"] = medians(figures["seconds"], ROUNDS)
    notes = {name: f"per round (first {ROUNDS} rounds {first:.2f} s)"
             for name, first in figures["first_turn_seconds"].items()}  # fmt: skip
    payload = f"{figures['parameters']:,} parameters ({figures['payload_bytes'] / 2**20:.0f} MiB) each way"
    lines = [f"{payload}; both end on the same bits; actors: {actors}", *time_lines(per_round, 0, notes)]
    return Result(per_round["ray"] / per_round["ours"], figures, lines)


def _with_ray(work: Callable[[Grid], None], clients: int, actors: int, on_gpu: bool) -> None:
    """Call `work` as the ServerApp of a Flower simulation of our ClientApp."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid)

    resources = {"num_cpus": 1, "num_gpus": 1.0 / actors if on_gpu else 0.0}
    run_simulation(
        server_app,
        app,
        num_supernodes=clients,
        backend_config={"init_args": {"num_cpus": actors}, "client_resources": {**resources}},
    )
