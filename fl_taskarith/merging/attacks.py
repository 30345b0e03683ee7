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

from fl_taskarith.merging.grouped import Groups, flat, means, one_group, per_size
from fl_taskarith.merging.robust import stacked, trimmed_count
from fl_taskarith.seeding import random_generator

DATA_ATTACKS = ("scaled-model", "random-labels")


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
    """Return the task vectors of one round, those of Byzantine clients replaced by what `attack` sends.

    Args:
        task_vectors: of all clients, as if all were honest; tensors of any shape by name.
        attack, scale: as of `corrupted_groups`.
    """
    if attack in DATA_ATTACKS or not any(byzantine):
        return list(task_vectors)
    lies: dict[str, Tensor] = {}
    for name in task_vectors[0]:
        rows = stacked(task_vectors, name)
        bad, groups = torch.tensor(byzantine, device=rows.device), one_group(len(rows), rows.device)
        lies[name] = corrupted_groups(flat(rows), bad, groups, attack, scale).view_as(rows)[bad]
    sent = iter(zip(*lies.values(), strict=True))
    return [
        dict(zip(lies, next(sent), strict=True)) if bad else vector
        for vector, bad in zip(task_vectors, byzantine, strict=True)
    ]


def corrupted_groups(rows: Tensor, byzantine: Tensor, groups: Groups, attack: str, scale: float) -> Tensor:
    """Return the rows [N, d] with those of attackers, `byzantine` bool [N], replaced; each sees its own group alone.

    Args:
        attack: "sign-flip" sends −s τ of the attacker's own honest τ, as does whoever has no honest client in its
            group. "alie" sends μ − z σ of the honest rows' mean and standard deviation (`_shift`), "inner-product" −s μ
            (Xie, Koyejo, Gupta, UAI 2019). An attack on data leaves the rows as they are.
        scale: s.
    """
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
        lies -= rows.new_tensor(shifts)[:, None] * deviations
    else:
        lies *= -scale
    hidden = byzantine & (honest.counts > 0)[groups.owner]  # among somebody
    return torch.where(hidden[:, None], lies[groups.owner], flipped)


@cache
def _shift(clients: int, attackers: int) -> float:
    """Return z = Φ⁻¹((n − f − s) / (n − f)) with s = ⌊n/2 + 1⌋ − f supporters, n `clients`, f of them Byzantine.

    Few attackers cannot hide a large deviation (Baruch, Baruch, Goldberg, "A Little Is Enough", NeurIPS 2019, Alg. 3).
    """
    supporters = clients // 2 + 1 - attackers
    share = (clients - attackers - supporters) / (clients - attackers)
    return float(norm.ppf(min(max(share, 0.5), 1 - 1e-6)))
