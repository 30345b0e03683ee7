"""Aggregation algorithms by their configuration name. A new one is a file here and a line in `STRATEGIES`."""

from fl_taskarith.strategies.fedavg import FedAvg

STRATEGIES: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
