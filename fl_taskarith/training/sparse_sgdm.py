"""The clients' optimizer: SGD with momentum on the unmasked entries alone. Pure numerics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fl_taskarith.config.settings import Config
from fl_taskarith.masking.mask import Mask

SGD_SETTINGS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")


class SparseSGDM(torch.optim.SGD):
    """SGD with momentum on the unmasked entries of each parameter (Iurada et al., ICLR 2025); the others never change.

    With g the gradient, λ weight decay, μ momentum, on the entries where the mask is True and nowhere else:
        g ← g + λθ;   b ← g on the first step, then b ← μb + (1 − dampening) g;
        d ← g + μb under Nesterov, else b;   θ ← θ − η d.
    torch.optim.SGD's own code computes this on the selected entries: the bits are the same where a mask is all True,
    and the gradients of masked entries are not used, even if they are NaN or infinite. Momentum exists for unmasked
    entries only, as [n] per parameter.

    Args:
        named_parameters: (name, parameter) pairs, contiguous.
        lr: learning rate η.
        masks: a bool tensor of the parameter's shape per name; True = updated. None: all entries of all parameters.
        indices: flat positions of the masks' True entries, int64 [n] per name that has any; computed if None.
        clip_norm: largest 2-norm of the gradient over all unmasked entries together, before weight decay; 0 = off.
        settings: momentum, dampening, weight_decay, nesterov, foreach and fused of torch.optim.SGD.

    Raises:
        ValueError: a parameter has no mask, or one of the wrong shape or dtype; names it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        masks: Mapping[str, Tensor] | None = None,
        indices: Mapping[str, Tensor] | None = None,
        clip_norm: float = 0.0,
        **settings: Any,
    ) -> None:
        named = list(named_parameters)
        if masks is not None:
            for name, parameter in named:
                _check_mask(name, parameter, masks)
        super().__init__([parameter for _, parameter in named], lr=lr, **settings)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale before the step, fused or not
        group = self.param_groups[0]
        group["clip_norm"] = clip_norm
        group["masks"] = None if masks is None else [masks[name] for name, _ in named]
        self._indices: list[Tensor | None] = []
        if indices is None:
            self._index_masks()
        else:
            empty = torch.empty(0, dtype=torch.int64)
            pairs = [(parameter, indices.get(name, empty)) for name, parameter in named]
            self._indices = [None if len(index) == parameter.numel() else index for parameter, index in pairs]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse any group after construction: parameters without a mask would train densely unnoticed."""
        if self.param_groups:
            raise ValueError("SparseSGDM has one group of parameters: give all of them, with masks, at construction.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load momentum, masks and settings from a `state_dict()`."""
        super().load_state_dict(state_dict)
        self._index_masks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step on the parameters, of any shape, that have a gradient and an unmasked entry.

        Returns:
            The closure's loss, a scalar, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        selected, values, gradients = [], [], []
        for parameter, index in zip(group["params"], self._indices, strict=True):
            if parameter.grad is not None and (index is None or len(index)):
                selected.append((parameter, index))
                values.append(_select(parameter, index))
                gradients.append(_select(parameter.grad, index))
        if group["clip_norm"] and gradients:
            gradients = _clipped(gradients, group["clip_norm"])
        with_momentum = group["momentum"] != 0
        buffers = [self.state[parameter].get("momentum_buffer") for parameter, _ in selected] if with_momentum else []
        sgd(values, gradients, buffers, **{name: group[name] for name in SGD_SETTINGS})
        for (parameter, _), buffer in zip(selected, buffers, strict=with_momentum):
            self.state[parameter]["momentum_buffer"] = buffer
        for (parameter, index), value in zip(selected, values, strict=True):
            if index is not None:
                parameter.view(-1).index_copy_(0, index, value)
        return loss

    def _index_masks(self) -> None:
        """Compute the flat positions, int64 [n], of each parameter's unmasked entries; None where all are."""
        group = self.param_groups[0]
        masks = group["masks"] or [None] * len(group["params"])
        self._indices = [
            None if mask is None or bool(mask.all()) else mask.to(parameter.device).flatten().nonzero().flatten()
            for parameter, mask in zip(group["params"], masks, strict=True)
        ]


def _check_mask(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> None:
    mask = masks.get(name)
    if mask is None:
        raise ValueError(f"the parameter {name} has no mask and would train densely: mask it, or leave it out.")
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}: "
            f"expected torch.bool of shape {tuple(parameter.shape)}."
        )
    if not parameter.is_contiguous():
        raise ValueError(f"the parameter {name} is not contiguous, so its entries cannot be selected in place.")


def _select(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Return the entries at `index` in new storage, or the tensor itself."""
    return tensor if index is None else tensor.reshape(-1).index_select(0, index)


def _clipped(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Return gradients scaled to a joint 2-norm of at most `limit`, as torch's clip_grad_norm_ scales them."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    factor = (limit / (norm + 1e-6)).clamp_max(1.0)
    return [gradient * factor for gradient in gradients]


def sgdm(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: Config,
    learning_rate: float,
    mask: Mask | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> SparseSGDM:
    """Return the configuration's optimizer of parameters of any shape; its momentum starts at zero.

    "auto" kernels are torch's choice on a GPU, and fused on a CPU: they take a fifth of the time of a step over many
    small tensors, and give the same bits but for the last one under weight decay. For several clients at once the
    parameters are [clients, ...] and `rows` the `in_every_client` positions of their mask; there is no clipping then.
    """
    named = list(named_parameters)
    masks, indices = (None, rows) if mask is None else (mask.tensors, mask.indices)
    kernels = config.optimizer_kernels
    if kernels == "auto" and all(parameter.device.type == "cpu" for _, parameter in named):
        kernels = "fused"
    return SparseSGDM(
        named,
        learning_rate,
        masks=masks,
        indices=indices,
        momentum=config.momentum,
        dampening=config.dampening,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        foreach=True if kernels == "foreach" else None,
        fused=True if kernels == "fused" else None,
    )


def in_every_client(mask: Mask, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the flat positions, int64 [n], of the entries that `mask` updates in parameters [clients, ...]."""
    positions = {}
    for name, value in stacked.items():
        if name in mask.indices:
            first = torch.arange(0, value.numel(), value[0].numel(), device=value.device)
            positions[name] = (first[:, None] + mask.indices[name]).flatten()
    return positions
