"""FedAvg whose linear layers are averaged by the inputs that each client's data give them (`merging.gram_matching`)."""

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fl_taskarith.engine.client_questions import ask_all, check_squares
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.question import Question
from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.gram_matching import GramAnchoredSum, per_entry, total
from fl_taskarith.strategies.fedavg import FedAvg, Reply

GRAM = "gram"


class GramAnchored(FedAvg):
    """Keys: `gram-anchor` γ and `gram-epsilon` ε. Every client sends its diagonal Grams once, before the first round.

    The first round's row counts their bytes and the clients' seconds. Grams are those of the weights at that time: new
    ones in each round would cost a pass over every shard, and would change little while the weights stay near the
    pretrained ones. Parameters other than linear layers' weights are averaged as in FedAvg.
    """

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Return FedAvg's messages; before the first round, ask all clients for their Grams."""
        messages = super().configure_train(server_round, arrays, config, grid)
        layers = {name for grams in self._diagonals().values() for name in grams}
        if layers != set(self.context.linear_shapes):  # none yet, or those of the rounds that trained the head
            self._ask_for_grams(server_round, arrays, grid)
        return messages

    def _ask_for_grams(self, server_round: int, arrays: ArrayRecord, grid: PartitionGrid) -> None:
        settings = settings_record(self.config, self.round_settings(server_round, 0))
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: settings})
        layout = {name: (torch.float32, (shape[1],)) for name, shape in self.context.linear_shapes.items()}
        question = Question(server_round, layouts={self.arrayrecord_key: layout}, examples_of=self.context.shard_size)

        def check(client: int, tensors: dict[str, Tensor]) -> None:
            check_squares(tensors, self.context.shard_size(client) if self.context.shard_size is not None else 1.0)

        replies = ask_all(grid, self.failures, content, "query.gram", question, self.device, self.traffic, check)
        grams = {f"{client}/{name}": value for client, diagonals in replies for name, value in diagonals.items()}
        if not grams:
            raise self.failures.of_all("The question for Grams")
        self.keep(GRAM, grams)

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return ΔW of every linear layer and the weighted mean of the rest, in the shapes of `weights`.

        A client without Grams counts as the mean one.
        """
        diagonals, clients, shapes = self._diagonals(), self.config.num_clients, self.context.linear_shapes
        totals = {name: total(diagonals, name) * (clients / len(diagonals)) for name in shapes}
        indices = {} if self.context.mask is None else self.context.mask.indices
        sums = {name: GramAnchoredSum() for name in shapes if name in weights}
        present = {name: torch.zeros_like(totals[name]) for name in sums}
        mean = WeightedMean()
        for reply in replies:
            for name, layer in sums.items():
                own = diagonals[reply.client][name] if reply.client in diagonals else totals[name] / clients
                present[name] += own
                layer.add(reply.task_vector[name], per_entry(own, shapes[name][0], indices.get(name)))
            mean.add({name: value for name, value in reply.task_vector.items() if name not in sums}, reply.num_examples)
        result = mean.result()
        for name, layer in sums.items():
            absent = per_entry((totals[name] - present[name]).clamp_min(0.0), shapes[name][0], indices.get(name))
            result[name] = layer.result(absent, self.config.gram_anchor, self.config.gram_epsilon)
        return {name: result[name] for name in weights}

    def _diagonals(self) -> dict[int, dict[str, Tensor]]:
        """Return the Grams that every client sent, by client and layer."""
        grams: dict[int, dict[str, Tensor]] = {}
        for key, value in self._kept.items():
            kind, client, name = (*key.split("/", 2), "", "")[:3]
            if kind == GRAM:
                grams.setdefault(int(client), {})[name] = value
        return grams
