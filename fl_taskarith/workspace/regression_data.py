"""The regression data that settings describe, and the attackers among its clients, built once per process."""

from functools import lru_cache

from fl_taskarith.config.settings import Config
from fl_taskarith.mixtures.adversary import Adversary
from fl_taskarith.mixtures.regression import Mixture


@lru_cache(maxsize=1)
def mixture_of(config: Config) -> Mixture:
    """Return the mixture that the settings describe."""
    return Mixture(
        clients=config.num_clients,
        clusters=config.num_clusters,
        dimension=config.dimension,
        examples=config.examples_per_client,
        noise=config.noise,
        centres=config.cluster_centres,
        sizes=config.cluster_sizes,
        separation=config.separation,
        farthest=config.farthest_separation,
        seed=config.seed,
    )


@lru_cache(maxsize=1)
def adversary_of(config: Config) -> Adversary:
    """Return the attackers among the clients of that mixture."""
    return Adversary(mixture_of(config), config.byzantine_fraction, config.attack, config.attack_placement)
