"""FedAvg whose linear layers are averaged by what each client's data put into them (`merging.gram_anchored`)."""

from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.records import payload_bytes
from fl_taskarith.engine.replies import check_finite, number, tensors_of
from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.gram_matching import GramAnchoredSum, per_entry, total
from fl_taskarith.strategies.fedavg import FedAvg, Reply

GRAM = "gram"


class GramAnchored(FedAvg):
    """Keys `gram-anchor` γ and `gram-epsilon` ε. Every client sends its diagonal Grams once, before the first round.

    That round's row counts their bytes, and the seconds that clients took for them.
    They are of the weights at that time: a round's own would cost a pass over every shard, and change little while the
    weights stay near the pretrained ones. What is no linear layer's weight is averaged as FedAvg does.
    """

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """FedAvg's messages; in the first round, after all clients were asked for their Grams."""
        messages = super().configure_train(server_round, arrays, config, grid)
        layers = {name for kept in self._diagonals().values() for name in kept}
        if layers != set(self.linear_shapes):  # none yet, or those of the rounds that trained the head
            self._ask(server_round, arrays, grid)
        return messages

    def _ask(self, server_round: int, arrays: ArrayRecord, grid: PartitionGrid) -> None:
        settings = settings_record(self.config, self.round_settings(server_round, 0))
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: settings})
        partitions = grid.get_node_ids()
        asked = {name: (torch.float32, (shape[1],)) for name, shape in self.linear_shapes.items()}

        def read(reply: Message) -> tuple[int, dict[str, Tensor]]:
            self.traffic.seconds += number(reply, "train-seconds")
            diagonals = tensors_of(reply, self.arrayrecord_key, self.device, asked)
            check_finite(reply, diagonals)
            self.traffic.uplink += payload_bytes(reply.content.array_records[self.arrayrecord_key])
            return reply.metadata.src_node_id, diagonals

        questions = (Message(content, partition, "query.gram") for partition in partitions)
        kept = {
            f"{client}/{name}": value
            for client, diagonals in self.failures.read(grid.exchange(questions), read)
            for name, value in diagonals.items()
        }
        if not kept:
            raise self.failures.of_all("The question for Grams")
        self.keep(GRAM, kept)
        self.traffic.downlink += len(partitions) * payload_bytes(arrays)

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """ΔW of every linear layer, the weighted mean of the rest. A client without Grams counts as the mean one."""
        diagonals = self._diagonals()
        clients = self.config.num_clients
        everybody = {name: total(diagonals, name) * (clients / len(diagonals)) for name in self.linear_shapes}
        indices = {} if self.mask is None else self.mask.indices
        sums = {name: GramAnchoredSum() for name in self.linear_shapes if name in weights}
        present = {name: torch.zeros_like(everybody[name]) for name in sums}
        mean, heard = WeightedMean(), 0
        for reply in replies:
            heard += 1
            for name, layer in sums.items():
                own = diagonals[reply.client][name] if reply.client in diagonals else everybody[name] / clients
                present[name] += own
                layer.add(reply.task_vector[name], per_entry(own, self.linear_shapes[name][0], indices.get(name)))
            others = {name: value for name, value in reply.task_vector.items() if name not in sums}
            mean.add(others, reply.num_examples)
        if not heard:
            return {}
        result = mean.result()
        for name, layer in sums.items():
            absent = (everybody[name] - present[name]).clamp_min(0.0)
            absent = per_entry(absent, self.linear_shapes[name][0], indices.get(name))
            result[name] = layer.result(absent, self.config.gram_anchor, self.config.gram_epsilon)
        return {name: result[name] for name in weights}

    def _diagonals(self) -> dict[int, dict[str, Tensor]]:
        """What every client sent, by client and layer."""
        kept: dict[int, dict[str, Tensor]] = {}
        for key, value in self._kept.items():
            kind, client, name = (*key.split("/", 2), "", "")[:3]
            if kind == GRAM:
                kept.setdefault(int(client), {})[name] = value
        return kept
