"""Fine-tuning one model per task from the same θ₀ under a fixed head, with more or less unequal training."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import Divergence, FlTaskarithError
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.heads import LinearHead, RidgeSolver, RidgeStatistics, choose_strength, fit_logit_scale
from fl_taskarith.models.per_client import PerClientNetwork
from fl_taskarith.one_shot.tasks import Task
from fl_taskarith.seeding import random_generator
from fl_taskarith.training.local import set_trained, train_locally
from fl_taskarith.training.sparse_sgdm import sgdm
from fl_taskarith.training.stacked import ClientData, has_dropout, train_stacked
from fl_taskarith.workspace.workspace import Workspace

Weights = dict[str, Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spread:
    """Training heterogeneity: the largest over the smallest value among the tasks; 1 = the same for all."""

    steps: float = 1.0
    learning_rate: float = 1.0
    batch_size: float = 1.0


@dataclass(frozen=True)
class Training:
    """How one task's model is fine-tuned."""

    local_steps: int
    learning_rate: float
    batch_size: int


def plan_training(config: Config, number: int, spread: Spread, seed: int) -> list[Training]:
    """Plan a training for each of T tasks: values in geometric progression, dealt to the tasks at random.

    The sum of steps stays T · local-steps, whatever the spread, so that total work does not change with it (but for
    rounding); the geometric mean of learning rates and of batch sizes stays as set.
    """

    def factors(ratio: float, purpose: str) -> Sequence[float]:
        exponents = torch.linspace(-0.5, 0.5, number, dtype=torch.float64)
        order = random_generator(seed, f"training spread {purpose}").permutation(number)
        values: list[float] = (ratio**exponents)[torch.from_numpy(order)].tolist()
        return values

    steps, rates = factors(spread.steps, "steps"), factors(spread.learning_rate, "rate")
    return [
        Training(
            max(1, round(config.local_steps * number * step / sum(steps))),
            config.peak_rate * rate,
            max(1, round(config.batch_size * batch)),
        )
        for step, rate, batch in zip(steps, rates, factors(spread.batch_size, "batch"), strict=True)
    ]


def solve_heads(home: Workspace, tasks: Sequence[Task], shared: bool) -> list[LinearHead]:
    """Solve every task's ridge head on the features of θ₀, its penalty and logit scale chosen on validation, float32.

    With `shared` one head of all tasks' data together is the head of each: their labels must mean the same.
    """
    home.load(home.pretrained)
    statistics, features = [], []
    for task in tasks:
        statistics.append(RidgeStatistics.of(home.features(task.train), task.train.labels, len(task.classes)))
        features.append(home.features(task.validation))
    labels = [task.validation.labels for task in tasks]
    if shared:
        return [_solve(reduce(add, statistics), torch.cat(features), torch.cat(labels))] * len(tasks)
    return [_solve(*each) for each in zip(statistics, features, labels, strict=True)]


def _solve(statistics: RidgeStatistics, features: Tensor, labels: Tensor) -> LinearHead:
    solver = RidgeSolver(statistics)
    head = solver.solve(choose_strength(solver, features, labels))
    head = head.scaled(fit_logit_scale(head.scores(features), labels))
    return LinearHead(head.weight.float(), head.bias.float())


def fine_tune_all(
    home: Workspace, tasks: Sequence[Task], heads: Sequence[LinearHead], plans: Sequence[Training], seed: int
) -> list[Weights]:
    """Fine-tune a model per task from θ₀ at a constant learning rate, the head frozen; return the task vectors.

    Task vectors are float32 in the model's shapes. Under `clients-at-once` above 1 or 0 (all), so many tasks with one
    head, training and size of batch go together.

    Raises:
        Divergence: the loss, or a weight, of one is NaN or infinite.
    """
    config = home.config
    most = 1 if has_dropout(home.model) else min(len(tasks), config.at_once or len(tasks))
    alike: dict[tuple[int, Training, int], list[int]] = {}
    for index, (task, head, plan) in enumerate(zip(tasks, heads, plans, strict=True)):
        alike.setdefault((id(head), plan, min(plan.batch_size, len(task.train))), []).append(index)
    tuned: dict[int, Weights] = {}
    for group in (same[first : first + most] for same in alike.values() for first in range(0, len(same), most)):
        tune = partial(_fine_tune, home, heads[group[0]], plans[group[0]], seed)
        try:
            tuned |= tune({index: tasks[index] for index in group})
        except FlTaskarithError:
            raise
        except Exception as error:  # too little memory, or a kind of layer with no form for several
            if len(group) == 1:
                raise
            log.warning("Tasks are fine-tuned one by one: %s: %s", type(error).__name__, error)
            for index in group:
                tuned |= tune({index: tasks[index]})
    return [tuned[index] for index in range(len(tasks))]


def _fine_tune(
    home: Workspace, head: LinearHead, training: Training, seed: int, tasks: Mapping[int, Task]
) -> dict[int, Weights]:
    """Fine-tune the tasks, by their number, several together, one as a client trains; return their task vectors."""
    config, rate = home.config, training.learning_rate
    home.load(home.pretrained)
    home.network.head = _linear(head)
    names = backbone_names(home)
    parameters = dict(zip(names, set_trained(home.model, names), strict=True))
    data = []
    for index, task in tasks.items():
        everything = torch.arange(len(task.train), device=home.device)
        data.append(ClientData(task.train, everything, random_generator(seed, "fine-tuning", 0, index)))
    amount: dict[str, Any] = {
        "local_steps": training.local_steps, "batch_size": training.batch_size, "precision": config.precision
    }  # fmt: skip
    if len(data) > 1:
        set_trained(home.model, [])
        together = PerClientNetwork(home.network, names, len(data))
        optimizer = sgdm(together.weights.items(), config, rate, clients=len(data))
        losses = train_stacked(together, home.network, data, optimizer, home.preprocessing, **amount)
        ends = [{name: value[row].detach() for name, value in together.weights.items()} for row in range(len(data))]
    else:
        losses = [train_locally(
            home.network, data[0].examples, data[0].shard, sgdm(parameters.items(), config, rate), home.preprocessing,
            generator=data[0].generator, **amount,
        )]  # fmt: skip
        ends = [{name: parameter.detach() for name, parameter in parameters.items()}]
    tuned = {index: {name: value - home.pretrained[name] for name, value in end.items()}
             for index, end in zip(tasks, ends, strict=True)}  # fmt: skip
    for (index, vector), loss in zip(tuned.items(), losses, strict=True):
        if not (math.isfinite(loss) and all(bool(value.isfinite().all()) for value in vector.values())):
            raise Divergence(f'Fine-tuning on "{tasks[index].name}" diverged at learning-rate {rate:g}.')
    return tuned


def backbone_names(home: Workspace) -> list[str]:
    """Return the names of the parameters that are fine-tuned and merged."""
    return [name for name in home.trained_names(home.config.num_rounds) if name not in HEAD_PARAMETERS]


def _linear(head: LinearHead) -> nn.Linear:
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    # contiguous, for products with a transposed matrix round otherwise
    layer.weight, layer.bias = (nn.Parameter(each.contiguous(), False) for each in (head.weight, head.bias))
    return layer
