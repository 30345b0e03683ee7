"""FedProx (Li et al., MLSys 2020): FedAvg over clients that stay near the global model."""

from fl_taskarith.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """Aggregates as FedAvg does; clients add the term (μ/2)‖θ − θ_t‖² to their loss where `proximal-mu` is set."""

    streams = True
