"""Local steps of several clients at once, each with its own weights, from the same kernels. Pure PyTorch.

A kernel of a small model takes as long to start as to compute: here n clients share each start. Trained weights,
gradients, momentum and activations take n times their memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fl_taskarith.data.batches import Augmentation, batch_positions, draw_augmentations
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.models.per_client import PerClientNetwork
from fl_taskarith.seeding import torch_seed
from fl_taskarith.training.local import LOSS_SCALE, Inputs, autocast, report_skipped
from fl_taskarith.training.local_loss import LocalLoss, Outputs
from fl_taskarith.training.sparse_sgdm import SparseSGDM


@dataclass(frozen=True)
class ClientData:
    """What one client trains on: `shard`, int64 [n], positions of its examples; `generator` as for `train_locally`."""

    examples: ImageSet
    shard: Tensor
    generator: np.random.Generator


def has_dropout(model: nn.Module) -> bool:
    """Return whether `model` draws random numbers as it trains: clients together would draw other ones."""
    return any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def train_stacked(
    together: PerClientNetwork,
    network: nn.Module,
    clients: Sequence[ClientData],
    optimizer: SparseSGDM,
    preprocessing: Inputs,
    *,
    local_steps: int,
    batch_size: int,
    precision: str = "fp32",
    loss: LocalLoss = LocalLoss(),  # noqa: B008  (frozen)
) -> list[float]:
    """Train each client's weights as `train_locally` does, to rounding; return the mean loss of each, [clients].

    The host waits for the device once, at the end. Under fp16 each client has its own loss scale, and its own steps are
    left out.

    Args:
        together: computes all clients' `Outputs`, compiled or not; its weights, [clients, ...], are trained in place.
            Without dropout.
        network: the one of which `together` was made (`LocalLoss.network`), still with the weights that all clients
            start from; none should require a gradient.
        clients: in the order of the weights.
        optimizer: of those weights, for as many clients.

    Raises:
        ValueError: the clients' batches differ in size.
        Divergence: under fp16, no step of a client had finite gradients.
    """
    sizes = {min(batch_size, len(client.shard)) for client in clients}
    if len(sizes) > 1:
        raise ValueError(f"clients with batches of {sorted(sizes)} examples cannot be trained together")
    batches = _Batches(clients, local_steps, batch_size, preprocessing)
    count, device = len(clients), clients[0].examples.images.device
    with autocast(device, precision):
        references: Sequence[Tensor | None] = loss.references(network, batches.inputs()) or [None] * local_steps
    loss_sum, scale = torch.zeros(count, device=device), torch.full((count,), LOSS_SCALE, device=device)
    each_loss: Callable[..., Tensor] = vmap(loss, in_dims=(0, 0, None if references[0] is None else 0))
    together.train()
    for inputs, labels, reference in zip(batches.inputs(), batches.labels(), references, strict=True):
        with autocast(device, precision):
            outputs = together(inputs)
        losses = each_loss(*(_by_client(each, count) for each in (outputs, labels, reference)))
        # A client's weights are in its own loss alone.
        (losses * scale if precision == "fp16" else losses).sum().backward()
        if precision == "fp16":
            optimizer.zero_masked_gradients()
            optimizer.takes_part = _unscale(together.weights, scale)
            scale = torch.where(optimizer.takes_part, scale, scale / 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # before the next forward pass, which needs the memory
        loss_sum += losses.detach()
    totals, scales = torch.stack([loss_sum, scale]).tolist()
    if precision == "fp16":
        for client_scale in scales:
            report_skipped(client_scale, local_steps)
    return [total / local_steps for total in totals]


def _by_client(outputs: Outputs | None, clients: int) -> Outputs | None:
    """Return [clients, B, ...] of what is [clients · B, ...], floating-point numbers as float32."""
    if isinstance(outputs, tuple):
        scores, features = (each.float().view(clients, -1, *each.shape[1:]) for each in outputs)
        return scores, features
    if outputs is None:
        return None
    outputs = outputs.float() if outputs.is_floating_point() else outputs
    return outputs.view(clients, -1, *outputs.shape[1:])


def _unscale(weights: Mapping[str, Tensor], scale: Tensor) -> Tensor:
    """Divide the gradients of weights [n, ...] by `scale` [n]; return which clients have only finite ones, bool [n]."""
    gradients = [value.grad.view(len(scale), -1) for value in weights.values() if value.grad is not None]
    largest = [torch.linalg.vector_norm(gradient, math.inf, dim=1) for gradient in gradients]
    for gradient in gradients:
        gradient.mul_(scale.reciprocal()[:, None])
    return torch.stack(largest).isfinite().all(0)


class _Batches:
    """The batches of all clients: drawn in the order of `train_locally`, and moved to the device at once."""

    def __init__(self, clients: Sequence[ClientData], steps: int, batch_size: int, preprocessing: Inputs) -> None:
        self._sources = [client.examples for client in clients]
        self._preprocessing = preprocessing
        positions, drawn = [], []
        for client in clients:
            torch_seed(client.generator)
            positions.append(torch.from_numpy(batch_positions(len(client.shard), batch_size, steps, client.generator)))
            size, padding = positions[-1].shape[1], preprocessing.crop_padding
            drawn.append(draw_augmentations(steps, size, padding, client.generator, torch.device("cpu")))
        offsets, mirrored = (
            torch.stack([torch.cat([getattr(each, part) for each in step]) for step in zip(*drawn, strict=True)])
            for part in ("offsets", "mirrored")
        )
        device = clients[0].examples.images.device
        self._augmentations = [
            Augmentation(*each) for each in zip(offsets.to(device), mirrored.to(device), strict=True)
        ]
        where = torch.stack(positions).to(clients[0].shard.device)
        chosen = [client.shard[own] for client, own in zip(clients, where, strict=True)]  # [steps, B] each
        if all(source is self._sources[0] for source in self._sources):
            self._sources, chosen = self._sources[:1], [torch.cat(chosen, 1)]
        self._chosen = list(zip(*chosen, strict=True))

    def inputs(self) -> Iterator[Tensor]:
        """Yield each step's model inputs, [n · B, ...]."""
        for chosen, augmentation in zip(self._chosen, self._augmentations, strict=True):
            images = [source.images[own] for source, own in zip(self._sources, chosen, strict=True)]
            yield self._preprocessing.training_inputs(torch.cat(images), augmentation)

    def labels(self) -> Iterator[Tensor]:
        """Yield each step's labels, int64 [n · B]."""
        for chosen in self._chosen:
            yield torch.cat([source.labels[own] for source, own in zip(self._sources, chosen, strict=True)])
