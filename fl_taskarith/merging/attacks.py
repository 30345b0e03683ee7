"""What Byzantine clients send in place of their task vectors. Pure: task vectors in, task vectors out.

An omniscient attacker sees what the honest clients of the round (of the cluster it reports to) send. `DATA_ATTACKS`
change a client's data or model instead, and happen on the client.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from fl_taskarith.merging.grouped import Groups, means, per_size
from fl_taskarith.merging.robust import TaskVectors, stacked, trimmed_count
from fl_taskarith.seeding import random_generator

REPORT_ATTACKS = ("sign-flip", "alie", "inner-product")
DATA_ATTACKS = ("scaled-model", "random-labels")
ATTACKS = (*REPORT_ATTACKS, *DATA_ATTACKS)


def draw_byzantine(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which clients are Byzantine, bool [m]: ⌊α m_g⌋ drawn from every group g of the clients' `groups`, int [m].

    A draw is per group, because a robust rule protects a cluster only while the share of attackers in it is bounded.
    """
    byzantine = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        drawn = random_generator(seed, "byzantine", client=int(group)).permutation(members)
        byzantine[drawn[: trimmed_count(fraction, len(members))]] = True
    return byzantine


def corrupted(
    task_vectors: Sequence[Mapping[str, Tensor]], byzantine: Sequence[bool], attack: str, scale: float
) -> list[Mapping[str, Tensor]]:
    """Return the task vectors of one round, with those of Byzantine clients replaced by what `attack` sends.

    Args:
        task_vectors: of all clients, as if all were honest; tensors of any shape by name.
        attack: one of `ATTACKS`; an attack on data leaves reports as they are.
        scale: s of `sign_flip` and ε of `inner_product`.
    """
    if attack in DATA_ATTACKS or not any(byzantine):
        return list(task_vectors)
    honest = [vector for vector, bad in zip(task_vectors, byzantine, strict=True) if not bad]
    if attack == "sign-flip" or not honest:  # nobody to hide among: turn the own report around
        return [sign_flip(vector, scale) if bad else vector
                for vector, bad in zip(task_vectors, byzantine, strict=True)]  # fmt: skip
    lie = alie(honest, len(byzantine)) if attack == "alie" else inner_product(honest, scale)
    return [lie if bad else vector for vector, bad in zip(task_vectors, byzantine, strict=True)]


def corrupted_groups(rows: Tensor, byzantine: Tensor, groups: Groups, attack: str, scale: float) -> Tensor:
    """Return `corrupted` of every group's rows, [N, d]; `byzantine` is bool [N]. An attacker sees its own group."""
    if attack in DATA_ATTACKS or not bool(byzantine.any()):
        return rows
    flipped = torch.where(byzantine[:, None], -scale * rows, rows)
    if attack == "sign-flip":
        return flipped
    honest = Groups(groups.owner[~byzantine], groups.number)
    lies = per_size(honest, rows[~byzantine], means)
    if attack == "alie":
        sizes = zip(groups.counts.tolist(), honest.counts.tolist(), strict=True)
        shifts = [_shift(int(number), int(number - left)) if left else 0.0 for number, left in sizes]
        deviations = per_size(honest, rows[~byzantine], lambda same: same.std(1, correction=0))
        lies -= torch.tensor(shifts, dtype=rows.dtype)[:, None] * deviations
    else:
        lies *= -scale
    hidden = byzantine & (honest.counts > 0)[groups.owner]  # among somebody
    return torch.where(hidden[:, None], lies[groups.owner], flipped)


def sign_flip(task_vector: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return −s τ of the attacker's own honest τ, in its shapes."""
    return {name: -scale * value for name, value in task_vector.items()}


def alie(honest: TaskVectors, clients: int) -> dict[str, Tensor]:
    """Return μ − z σ, of the honest clients' mean and standard deviation of every entry, in their shapes.

    z = Φ⁻¹((n − f − s) / (n − f)) with s = ⌊n/2 + 1⌋ − f supporters, n = `clients` and f of them Byzantine (Baruch,
    Baruch, Goldberg, "A Little Is Enough", NeurIPS 2019, Algorithm 3): few attackers cannot hide a large deviation.
    """
    z = _shift(clients, clients - len(honest))
    rows = {name: stacked(honest, name) for name in honest[0]}
    return {name: each.mean(0) - z * each.std(0, correction=0) for name, each in rows.items()}


def inner_product(honest: TaskVectors, scale: float) -> dict[str, Tensor]:
    """Return −ε times the honest clients' mean, in their shapes (Xie, Koyejo, Gupta, UAI 2019)."""
    return {name: -scale * stacked(honest, name).mean(0) for name in honest[0]}


@cache
def _shift(clients: int, attackers: int) -> float:
    """Return z of `alie`."""
    supporters = clients // 2 + 1 - attackers
    share = (clients - attackers - supporters) / (clients - attackers)
    return float(norm.ppf(min(max(share, 0.5), 1 - 1e-6)))
