"""Server optimizers: the aggregated task vector Δ taken as a negative gradient. Pure: dictionaries of tensors.

Tensors kept between rounds are handed in and returned, never written to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def momentum_step(delta: Mapping[str, Tensor], velocity: Mapping[str, Tensor], momentum: float) -> Tensors:
    """v ← βv + Δ, which is also the direction of the server's step (FedAvgM; Hsu et al. 2019)."""
    return {name: torch.add(value, velocity[name], alpha=momentum) for name, value in delta.items()}


@dataclass(frozen=True)
class Moments:
    """m and v of an adaptive server optimizer, by the names of the task vector."""

    first: Tensors
    second: Tensors


def adaptive_direction(moments: Moments, tau: float) -> Tensors:
    """m / (√v + τ), the direction of an adaptive server step."""
    return {name: first / (moments.second[name].sqrt() + tau) for name, first in moments.first.items()}


def adam_moments(delta: Mapping[str, Tensor], last: Moments, beta1: float, beta2: float) -> Moments:
    """m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ² (FedAdam; Reddi et al., ICLR 2021, Algorithm 2: no bias correction)."""
    second = {name: beta2 * last.second[name] + (1 - beta2) * value.square() for name, value in delta.items()}
    return Moments(_first(delta, last.first, beta1), second)


def yogi_moments(delta: Mapping[str, Tensor], last: Moments, beta1: float, beta2: float) -> Moments:
    """m as for Adam, v ← v − (1 − β₂)Δ² sign(v − Δ²) (FedYogi; Reddi et al., ICLR 2021, Algorithm 2)."""
    second = {}
    for name, value in delta.items():
        square = value.square()
        second[name] = last.second[name] - (1 - beta2) * square * torch.sign(last.second[name] - square)
    return Moments(_first(delta, last.first, beta1), second)


def _first(delta: Mapping[str, Tensor], last: Mapping[str, Tensor], beta1: float) -> Tensors:
    return {name: beta1 * last[name] + (1 - beta1) * value for name, value in delta.items()}
