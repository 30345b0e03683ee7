"""Robust aggregates of many groups of vectors at once: the numerics under `merging.robust`.

N vectors lie in B groups of any sizes, each with at least one member; groups do not see each other's vectors. A vector
is given by its parts, tensors [N, ...] with the vectors along their first dimension, an aggregate as [B, ...]. The
task vectors of a round are one group, B = 1; a study of clusters aggregates all clusters in one call.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which group every vector is in: `owner`, int64 [N], of `number` groups."""

    owner: Tensor
    number: int

    @cached_property
    def indicator(self) -> Tensor:
        """The indicator: 1 where a vector is in a group, float64 [B, N]."""
        return (self.owner == torch.arange(self.number, device=self.owner.device)[:, None]).double()

    @cached_property
    def counts(self) -> Tensor:
        """The number of members of each group, float64 [B]."""
        return self.indicator.sum(1)

    @cached_property
    def shares(self) -> Tensor:
        """1/n where a vector is in a group of n, float64 [B, N]; its product with rows gives means."""
        return self.indicator / self.counts[:, None]

    @cached_property
    def by_size(self) -> list[tuple[Tensor, Tensor]]:
        """For each size n > 0, the groups of that size, int64 [b], and their members in order, int64 [b, n]."""
        members = self.owner.argsort(stable=True).split(self.owner.bincount(minlength=self.number).tolist())
        sizes = sorted({len(group) for group in members} - {0})
        same = [[place for place, group in enumerate(members) if len(group) == size] for size in sizes]
        return [(torch.tensor(places), torch.stack([members[place] for place in places])) for places in same]


def one_group(number: int, device: torch.device | str = "cpu") -> Groups:
    """Return one group of all of `number` vectors."""
    return Groups(torch.zeros(number, dtype=torch.int64, device=device), 1)


def per_size(groups: Groups, rows: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Return [B, ...] from rows [N, ...] by a `rule` from b groups of n, [b, n, ...], to [b, ...]; 0 if empty."""
    result = rows.new_zeros(groups.number, *rows.shape[1:])
    for places, members in groups.by_size:
        result[places] = rule(rows[members])
    return result


def means(rows: Tensor) -> Tensor:
    """Return the mean of the members, [b, n, ...] to [b, ...]."""
    return rows.mean(1)


def flat(rows: Tensor, dims: int = 1) -> Tensor:
    """Return rows [n, ...], or [b, n, ...] for `dims` 2, as [n, d] or [b, n, d]: d = 1 where each is a scalar."""
    return rows.reshape(*rows.shape[:dims], math.prod(rows.shape[dims:]))


def middle_mean(rows: Tensor, dropped: int) -> Tensor:
    """Return the mean of every entry without its `dropped` smallest and largest values, [b, n, ...] to [b, ...].

    NaN sorts above every number.
    """
    return _ordered(rows, 1)[:, dropped : rows.shape[1] - dropped].mean(1)


def krum_choice(parts: Iterable[Tensor], byzantine: int, selected: int = 1) -> Tensor:
    """Return the `selected` members of least Krum score per group, int64 [b, selected], of parts [b, n, ...] each."""
    squares = sum((_squared_distances(flat(rows, 2)) for rows in parts), start=torch.zeros((), dtype=torch.float64))
    squares = squares.nan_to_num(nan=math.inf, posinf=math.inf)
    squares.diagonal(dim1=1, dim2=2).zero_()
    number = squares.shape[1]
    nearest = _ordered(squares, 2)[:, :, 1 : number - byzantine - 1]
    return nearest.sum(2).argsort(dim=1, stable=True)[:, :selected].sort(dim=1).values


def geometric_medians(
    parts: Sequence[Tensor], groups: Groups, tolerance: float = 1e-6, max_iterations: int = 100
) -> list[Tensor]:
    """Return the geometric median, [B, ...] per part, of every group's finite vectors (`robust.geometric_median`).

    All groups step together; each starts at its mean and stops by its own distances.

    Raises:
        ValueError: a group without finite vectors.
    """
    shapes = [rows.shape[1:] for rows in parts]
    parts = [flat(rows) for rows in parts]
    finite = _norms(parts).isfinite()
    if not bool(finite.all()):
        parts, groups = [rows[finite] for rows in parts], Groups(groups.owner[finite], groups.number)
        if not bool(groups.counts.all()):
            raise ValueError("no task vector is finite")
    centres = _weiszfeld(parts, groups, tolerance, max_iterations)
    away = _distances(parts, centres, groups)
    nearest = torch.where(groups.indicator > 0, away, math.inf).argmin(1)
    candidates = [rows[nearest] for rows in parts]
    better = groups.indicator @ _distances(parts, candidates, groups) <= groups.indicator @ away
    better &= groups.counts > 2  # between two vectors every point is as good: their mean prefers neither
    return [torch.where(better[:, None], candidate, centre).view(len(candidate), *shape)
            for candidate, centre, shape in zip(candidates, centres, shapes, strict=True)]  # fmt: skip


def _weiszfeld(parts: Sequence[Tensor], groups: Groups, tolerance: float, max_iterations: int) -> list[Tensor]:
    """Return where Weiszfeld's iteration stops, [B, d] from flat parts [N, d]; stopped groups are left out."""
    final = centres = [_weighted(groups.shares, rows) for rows in parts]
    places = torch.arange(groups.number, device=groups.owner.device)  # of the groups that still step
    for _ in range(max_iterations):
        centres, running = _step(parts, groups, centres, tolerance)
        left = int(running.sum())
        if left == groups.number:
            continue
        for whole, centre in zip(final, centres, strict=True):
            whole[places] = centre
        if not left:
            return final
        still = running[groups.owner]
        places, centres = places[running], [centre[running] for centre in centres]
        parts, groups = [rows[still] for rows in parts], Groups((running.cumsum(0) - 1)[groups.owner[still]], left)
    for whole, centre in zip(final, centres, strict=True):
        whole[places] = centre
    return final


def _step(
    parts: Sequence[Tensor], groups: Groups, centres: Sequence[Tensor], tolerance: float
) -> tuple[list[Tensor], Tensor]:
    """Return the next centres, [B, d] each, and which groups continue from there, bool [B]."""
    away = _distances(parts, centres, groups)
    met = away == 0
    crossed = bool(met.any())
    pulls = groups.indicator * (away.reciprocal().masked_fill(met, 0.0) if crossed else away.reciprocal())
    totals = pulls.sum(1, keepdim=True)
    targets = [_weighted(pulls / totals, rows) for rows in parts]
    if crossed:
        targets = _held_back(targets, centres, totals[:, 0], groups.indicator @ met.double())
    moved = _norms(target - centre for target, centre in zip(targets, centres, strict=True))
    return targets, moved > tolerance * (groups.shares @ away)


def _held_back(targets: Sequence[Tensor], centres: Sequence[Tensor], totals: Tensor, met: Tensor) -> list[Tensor]:
    """Return the targets, [B, d], by Vardi & Zhang's step for groups whose centre is at `met` of their vectors, [B].

    The step compares ‖Σ (τ_k − v)/‖τ_k − v‖‖ over the others with that number. A group of equal vectors stays in place.
    """
    force = totals * _norms(target - centre for target, centre in zip(targets, centres, strict=True))
    stay = torch.where(force > 0, (met / force).clamp(max=1.0), 1.0)
    corrected = [torch.lerp(target, centre, stay[:, None].to(target))
              for target, centre in zip(targets, centres, strict=True)]  # fmt: skip
    return [torch.where((totals > 0)[:, None], target, centre)
            for target, centre in zip(corrected, centres, strict=True)]  # fmt: skip


def _weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Return Σ w_bk τ_k of weights [B, N] and rows [N, d]: [B, d]."""
    return weights.to(rows) @ rows


def _ordered(rows: Tensor, dim: int) -> Tensor:
    """Sort along `dim`, NaN last; numpy sorts short columns several times faster than torch."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.detach().numpy(), axis=dim))
    return rows.sort(dim=dim).values


def _distances(parts: Sequence[Tensor], centres: Sequence[Tensor], groups: Groups) -> Tensor:
    """Return ‖τ_k − v‖ of each vector from its own group's v, over all parts together: float64 [N]."""
    return _norms(centre.index_select(0, groups.owner).sub_(rows) for rows, centre in zip(parts, centres, strict=True))


def _norms(parts: Iterable[Tensor]) -> Tensor:
    """Return ‖τ_k‖ of each vector over all parts together, float64 [N]. One part is in memory at a time."""
    norms = [torch.linalg.vector_norm(rows, dim=1).double() for rows in parts]
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()


def _squared_distances(rows: Tensor) -> Tensor:
    """Return ‖τ_i − τ_j‖² within each group, float64 [b, n, n] on the CPU.

    It uses inner products in double precision, which cost a fraction and leave more digits than a choice among vectors
    needs, and differences in single precision.
    """
    if rows.dtype == torch.float64:
        products = rows @ rows.mT
        squares = products.diagonal(dim1=1, dim2=2)
        distances = squares[:, :, None] + squares[:, None, :] - (products + products.mT)
        return distances.clamp_(min=0.0).cpu()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").double().square().cpu()
