"""Randomness as a pure function of (seed, purpose, round, client).

Nothing here keeps state, so the order in which clients run, the engine that runs them and an interruption cannot
change a result.
"""

import zlib

import numpy as np


def random_generator(seed: int, purpose: str, server_round: int = 0, client: int = 0) -> np.random.Generator:
    """A fresh generator for one purpose ("participation", "batches", ...) of one client in one round.

    The four values seed PCG64 through numpy's SeedSequence; `purpose` enters by its CRC-32, so that purposes
    have streams of their own. All values are non-negative.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), server_round, client])


def torch_seed(generator: np.random.Generator) -> int:
    """A seed for torch.manual_seed, drawn from `generator`."""
    return int(generator.integers(2**63))
