"""SCAFFOLD (Karimireddy et al., ICML 2020), option II: control variates against client drift."""

from collections.abc import Iterable

from flwr.app import ArrayRecord
from torch import Tensor

from fl_taskarith.engine.records import to_record
from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector
from fl_taskarith.strategies.fedavg import FedAvg, Reply

CONTROL = "control"  # key of the array record: c on the way down, c_k⁺ − c_k on the way up


class Scaffold(FedAvg):
    """θ ← θ + η_s mean_S τ_k and c ← c + (|S|/K) mean_S(c_k⁺ − c_k), with c sent along: traffic doubles both ways.

    A client that is sent c corrects its gradients by c − c_k and keeps c_k in a file of its own
    (`training.corrections`). Means count every client alike, as in the paper, so that c is the mean of the c_k.
    """

    def message_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the weights, and c, which is zero in the first round."""
        return {**super().message_arrays(arrays), CONTROL: to_record(self.recalled(CONTROL, self._weights))}

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the mean task vector, in the shapes of `weights`, and update c."""
        mean, change = WeightedMean(), WeightedMean()
        for reply in replies:
            mean.add(reply.task_vector, 1.0)
            change.add(reply.others[CONTROL], 1.0)
        share = mean.total_weight / self.config.num_clients
        self.keep(CONTROL, apply_task_vector(self.recalled(CONTROL, weights), change.result(), share))
        return mean.result()
