"""What FedProx, SCAFFOLD and memories of earlier rounds add to a client's gradients. Pure: no Flower.

Tensors are the trained ones, of any shape, or under a mask its [n] updated entries of each.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def correct_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Tensors,
    indices: Tensors | None,
    *,
    start: Tensors,
    proximal_mu: float = 0.0,
    shift: Tensors | None = None,
) -> None:
    """Before each step of `optimizer`, let g ← g + μ(θ − θ_t) + shift on the trained entries and no others.

    Args:
        parameters: the trained parameters, of any shape, contiguous.
        indices: flat positions of the updated entries, int64 [n] by name; None for all.
        start: θ_t, the global tensors as they came.
        proximal_mu: μ of FedProx's (μ/2)‖θ − θ_t‖² (Li et al., MLSys 2020).
        shift: what is added in every step, such as SCAFFOLD's c − c_k; None for nothing.
    """

    @torch.no_grad()
    def before_step(*_: object) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            index = None if indices is None else indices[name]
            entries = parameter.view(-1) if index is None else parameter.view(-1)[index]
            term = torch.zeros_like(entries)
            if proximal_mu:
                term.add_(entries - start[name].reshape(-1), alpha=proximal_mu)
            if shift is not None:
                term.add_(shift[name].reshape(-1))
            parameter.grad = parameter.grad.contiguous()
            gradient = parameter.grad.view(-1)
            if index is None:
                gradient.add_(term)
            else:
                gradient.index_add_(0, index, term)

    optimizer.register_step_pre_hook(before_step)


def control_shift(control: Tensors, own: Tensors) -> dict[str, Tensor]:
    """Return c − c_k, SCAFFOLD's correction, in the shapes of c; a tensor that `own` lacks is zero."""
    return {name: value - own[name] if name in own else value for name, value in control.items()}


def control_change(control: Tensors, task_vector: Tensors, path: float) -> dict[str, Tensor]:
    """Return c_k⁺ − c_k = −c − τ_k/(ηJ), in the shapes of c: option II of Karimireddy et al. (ICML 2020).

    `path` takes the place of ηJ: the learning rate times `schedules.step_coefficient_sum`, which is J for plain SGD. So
    c_k⁺ is the mean of the client's gradients, weighted as its steps were, with momentum too.
    """
    return {name: -value - task_vector[name] / path for name, value in control.items()}


def momentum_shift(momentum: Tensors, beta: float, path: float) -> dict[str, Tensor]:
    """Return (β / ηJ) m, in the shapes of m: over all local steps it moves the weights by −β m.

    That is the heavy ball of Zaccone et al. (TMLR 2025). `path` takes the place of ηJ, as in `control_change`.
    """
    return {name: (beta / path) * value for name, value in momentum.items()}


def momentum_of_visits(anchor: Tensors, current: Tensors, share: float) -> dict[str, Tensor]:
    """Return m = C (anchor − θ), in the shapes of θ: the way since a client's last visit, per round.

    A client that is sampled with probability C = `share` returns after 1/C rounds, exactly so under cyclic
    participation. A tensor that `anchor` lacks is zero.
    """
    return {
        name: share * (anchor[name] - value) if name in anchor else torch.zeros_like(value)
        for name, value in current.items()
    }
