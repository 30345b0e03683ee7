"""Server optimizers, to which the aggregated task vector Δ is a negative gradient. Pure: dictionaries of tensors.

All tensors of a name have the same shape. Those of the last round are handed in and never written to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def momentum_step(delta: Mapping[str, Tensor], velocity: Mapping[str, Tensor], momentum: float) -> Tensors:
    """Return v ← βv + Δ, in the shapes of Δ: the direction of the server's step (FedAvgM; Hsu et al. 2019)."""
    return {name: torch.add(value, velocity[name], alpha=momentum) for name, value in delta.items()}


@dataclass(frozen=True)
class Moments:
    """m and v of an adaptive server optimizer, by the names of the task vector."""

    first: Tensors
    second: Tensors


def adaptive_direction(moments: Moments, tau: float) -> Tensors:
    """Return m / (√v + τ), the direction of an adaptive server step, in the shapes of m."""
    return {name: first / (moments.second[name].sqrt() + tau) for name, first in moments.first.items()}


def adam_moments(delta: Mapping[str, Tensor], last: Moments, beta1: float, beta2: float) -> Moments:
    """Return m ← β₁m + (1 − β₁)Δ and v ← β₂v + (1 − β₂)Δ², in the shapes of Δ.

    FedAdam, Algorithm 2 of Reddi et al. (ICLR 2021), which corrects no bias.
    """
    second = {name: beta2 * last.second[name] + (1 - beta2) * value.square() for name, value in delta.items()}
    return Moments(_first(delta, last.first, beta1), second)


def yogi_moments(delta: Mapping[str, Tensor], last: Moments, beta1: float, beta2: float) -> Moments:
    """Return m as for Adam and v ← v − (1 − β₂)Δ² sign(v − Δ²), in the shapes of Δ (FedYogi; Algorithm 2, ibid.)."""
    second = {}
    for name, value in delta.items():
        square = value.square()
        second[name] = last.second[name] - (1 - beta2) * square * torch.sign(last.second[name] - square)
    return Moments(_first(delta, last.first, beta1), second)


def _first(delta: Mapping[str, Tensor], last: Mapping[str, Tensor], beta1: float) -> Tensors:
    return {name: beta1 * last[name] + (1 - beta1) * value for name, value in delta.items()}
