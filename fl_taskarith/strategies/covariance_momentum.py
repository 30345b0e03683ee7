"""Covariance aggregation with momentum on the server, as FedAvgM has it."""

from fl_taskarith.strategies.covariance import Covariance
from fl_taskarith.strategies.fedavgm import FedAvgM


class CovarianceMomentum(FedAvgM, Covariance):
    """v ← βv + X, θ ← θ + η_s v, with X of `Covariance` and β = `server-momentum`."""
