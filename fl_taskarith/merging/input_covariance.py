"""Averaging of matrices by the inputs that each client's own update was made of: from updates alone, without data.

An SGD step changes a linear layer by −η Σ δ xᵀ, so the rows of a client's task vector T [out, in] lie in the span of
its inputs x, and G = TᵀT [in, in] stands in for their second moments, which RegMean (Jin et al., ICLR 2023) needs. With
weights w = n/‖T‖² the merged X minimises

    (1 − s) Σ w ‖(X − T) Tᵀ‖² + (s/d) Σ n ‖X − T‖² + ε' ‖X‖²,     d = in,

whose first term is WUDI's (2025) objective. In closed form

    X = ((1 − s) Σ w T G + (s/d) Σ n T) ((1 − s) Σ w G + (s/d) Σ n I + ε' I)⁻¹,     ε' = ε tr(Σ w G) / d,

and tr(Σ w G) is Σ n over clients with T ≠ 0.

Where the clients' inputs share no direction, X is the sum of the task vectors; where they have the same G, their mean
(both at s = 0 and as ε goes to 0). The shrinkage s, from covariance estimation (Ledoit & Wolf 2004), mixes every G with
a multiple of the identity: s = 1 is the mean. All sums are additive, so clients are added one at a time.

X may be far longer than the sum of the task vectors: where two clients' inputs nearly agree and their updates do not,
least squares fit the difference with the little that tells the inputs apart. `BoundedSum` keeps both limits and never
exceeds the clients' own lengths. With A = Σ w G + ε' I it shares every direction out among the clients,

    X = Σ T P,     P = A^(−½) w G A^(−½),     0 ≤ P ≤ I,     Σ P ≤ I,

as the square-root measurement of quantum information does (Hausladen & Wootters 1994). It needs all T once A is known.
"""

import torch
from torch import Tensor

ROUNDING = 4  # least ε, in units of d times the relative rounding error
ROWS_AT_ONCE = 64  # of systems that are solved together, each of up to in² entries


class CovarianceSum:
    """Adds up Σ w G and Σ w T G of one matrix, client by client, in float32 (float64 of float64)."""

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._directed: Tensor | float = 0.0  # Σ n over T other than zero
        self._gram: Tensor | None = None
        self._product: Tensor | None = None
        self._squares: Tensor | float = 0.0  # Σ ‖w G‖²

    def add(self, matrix: Tensor, weight: float = 1.0) -> None:
        """Add one client's T, [out, in], n = `weight`; a T of zeros has no directions and counts in the mean alone."""
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        unit, norm, gram = self._add_directions(matrix, weight)
        rows, columns = unit.shape
        product = (unit @ unit.mT) @ unit if 2 * rows < columns else unit @ gram
        if self._product is None:
            self._product = (weight * norm) * product
        else:
            self._product.addcmul_(product, weight * norm)

    def overlap(self) -> float:
        """Return the effective number of clients that share an input direction, ‖Σ w G‖² / Σ ‖w G‖².

        It is 1 where no two clients share one, so that X is their sum, and the number of clients where all have the
        same G (and weight), so that X is their mean. NaN without any direction.
        """
        return float(torch.linalg.vector_norm(self._gram_sum()) ** 2 / self._squares)

    def result(self, mean: Tensor, epsilon: float, shrinkage: float = 0.0, support: Tensor | None = None) -> Tensor:
        """Return X, [out, in].

        Args:
            mean: Σ n T / Σ n, [out, in].
            epsilon: ε, as a share of the mean of the diagonal of Σ w G. The least is what rounding leaves of directions
                that no client has: 7e-4 for 1,536 inputs in float32. At 1e-3 rounding enters X by 2 % if only 8 of
                1,000 directions are used, and by 0.01 % over a spectrum that falls off.
            shrinkage: s, from 0 to 1.
            support: bool [out, in]: X is the minimiser among matrices that are zero elsewhere, row by row. Every T must
                be zero there too.
        """
        gram, product = self._gram_sum().double(), self._product_sum().double()
        share = self.total_weight / len(gram)
        gram = (1 - shrinkage) * gram
        gram.diagonal().add_((shrinkage + self._least(epsilon) * (self._moved / self.total_weight)) * share)
        product = (1 - shrinkage) * product + shrinkage * share * mean.double()
        solved = _solved(gram, product) if support is None else _solved_by_row(gram, product, support)
        return solved.to(mean)

    def gradient(self, at: Tensor) -> Tensor:
        """Return the gradient of Σ w ‖(X − T) Tᵀ‖² at X = `at`, [out, in]: 2 (X Σ w G − Σ w T G)."""
        return 2 * (at @ self._gram_sum() - self._product_sum())

    @property
    def _moved(self) -> float:
        """Σ n over clients with T ≠ 0; over all where there is none, so that a system of zeros can be solved."""
        return float(self._directed) or self.total_weight

    def _least(self, epsilon: float) -> float:
        """Return ε, or what rounding leaves of directions that no client has, if that is more."""
        gram = self._gram_sum()
        return max(epsilon, ROUNDING * len(gram) * torch.finfo(gram.dtype).eps)

    def _add_directions(self, matrix: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Add one client's w G, and return T / ‖T‖, ‖T‖ and G of that."""
        norm = torch.linalg.vector_norm(matrix)
        unit = torch.where(norm > 0, matrix / norm, 0.0)
        gram = unit.mT @ unit
        if self._gram is None:
            self._gram = weight * gram
        else:
            self._gram.add_(gram, alpha=weight)
        self._squares += (weight * torch.linalg.vector_norm(gram)) ** 2
        self.total_weight += weight
        self._directed += weight * (norm > 0).double()
        return unit, norm, gram

    def _gram_sum(self) -> Tensor:
        return _of_somebody(self._gram)

    def _product_sum(self) -> Tensor:
        return _of_somebody(self._product)


class BoundedSum(CovarianceSum):
    """Keeps every T, for X = Σ T P of the module's docstring; for its roots an eigendecomposition of [in, in]."""

    def __init__(self) -> None:
        super().__init__()
        self._added: list[tuple[Tensor, float]] = []

    def add(self, matrix: Tensor, weight: float = 1.0) -> None:
        """Add a copy of one client's T, [out, in], n = `weight`; a T of zeros counts for nothing."""
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
        self._add_directions(matrix, weight)
        self._added.append((matrix, weight))

    def result(self, mean: Tensor, epsilon: float, shrinkage: float = 0.0, support: Tensor | None = None) -> Tensor:
        """Return X, [out, in]; `shrinkage` and `support` change nothing.

        Args:
            mean: gives the dtype.
            epsilon: ε, as for `CovarianceSum.result`.
        """
        gram = self._gram_sum().double()
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0) + self._least(epsilon) * self._moved / len(gram)
        root = ((vectors / values.sqrt()) @ vectors.mT).to(self._added[0][0])
        total = torch.zeros_like(self._added[0][0])
        for matrix, weight in self._added:
            norm = torch.linalg.vector_norm(matrix)
            unit = torch.where(norm > 0, matrix / norm, 0.0)
            turned = unit @ root
            total.addcmul_((turned @ unit.mT) @ turned, weight * norm)
        return total.to(mean)


def _of_somebody(total: Tensor | None) -> Tensor:
    if total is None:
        raise ValueError("there are no task vectors to aggregate")
    return total


def _solved(gram: Tensor, product: Tensor) -> Tensor:
    """Return product · gram⁻¹ for a positive definite gram [..., in, in] and product [..., out, in]."""
    solved: Tensor = torch.cholesky_solve(product.mT, torch.linalg.cholesky(gram)).mT
    return solved


def _solved_by_row(gram: Tensor, product: Tensor, support: Tensor) -> Tensor:
    """Return X, [out, in], row i of which solves the system of the columns in row i of `support`, bool [out, in]."""
    result = torch.zeros_like(product)
    sizes = support.sum(1)
    for rows in sizes.argsort().split(ROWS_AT_ONCE):  # of about one size, so that little is padded
        width = int(sizes[rows[-1]])
        if not width:
            continue
        columns = support[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        inside = torch.arange(width, device=columns.device) < sizes[rows][:, None]
        both = inside[:, :, None] & inside[:, None, :]
        systems = torch.where(both, gram[columns[:, :, None], columns[:, None, :]], 0.0)
        systems.diagonal(dim1=1, dim2=2).add_((~inside).double())
        targets = torch.where(inside, product[rows].gather(1, columns), 0.0)
        result[rows] = torch.zeros_like(result[rows]).scatter_(1, columns, _solved(systems, targets[:, None])[:, 0])
    return result
