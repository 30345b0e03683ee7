"""FedHBM (Zaccone et al., TMLR 2025): momentum from the model that a client itself trained last."""

from fl_taskarith.strategies.fedavg import FedAvg


class FedHBM(FedAvg):
    """LocalGHBM with m = C (the client's own last trained weights − θ_t), which the client keeps in a file."""
