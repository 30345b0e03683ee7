"""A round's task vectors merged by any rule that merges whole models."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import find_rule, merge_rules
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.seeding import random_generator, torch_seed
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class MergedByRule(FedAvg):
    """θ ← θ + η_s λ direction(τ_1, ..., τ_n) by `merge-rule`, λ being 1/n for its sums and 1 for the other rules.

    `MergeRule.summed` says which are sums. Iso-C, Iso-CTS and WUDI return a direction about as long as the sum of the
    task vectors and are taken at λ = 1, as in their papers: they need a lower `server-lr` or rate than a mean.

    `merge-parameter` is the rule's own parameter; "auto" is the middle one of those that a search for it tries. Clients
    count alike. All task vectors of a round are held at once. Under a mask a rule for matrices sees zeros outside it,
    and its result is projected on the mask; other rules see the updated entries alone.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        """Raises ConfigError where the rule refuses the parameter, or has none and one is given."""
        super().__init__(config, device)
        self.rule = find_rule(config.merge_rule)
        self._round = 0
        if not self.rule.parameter and config.merge_parameter != AUTO:
            raise ConfigError(
                f"merge-parameter = {config.merge_parameter} has no effect under merge-rule = "
                f'"{config.merge_rule}", which has no parameter: leave it out.'
            )
        if config.merge_parameter != AUTO and self.rule.name in merge_rules():  # one's own may not be made for zeros
            number = config.sampled_clients
            self._direction([{"": torch.zeros(1, device=device)}] * number, [1.0] * number)

    def begin_round(self, server_round: int, arrays: ArrayRecord, grid: PartitionGrid) -> tuple[list[int], int]:
        """Take the global tensors, as in FedAvg, and the number of the round, on which a rule's luck depends."""
        self._round = server_round
        return super().begin_round(server_round, arrays, grid)

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return λ times the direction, in the shapes of `weights`."""
        steps: list[float] = []

        def noted(reply: Reply) -> Reply:
            steps.append(reply.step_coefficient_sum)
            return reply

        vectors = all_task_vectors(map(noted, replies))
        mask = self.context.mask if self.rule.matrices else None
        if mask is not None:
            vectors = [mask.spread(vector) for vector in vectors]
        direction = self._direction(vectors, steps)
        if mask is not None:
            direction = mask.gather(direction)
        scale = self.rule.default_scale(len(vectors))
        return {name: scale * value for name, value in direction.items()}

    def _direction(self, vectors: TaskVectors, steps: Sequence[float]) -> Mapping[str, Tensor]:
        """Return the rule's direction for task vectors of any shapes, and ‖a‖₁ of each."""
        tried = self.rule.searched(vectors)
        value = tried[len(tried) // 2] if self.config.merge_parameter == AUTO else float(self.config.merge_parameter)
        seed = torch_seed(random_generator(self.config.seed, "merge rule", self._round))
        try:
            return self.rule.direction(vectors, value, steps, seed)
        except ValueError as error:
            raise ConfigError(
                f'merge-rule = "{self.config.merge_rule}", merge-parameter = {self.config.merge_parameter}: {error}.'
            ) from error
