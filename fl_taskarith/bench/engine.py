"""A round of clients that do nothing, and one that trains, on our engine and on others, with the same weights.

The others are Flower's own, on Ray, and the simulators that are installed (`simulators`).
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from fl_taskarith.bench.harness import (
    Clock,
    Result,
    measure,
    medians,
    random_head,
    random_model,
    round_settings,
    seconds_of,
    time_lines,
)
from fl_taskarith.bench.round import Federation, federation_of_clients
from fl_taskarith.bench.simulators import SIMULATORS, simulators
from fl_taskarith.client.app import answer
from fl_taskarith.client.local_work import MetricValue
from fl_taskarith.client.queries import tell_partition
from fl_taskarith.data.batches import batch_positions
from fl_taskarith.engine.grid import PartitionGrid, read_settings
from fl_taskarith.engine.records import payload_bytes, to_record, to_tensors
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.seeding import random_generator, torch_seed
from fl_taskarith.server.simulate import on_ray
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import set_trained
from fl_taskarith.training.schedules import step_coefficient_sum
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.machine import available_threads, choose_device
from fl_taskarith.workspace.workspace import workspace

ROUNDS = 3  # measured together, as rounds follow one another in a federation
TRAINING: dict[str, object] = {
    **{"model": "vit_glyph", "input_size": 16, "batch_size": 32, "momentum": 0.0, "learning_rate": 0.01},
    **{"augmentation": "none", "train_subset": 1000, "validation_size": 100, "calibration_size": 0, "test_subset": 100},
}
"""Settings of the round that trains: without momentum, so that all sides end on the same weights."""
LARGEST_DIFFERENCE = 1e-3  # of a simulator's task vector from ours, relative
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
    """Alternate `FedAvg.start` on both engines, and a round of each simulator, all clients taking part; random weights.

    Ray has `actors` processes; 0 is what Flower's default of two cores per client gives on this machine. They start for
    the handshake, which is not timed. The first rounds on each engine are reported apart and not compared. The floor is
    one copy of all weights for each client. Then a round that trains is measured (`_training`), if a simulator is
    installed. The ratio is that of Ray to ours; `without_ray` it is that of the fastest simulator to ours, all is one
    process, and on a CPU its own processor time is measured, which others on the machine hardly change.

    Raises:
        RuntimeError: the engines do not end on the same weights.
    """
    config = round_settings(options, num_clients=options.clients)
    actors = options.actors or min(options.clients, max(1, available_threads() // CORES_PER_CLIENT))
    device = choose_device(options.device)
    clock = time.process_time if options.without_ray and device.type == "cpu" else time.perf_counter
    figures: dict[str, Any] = {"actors": actors, "rounds_of_a_turn": ROUNDS, "clock": clock.__name__}
    figures["simulators"] = {name: version(name) for name in SIMULATORS if find_spec(name)}

    def compare(grid: Grid | None) -> None:
        # All of torch's work is in this thread, which is Flower's: OpenMP threads of two would outnumber the cores.
        torch.set_num_threads(available_threads())
        model = random_model(config.model, config.input_size, device)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()
                   if name not in HEAD_PARAMETERS}  # fmt: skip
        figures["parameters"] = sum(value.numel() for value in weights.values())
        figures["payload_bytes"] = payload_bytes(to_record(weights))
        grids: dict[str, PartitionGrid] = {"ours": SequentialGrid(app, options.clients)}
        grids |= {"ray": SuperNodeGrid(grid, config)} if grid is not None else {}
        federations = {name: Federation(each, config, weights, ROUNDS) for name, each in grids.items()}
        figures["first_turn_seconds"] = {name: seconds_of(each, device, clock) for name, each in federations.items()}
        ours, *others = (to_tensors(each.arrays, device) for each in federations.values())
        for theirs in others:
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
                raise RuntimeError("the two engines ended on different weights")
        figures["seconds"] = measure(federations | _carriers(model, options.clients), options.repeats, device, clock)

    if options.without_ray:
        compare(None)
    else:
        resources = {"num_cpus": 1, "num_gpus": 1.0 / actors if device.type == "cuda" else 0.0}
        on_ray(compare, app, options.clients, actors, resources)
    per_round = figures["seconds_per_round"] = medians(figures["seconds"], ROUNDS)
    first = figures["first_turn_seconds"]
    notes = {name: f"per round, {seconds / per_round['ours']:.2f} x ours"
             + (f" (first {ROUNDS} rounds {first[name]:.2f} s)" if name in first else "")
             for name, seconds in per_round.items()}  # fmt: skip
    payload = f"{figures['parameters']:,} parameters ({figures['payload_bytes'] / 2**20:.0f} MiB) each way"
    engines = (
        f"without Ray; {clock.__name__}" if options.without_ray else f"both end on the same bits; actors: {actors}"
    )
    lines = [f"{payload}; {engines}", *time_lines(per_round, 0, notes)]
    if training := _training(options, clock):
        figures["training"] = training
        seconds = training["seconds_per_round"]
        notes = {name: f"per round of training, {each / seconds['ours']:.2f} x ours" for name, each in seconds.items()}
        lines += time_lines(seconds, 0, notes)
    others = [per_round[name] for name in (("ray",) if "ray" in per_round else SIMULATORS) if name in per_round]
    ratio = min(others) / per_round["ours"] if others else None
    return Result(ratio, figures, lines, suffix="-simulators" if options.without_ray else "")


def _carriers(model: Backbone, clients: int) -> dict[str, Callable[[], object]]:
    """Return `ROUNDS` rounds of clients that do nothing on each installed simulator, and as many times the floor."""
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    copies = [torch.empty_like(weights) for _ in range(clients)]
    rounds: dict[str, Callable[[], object]] = {"floor": lambda: [each.copy_(weights) for each in copies]}
    rounds |= {name: each.round for name, each in simulators(model, clients, lambda _: (), 0.1, 0).items()}
    return {name: lambda once=once: [once() for _ in range(ROUNDS)] for name, once in rounds.items()}  # type: ignore[misc]


def _training(options: Namespace, clock: Clock) -> dict[str, Any]:
    """Alternate a round of `TRAINING` on ours and on each installed simulator; return nothing if there is none.

    Ours trains clients one by one, and all at once. On all sides they take 4 plain SGD steps on the same batches, the
    head is frozen, and the last block computes the class token alone. `differences` are those of the simulators' first
    task vectors from ours, relative.

    Raises:
        RuntimeError: one of them differs by more than `LARGEST_DIFFERENCE`.
    """
    config = round_settings(options, **TRAINING, num_clients=options.clients)
    home = workspace(config)
    head = random_head(home)
    home.load(head)
    set_trained(home.model, home.trained_names(1))

    def batches(client: int) -> Iterator[tuple[Tensor, Tensor]]:
        shard, generator = home.shards[client], random_generator(config.seed, "local training", 1, client)
        torch_seed(generator)  # drawn first, as a client does
        for positions in batch_positions(len(shard), config.batch_size, config.local_steps, generator):
            batch = home.data.train.take(shard[torch.from_numpy(positions)])
            yield home.preprocessing.evaluation_inputs(batch.images), batch.labels

    others = simulators(home.model, options.clients, batches, config.peak_rate, config.local_steps)
    if not others:
        return {}
    with scratch_folder() as folder:
        ours = federation_of_clients(home, Frozen(head), folder, options.clients)
        ours()
        moved = _task_vector(to_tensors(ours.arrays, home.device), ours.weights)
        differences = {}
        for name, other in others.items():
            other.round()
            theirs = _task_vector(dict(other.network.named_parameters()), ours.weights)
            apart = task_vector_norm(_task_vector(theirs, moved))
            differences[name] = apart / task_vector_norm(moved)
        if not all(each < LARGEST_DIFFERENCE for each in differences.values()):
            raise RuntimeError(f"the simulators did not train as ours did: {differences}")
        together = federation_of_clients(home, Frozen(head), folder, options.clients, options.clients)
        works: dict[str, Callable[[], object]] = {"ours": ours, "ours, all at once": together}
        works |= {name: other.round for name, other in others.items()}
        seconds = measure(works, options.repeats, home.device, clock)
    return {"differences": differences, "seconds": seconds, "seconds_per_round": medians(seconds)}


def _task_vector(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights - start by name, in their shapes, for the names of `start`."""
    return {name: weights[name].detach() - value for name, value in start.items()}
