"""FedCM (Xu et al. 2021): clients follow the global direction of the last round beside their own gradients."""

from fl_taskarith.strategies.ghbm import GHBM


class FedCM(GHBM):
    """GHBM with the memory of one round.

    FedCM's steps η (α g + (1 − α) Δ) are these at the rate αη with `server-momentum` β = 1 − α.
    """

    def span(self) -> int:
        """Return 1."""
        return 1
