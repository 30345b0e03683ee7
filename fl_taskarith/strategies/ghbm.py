"""Generalised heavy-ball momentum (Zaccone et al., TMLR 2025): a memory as long as all clients take to come by."""

from flwr.app import ArrayRecord
from torch import Tensor

from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.strategies.fedavg import FedAvg

MOMENTUM = "momentum"  # key of the array record that clients are sent


class GHBM(FedAvg):
    """Clients add (β/ηJ) m to their gradients, m = (θ_{t−τ} − θ_t)/τ, τ = `momentum-rounds`, β = `server-momentum`.

    τ = 0 stands for K over the clients of a round, after which everybody has come by under cyclic participation; in the
    first rounds τ is their number. The downlink doubles. The paper's clients take plain SGD steps, momentum = 0. The
    server keeps the weights of τ rounds. β makes steps up to 1/(1 − β) times as long: tune the rate anew.
    """

    one_way = frozenset({MOMENTUM})

    def span(self) -> int:
        """Return τ."""
        return self.config.momentum_rounds or -(-self.config.num_clients // self.config.sampled_clients)

    def message_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the weights, and m from the second round on; the weights are kept for the rounds to come."""
        current, sent = to_tensors(arrays, self.device), super().message_arrays(arrays)
        past = self._past(current)
        if past:
            momentum = {name: (past[-1][name] - value) / len(past) for name, value in current.items()}
            sent[MOMENTUM] = to_record(momentum)
        for age, weights in enumerate([{name: value.clone() for name, value in current.items()}, *past][: self.span()]):
            self.keep(f"past-{age}", weights)
        return sent

    def _past(self, like: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the kept weights of the names of `like`, in its shapes, the newest first."""
        found: list[dict[str, Tensor]] = []
        while all(f"past-{len(found)}/{name}" in self._kept for name in like):
            found.append(self.recalled(f"past-{len(found)}", like))
        return found
