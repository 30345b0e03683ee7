"""LocalGHBM (Zaccone et al., TMLR 2025): GHBM whose momentum each client computes from its own last visit."""

from fl_taskarith.strategies.fedavg import FedAvg


class LocalGHBM(FedAvg):
    """Clients add (β/ηJ) m, m = C (θ of the last visit − θ_t), β = `server-momentum`: as much traffic as FedAvg.

    A client keeps the global weights of its last visit in a file (`client.local_work`). Under cyclic participation it
    is GHBM from the second cycle on. See `GHBM` for the rate.
    """
