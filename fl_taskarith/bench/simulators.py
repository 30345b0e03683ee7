"""The same round on other simulators of federated learning, where they are installed: pfl-research and BlazeFL."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""Inputs [B, 3, S, S] and labels [B] of each step of a client, by its number; none of a client that does nothing."""


@dataclass(frozen=True)
class Simulator:
    """A round of all clients, which moves the weights of `network`."""

    network: nn.Module
    round: Callable[[], object]


def simulators(network: nn.Module, clients: int, batches: Batches, rate: float, steps: int) -> dict[str, Simulator]:
    """Return those that are installed, each on a copy of `network`, of which they train what requires a gradient.

    Clients take one plain SGD step at `rate` on each of their batches, `steps` of them (0: they send back what they
    received), and weigh the same.
    """
    return {name: make(copy.deepcopy(network), clients, batches, rate, steps)
            for name, make in SIMULATORS.items() if find_spec(name)}  # fmt: skip


def _sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in parameters if each.requires_grad], lr, fused=True)


def _pfl(network: nn.Module, clients: int, batches: Batches, rate: float, steps: int) -> Simulator:
    """Return a central iteration of pfl-research's FederatedAveraging on its SimulatedBackend, without evaluation."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.algorithm_utils import run_train_eval
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    class Batched(Dataset):  # type: ignore[misc]
        def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches(self.user_id))

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return functional.cross_entropy(self.network(inputs), labels)

        def metrics(self, *_: Tensor) -> dict[str, Any]:
            return {}

    model = PyTorchModel(WithLoss(), _sgd, _sgd(network.parameters(), 1.0))
    one_example = [torch.zeros(1)]  # which `iter` leaves aside
    users = FederatedDataset(
        lambda user: Batched(one_example, user_id=user), get_user_sampler("minimize_reuse", list(range(clients)))
    )
    backend, algorithm = SimulatedBackend(users, users), FederatedAveraging()
    given = NNAlgorithmParams(central_num_iterations=-1, evaluation_frequency=2, train_cohort_size=clients,
                              val_cohort_size=None)  # fmt: skip
    training = NNTrainHyperParams(local_batch_size=1, local_num_epochs=None, local_num_steps=steps,
                                  local_learning_rate=rate)  # fmt: skip

    def iteration() -> None:  # what FederatedAveraging.run does in an iteration: the first of a run would evaluate
        contexts, _, _ = algorithm.get_next_central_contexts(model, 1, given, training)
        ((statistics, metrics),) = run_train_eval(algorithm, backend, model, contexts)
        algorithm.process_aggregated_statistics_from_all_contexts(((contexts[0], statistics),), metrics, model)

    return Simulator(network, iteration)


def _blazefl(network: nn.Module, clients: int, batches: Batches, rate: float, steps: int) -> Simulator:
    """Return a round of BlazeFL's own federated averaging in one process."""
    from blazefl.contrib.fedavg import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgUplinkPackage
    from blazefl.core import deserialize_model, serialize_model

    class Models:
        def select_model(self, _: str) -> nn.Module:
            return copy.deepcopy(network)

    class Loaders:
        def get_dataloader(self, type_: str, cid: int, batch_size: int, generator: object) -> Any:
            return batches(cid)

    class Idle(FedAvgBaseClientTrainer):  # type: ignore[misc]
        def train(self, model_parameters: Tensor, train_loader: object, cid: int) -> Any:
            deserialize_model(self.model, model_parameters)
            return FedAvgUplinkPackage(cid, serialize_model(self.model), 1)

    trainer = (FedAvgBaseClientTrainer if steps else Idle)(Models(), "", Loaders(), "cpu", clients, 1, 1, rate, 0)
    trainer.optimizer = _sgd(trainer.model.parameters(), rate)
    server = FedAvgBaseServerHandler(Models(), "", Loaders(), 0, clients, 1.0, "cpu", 1, 0)

    def one_round() -> None:
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)

    return Simulator(server.model, one_round)


SIMULATORS = {"pfl": _pfl, "blazefl": _blazefl}
"""By the name of the module that has to be installed."""
