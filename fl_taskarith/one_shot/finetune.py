"""Fine-tuning one model per task from the same θ₀ under a fixed head, with a knob for unequal training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import Divergence, FlTaskarithError
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.heads import LinearHead, RidgeSolver, RidgeStatistics, choose_ridge_lambda, fit_logit_scale
from fl_taskarith.one_shot.tasks import Task
from fl_taskarith.seeding import random_generator
from fl_taskarith.training.local import is_single, set_trained, train_locally
from fl_taskarith.training.schedules import step_coefficient_sum
from fl_taskarith.training.sparse_sgdm import sgdm
from fl_taskarith.training.stacked import ClientData, has_dropout, stacked, train_stacked
from fl_taskarith.workspace.workspace import Resident

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


@dataclass(frozen=True)
class FineTuned:
    """A task's model as its task vector, and ‖a‖₁, the number of plain SGD steps that its training amounts to."""

    task_vector: Weights
    step_coefficient_sum: float


def plan_training(config: Config, number: int, spread: Spread, seed: int) -> list[Training]:
    """A training for each of T tasks: values in geometric progression, dealt to the tasks at random.

    The sum of steps stays T · local-steps, whatever the spread, so that total work does not change with it (but for
    rounding); the geometric mean of learning rates and of batch sizes stays as set.
    """

    def factors(ratio: float, purpose: str) -> Sequence[float]:
        exponents = torch.linspace(-0.5, 0.5, number, dtype=torch.float64)
        order = random_generator(seed, f"training spread {purpose}").permutation(number)
        values: list[float] = (ratio**exponents)[torch.from_numpy(order)].tolist()
        return values

    steps = factors(spread.steps, "steps")
    return [
        Training(
            max(1, round(config.local_steps * number * step / sum(steps))),
            config.peak_rate * rate,
            max(1, round(config.batch_size * batch)),
        )
        for step, rate, batch in zip(
            steps, factors(spread.learning_rate, "rate"), factors(spread.batch_size, "batch"), strict=True
        )
    ]


def solve_heads(home: Resident, tasks: Sequence[Task], shared: bool) -> list[LinearHead]:
    """The ridge head of every task on the features of θ₀, its penalty and logit scale chosen on validation, float32.

    With `shared` the head of all tasks' data together, the same for each: their labels must mean the same.
    """
    home.load(home.pretrained)
    statistics, features = [], []
    for task in tasks:
        statistics.append(RidgeStatistics.of(home.features(task.train), task.train.labels, len(task.classes)))
        features.append(home.features(task.validation))
    labels = [task.validation.labels for task in tasks]
    if not shared:
        return [_solve(*each) for each in zip(statistics, features, labels, strict=True)]
    total = statistics[0]
    for each in statistics[1:]:
        total = total + each
    return [_solve(total, torch.cat(features), torch.cat(labels))] * len(tasks)


def _solve(statistics: RidgeStatistics, features: Tensor, labels: Tensor) -> LinearHead:
    solver = RidgeSolver(statistics)
    head = solver.solve(choose_ridge_lambda(solver, features, labels))
    head = head.scaled(fit_logit_scale(head.scores(features), labels))
    return LinearHead(head.weight.float(), head.bias.float())


def fine_tune_all(
    home: Resident, tasks: Sequence[Task], heads: Sequence[LinearHead], plans: Sequence[Training], seed: int
) -> list[FineTuned]:
    """A model per task from θ₀, at a constant learning rate, the head frozen.

    Under `clients-at-once` above 1 or 0 (all), so many tasks with one head, training and size of batch go together.

    Raises:
        Divergence: the loss, or a weight, of one is not finite.
    """
    config = home.config
    together = is_single(config.precision) and not config.clip_norm and not has_dropout(home.model)
    most = len(tasks) if together else 1
    most = min(most, config.clients_at_once or most)
    alike: dict[tuple[int, Training, int], list[int]] = {}
    for index, (task, head, plan) in enumerate(zip(tasks, heads, plans, strict=True)):
        alike.setdefault((id(head), plan, min(plan.batch_size, len(task.train))), []).append(index)
    tuned: dict[int, FineTuned] = {}
    for members in alike.values():
        for first in range(0, len(members), most):
            chosen = members[first : first + most]
            group = {index: tasks[index] for index in chosen}
            head, plan = heads[chosen[0]], plans[chosen[0]]
            try:
                found = _fine_tune(home, group, head, plan, seed)
            except FlTaskarithError:
                raise
            except Exception as error:  # too little memory, or a kind of layer that vmap cannot do
                if len(chosen) == 1:
                    raise
                log.warning("Tasks are fine-tuned one by one: %s: %s", type(error).__name__, error)
                found = [_fine_tune(home, {index: task}, head, plan, seed)[0] for index, task in group.items()]
            tuned |= dict(zip(chosen, found, strict=True))
    return [tuned[index] for index in range(len(tasks))]


def _fine_tune(
    home: Resident, tasks: Mapping[int, Task], head: LinearHead, training: Training, seed: int
) -> list[FineTuned]:
    """The models of the tasks, by their number; of several together, of one as a client trains."""
    config = home.config
    home.load(home.pretrained)
    home.model.head = _linear(head)
    names = backbone_names(home)
    parameters = set_trained(home.model, names)
    data = []
    for index, task in tasks.items():
        generator = random_generator(seed, "fine-tuning", 0, index)
        data.append(ClientData(task.train, torch.arange(len(task.train), device=home.device), generator))
    rate, steps = training.learning_rate, training.local_steps
    if len(data) > 1:
        weights = stacked(dict(zip(names, parameters, strict=True)), len(data))
        set_trained(home.model, [])
        losses = train_stacked(
            home.network,
            weights,
            data,
            sgdm(weights.items(), config, rate),
            home.preprocessing,
            local_steps=steps,
            batch_size=training.batch_size,
        )
        ends = [{name: value[row].detach() for name, value in weights.items()} for row in range(len(data))]
    else:
        loss = train_locally(
            home.network,
            data[0].examples,
            data[0].shard,
            sgdm(zip(names, parameters, strict=True), config, rate),
            home.preprocessing,
            local_steps=steps,
            batch_size=training.batch_size,
            precision=config.precision,
            generator=data[0].generator,
        )
        losses = [loss]
        ends = [{name: parameter.detach() for name, parameter in zip(names, parameters, strict=True)}]
    coefficients = step_coefficient_sum(config, steps, rate)
    tuned = []
    for task, loss, end in zip(tasks.values(), losses, ends, strict=True):
        vector = {name: value - home.pretrained[name] for name, value in end.items()}
        if not all(bool(value.isfinite().all()) for value in (*vector.values(), torch.tensor(loss))):
            raise Divergence(f'Fine-tuning on "{task.name}" diverged at learning-rate {rate:g}.')
        tuned.append(FineTuned(vector, coefficients))
    return tuned


def backbone_names(home: Resident) -> list[str]:
    """Names of the parameters that are fine-tuned and merged."""
    return [name for name in home.trained_names(home.config.num_rounds) if name not in HEAD_PARAMETERS]


def _linear(head: LinearHead) -> nn.Linear:
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0], device=head.weight.device)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    return layer.requires_grad_(False)


@dataclass(frozen=True)
class TaskScore:
    """Accuracy in [0, 1] and mean cross-entropy of one task on one split."""

    accuracy: float
    loss: float


def score_tasks(
    home: Resident, weights: Mapping[str, Tensor], splits: Sequence[ImageSet], heads: Sequence[LinearHead]
) -> list[TaskScore]:
    """The backbone `weights` (θ₀ where they lack a tensor) under every task's own head, on a split of each task."""
    home.load(home.pretrained | dict(weights))
    together = ImageSet(torch.cat([each.images for each in splits]), torch.cat([each.labels for each in splits]))
    parts = home.features(together).split([len(each) for each in splits])
    scores = []
    for features, examples, head in zip(parts, splits, heads, strict=True):
        logits = head.scores(features)
        accuracy = (logits.argmax(1) == examples.labels).double().mean().item()
        scores.append(TaskScore(accuracy, nn.functional.cross_entropy(logits, examples.labels).item()))
    return scores
