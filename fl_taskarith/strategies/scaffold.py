"""SCAFFOLD (Karimireddy et al., ICML 2020), option II: control variates against client drift."""

import math
from collections.abc import Iterable

from flwr.app import ArrayRecord
from torch import Tensor

from fl_taskarith.engine.question import Numbers
from fl_taskarith.engine.records import to_record
from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector
from fl_taskarith.strategies.fedavg import FedAvg, Reply

CONTROL = "control"  # key of the array record: c on the way down, c_k⁺ − c_k on the way up
ROUNDING = 1.01


class Scaffold(FedAvg):
    """θ ← θ + η_s mean_S τ_k and c ← c + (|S|/K) mean_S(c_k⁺ − c_k), with c sent along: traffic doubles both ways.

    A client that is sent c corrects its gradients by c − c_k and keeps c_k in a file of its own
    (`training.corrections`). Means count every client alike, as in the paper, so that c is the mean of the c_k.
    """

    def message_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the weights, and c, which is zero in the first round."""
        return {**super().message_arrays(arrays), CONTROL: to_record(self.recalled(CONTROL, self._weights))}

    def largest_norm(self, key: str, numbers: Numbers, norms: Numbers) -> float:
        """Return the largest norm of the client's change of c_k, −c − τ_k/(η‖a‖₁), which its task vector bounds."""
        if key != CONTROL:
            return super().largest_norm(key, numbers, norms)
        path = self.context.learning_rate * numbers["step-coefficient-sum"]
        if not path:
            return math.inf
        return ROUNDING * (self.sent_norm(CONTROL) + norms[self.arrayrecord_key] / path)

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the mean task vector, in the shapes of `weights`, and update c."""
        mean, change = WeightedMean(), WeightedMean()
        for reply in replies:
            mean.add(reply.task_vector, 1.0)
            change.add(reply.others[CONTROL], 1.0)
        share = mean.total_weight / self.config.num_clients
        self.keep(CONTROL, apply_task_vector(self.recalled(CONTROL, weights), change.result(), share))
        return mean.result()
