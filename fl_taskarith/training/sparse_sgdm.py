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
        clients: of several at once their number n: parameters are [n, ...], and each client's gradient has a norm of
            its own; 0 for one model.
        settings: momentum, dampening, weight_decay, nesterov, foreach and fused of torch.optim.SGD.

    Attributes:
        takes_part: of several clients, bool [n], those that take the next steps; None for all. The weights and the
            momentum of others stay as they are, whatever their gradients.

    Raises:
        ValueError: a parameter has no mask, or one of the wrong shape or dtype; names it.
    """

    takes_part: Tensor | None = None

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        masks: Mapping[str, Tensor] | None = None,
        indices: Mapping[str, Tensor] | None = None,
        clip_norm: float = 0.0,
        clients: int = 0,
        **settings: Any,
    ) -> None:
        named = list(named_parameters)
        if masks is not None:
            for name, parameter in named:
                _check_mask(name, parameter, masks)
        super().__init__([parameter for _, parameter in named], lr=lr, **settings)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale before the step, fused or not
        group = self.param_groups[0]
        group["clip_norm"], self._clients = clip_norm, clients
        self._begun: Tensor | None = None  # bool [n]: which clients have taken a step, where not all take all
        group["masks"] = None if masks is None else [masks[name] for name, _ in named]
        self._indices: list[Tensor | None] = []
        self._given = indices is not None
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
        """Load momentum, masks and settings from a `state_dict()`; entries given as `indices` stay those given."""
        super().load_state_dict(state_dict)
        if self.param_groups[0]["masks"] is not None or not self._given:
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
            gradients = _clipped(gradients, group["clip_norm"], self._clients)
        with_momentum = group["momentum"] != 0
        buffers = [self.state[parameter].get("momentum_buffer") for parameter, _ in selected] if with_momentum else []
        if self.takes_part is None:
            sgd(values, gradients, buffers, **{name: group[name] for name in SGD_SETTINGS})
        else:
            self._step_of_some(self.takes_part, values, gradients, buffers)
        for (parameter, _), buffer in zip(selected, buffers, strict=with_momentum):
            self.state[parameter]["momentum_buffer"] = buffer
        for (parameter, index), value in zip(selected, values, strict=True):
            if index is not None:
                parameter.view(-1).index_copy_(0, index, value)
        return loss

    @torch.no_grad()
    def zero_masked_gradients(self) -> None:
        """Set the gradients of masked entries to 0, so that whether gradients are finite is not judged by them."""
        for parameter, index in zip(self.param_groups[0]["params"], self._indices, strict=True):
            if parameter.grad is not None and index is not None:
                rest = parameter.grad.new_zeros(parameter.numel())
                parameter.grad = rest.index_copy_(0, index, _select(parameter.grad, index)).view_as(parameter)

    def _step_of_some(
        self, takes_part: Tensor, values: list[Tensor], gradients: list[Tensor], buffers: list[Tensor | None]
    ) -> None:
        """Let the clients that `takes_part`, bool [n], step from values [n, ...], without waiting for the device."""
        group = self.param_groups[0]
        begun = torch.zeros_like(takes_part) if self._begun is None else self._begun
        decay = torch.where(takes_part, group["momentum"], 1.0)
        share = torch.where(begun, 1.0 - group["dampening"], 1.0)
        for index, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            rows = value.view(self._clients, -1)
            change = gradient.view_as(rows).where(takes_part[:, None], 0.0)
            change = change.add(rows, alpha=group["weight_decay"]) if group["weight_decay"] else change
            if buffers:
                buffer = torch.zeros_like(value) if (old := buffers[index]) is None else old
                buffers[index] = buffer
                moments = buffer.view_as(rows)
                moments.mul_(decay[:, None]).add_(change * (share * takes_part)[:, None])
                change = change.add(moments, alpha=group["momentum"]) if group["nesterov"] else moments
            rows.sub_(change * (group["lr"] * takes_part)[:, None])
        self._begun = begun | takes_part

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


def _clipped(gradients: Sequence[Tensor], limit: float, clients: int) -> list[Tensor]:
    """Return gradients scaled to a joint 2-norm of at most `limit`, as torch's clip_grad_norm_ scales them.

    Args:
        gradients: of any shape; of `clients` above 0, [clients, ...] flat or not, each with a norm of its own.
    """
    flat = [gradient.reshape(clients or 1, -1) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each, dim=1) for each in flat]), dim=0)
    factor = (limit / (norm + 1e-6)).clamp_max(1.0)
    return [(each * factor[:, None]).view_as(gradient) for each, gradient in zip(flat, gradients, strict=True)]


def sgdm(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: Config,
    learning_rate: float,
    mask: Mask | None = None,
    rows: Mapping[str, Tensor] | None = None,
    clients: int = 0,
) -> SparseSGDM:
    """Return the configuration's optimizer of parameters of any shape; its momentum starts at zero.

    "auto" kernels are torch's choice on a GPU, and fused on a CPU: they take a fifth of the time of a step over many
    small tensors, and give the same bits but for the last one under weight decay. For several clients at once, so many
    as `clients` says, the parameters are [clients, ...], and `rows` the `in_every_client` positions of their mask.
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
        clients=clients,
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
