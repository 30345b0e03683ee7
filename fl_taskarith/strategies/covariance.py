"""Covariance aggregation: a sum of task vectors where clients' inputs differ, a mean where they agree."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.input_covariance import BoundedSum, CovarianceSum
from fl_taskarith.merging.matrices import matrix_shapes
from fl_taskarith.storage.client_files import under
from fl_taskarith.strategies.fedavg import FedAvg, Reply

MEASURES = ("overlap", "step")


class Covariance(FedAvg):
    """Every matrix follows `merging.input_covariance`, whose sums are added up as replies come; the rest as in FedAvg.

    Keys: `covariance-form`, `covariance-epsilon` ε, `covariance-shrinkage` s, `covariance-weights` n,
    `covariance-mask`. Under a mask task vectors are zero outside it: X is solved as without one and projected on it,
    or each row for its own entries, which is the constrained minimiser and costs a system per row. The bounded form
    holds all replies of a round.
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return X of every matrix and the weighted mean of the rest, in the shapes of `weights`."""
        mask = self.context.mask
        shapes = matrix_shapes({name: (value if mask is None else mask.tensors[name]).shape
                                for name, value in weights.items()})  # fmt: skip
        form = BoundedSum if self.config.covariance_form == "bounded" else CovarianceSum
        sums, mean = {name: form() for name in shapes}, WeightedMean()
        for reply in replies:
            weight = reply.num_examples if self.config.covariance_weights == "examples" else 1.0
            whole = reply.task_vector if mask is None else mask.spread(reply.task_vector)
            for name, layer in sums.items():
                layer.add(whole[name].reshape(shapes[name]), weight)
            mean.add(reply.task_vector, weight)
        average = mean.result()
        whole = average if mask is None else mask.spread(average)
        merged = dict(whole)
        for name, layer in sums.items():
            support = None if mask is None or self.config.covariance_mask == "projected" else mask.tensors[name]
            found = layer.result(
                whole[name].reshape(shapes[name]), self.config.covariance_epsilon, self.config.covariance_shrinkage,
                None if support is None else support.reshape(shapes[name]),
            )  # fmt: skip
            merged[name] = found.reshape(whole[name].shape)
        result = merged if mask is None else mask.gather(merged)
        self._note(sums, result, average)
        return result

    def measured(self) -> dict[str, dict[str, Tensor]]:
        """Return, for every matrix, [rounds] of "overlap" and of "step".

        Overlap is the effective number of clients that share an input direction (`CovarianceSum.overlap`), step is ‖X‖
        over the norm of the mean. Where X is a sum, overlap is 1 and step is up to the number of clients; where it is a
        mean, overlap is the number of clients and step is 1.
        """
        return {kind: under(f"{kind}/", self._kept) for kind in MEASURES}

    def _note(self, sums: dict[str, CovarianceSum], result: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        """Append this round's measures to those of the rounds before."""
        norm = torch.linalg.vector_norm
        overlaps = {name: layer.overlap() for name, layer in sums.items()}
        steps = {name: float(norm(result[name]) / norm(average[name])) for name in sums}
        for kind, values in zip(MEASURES, (overlaps, steps), strict=True):
            before = self.measured()[kind]
            new = {name: torch.tensor([value]) for name, value in values.items()}
            self.keep(kind, {name: torch.cat([before[name].cpu(), own]) if name in before else own
                             for name, own in new.items()})  # fmt: skip
