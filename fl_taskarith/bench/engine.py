"""A round without any training: our engine against Flower's own, on Ray, for the same clients and weights."""

import os
from collections.abc import Callable

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from fl_taskarith.bench.report import Bench, alternate, median, seconds_of
from fl_taskarith.client.app import answer
from fl_taskarith.client.local_work import MetricValue
from fl_taskarith.client.queries import tell_partition
from fl_taskarith.config.settings import Config, load
from fl_taskarith.engine.grid import PartitionGrid, read_settings
from fl_taskarith.engine.records import payload_bytes, to_record, to_tensors
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.workspace.machine import available_threads, choose_device

CLASSES = 100
ROUNDS = 3  # of a turn
CORES_PER_CLIENT = 2  # what Flower's simulation gives each client unless told otherwise

app = ClientApp()


@app.query("partition")
def on_partition(message: Message, context: Context) -> Message:
    """Which partition this client holds, as SuperNodes are asked at the start."""
    return answer(tell_partition, message, context)


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """No training at all."""
    return answer(reply_at_once, message, context)


def reply_at_once(message: Message, partition: int) -> RecordDict:
    """The weights as tensors on the client's device, as any client takes them, and straight back as a task vector."""
    config, _ = read_settings(message.content.config_records["config"])
    weights = to_tensors(message.content.array_records["arrays"], choose_device(config.device))
    metrics: dict[str, MetricValue] = {"num-examples": 1, "step-coefficient-sum": 1.0}
    metrics |= dict.fromkeys(("train-loss", "update-norm", "train-seconds"), 0.0)
    return RecordDict({"arrays": to_record(weights), "metrics": MetricRecord(metrics)})


def bench_engine(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    clients: int = 10,
    actors: int = 0,
    repeats: int = 5,
    device_name: str = "auto",
) -> Bench:
    """Seconds of a round of `FedAvg.start` on both engines, in turn within one process, all clients taking part.

    The weights are a backbone's, random. Ray has `actors` processes; 0 is what Flower's default of two cores per client
    gives on this machine. They start for the handshake, which is not timed. Turns are of several rounds, as rounds
    follow one another in a federation; the first turn of each engine is reported apart and not compared.

    Raises:
        RuntimeError: the two engines do not end on the same weights.
    """
    device = choose_device(device_name)
    config = load(
        overrides={
            "num_clients": clients,
            "participation": 1.0,
            "sharding": "iid",
            "mask_rule": "none",
            "schedule": "constant",
            "precision": "fp32",
            "compile": "off",
            "device": device_name,
        }
    )
    actors = actors or min(clients, max(1, available_threads() // CORES_PER_CLIENT))
    weights: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    measured: dict[str, list[float]] = {}

    def measure(grid: Grid) -> None:
        # All of torch's work is in this thread, which is Flower's: OpenMP threads of two would outnumber the cores.
        torch.set_num_threads(available_threads())
        model = build_model(model_name, CLASSES, input_size, weights="none", download=False, seed=0)
        named = ((name, parameter.detach().to(device)) for name, parameter in model.named_parameters())
        weights.update((name, value) for name, value in named if name not in HEAD_PARAMETERS)
        grids = {"ours": SequentialGrid(app, clients), "ray": SuperNodeGrid(grid, config)}
        federations = {name: _Rounds(each, config, weights, device) for name, each in grids.items()}
        first.update({name: seconds_of(each, device) for name, each in federations.items()})
        ours, rays = (federations[name].result for name in ("ours", "ray"))
        if ours.keys() != rays.keys() or not all(torch.equal(ours[name], rays[name]) for name in ours):
            raise RuntimeError("the two engines ended on different weights")
        measured.update(alternate(federations, repeats, device))

    _with_ray(measure, clients, actors, on_gpu=device.type == "cuda")
    per_round = {name: median(seconds) / ROUNDS for name, seconds in measured.items()}
    parameters = sum(value.numel() for value in weights.values())
    payload = payload_bytes(to_record(weights))
    lines = [
        f"{clients} clients without training, {parameters:,} parameters ({payload / 2**20:.0f} MiB) each way, median "
        f"of {repeats} turns of {ROUNDS} rounds on {device.type} with {available_threads()} threads; both end on the "
        "same bits",
        f"ours  {per_round['ours']:7.3f} s per round   (first {ROUNDS} rounds {first['ours']:.2f} s)",
        f"Ray   {per_round['ray']:7.3f} s per round   (first {ROUNDS} rounds {first['ray']:.2f} s), actors: {actors}",
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "parameters": parameters,
        "payload_bytes": payload,
        "clients": clients,
        "actors": actors,
        "repeats": repeats,
        "seconds": measured,
        "seconds_per_round": per_round,
        "rounds_of_a_turn": ROUNDS,
        "first_turn_seconds": first,
    }
    return Bench("engine", per_round["ray"] / per_round["ours"], figures, tuple(lines))


class _Rounds:
    """Called: the first rounds of a federation on `grid`, from the same weights every time; keeps what it ends on."""

    def __init__(self, grid: PartitionGrid, config: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        self.grid, self.config, self.weights, self.device = grid, config, weights, device
        self.result: dict[str, Tensor] = {}

    def __call__(self) -> None:
        strategy, context = FedAvg(self.config, self.device), RoundContext(self.config.peak_rate)
        arrays = strategy.start(self.grid, to_record(self.weights), ROUNDS, context_of=lambda _: context).arrays
        self.result = to_tensors(arrays, self.device)


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

    run_simulation(
        server_app,
        app,
        num_supernodes=clients,
        backend_config={
            "init_args": {"num_cpus": actors},
            "client_resources": {"num_cpus": 1, "num_gpus": 1.0 / actors if on_gpu else 0.0},
        },
    )
