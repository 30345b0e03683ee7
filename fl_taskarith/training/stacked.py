"""Local steps of several clients at once, in one network with every client's own weights. Pure PyTorch.

An operation of a small model takes as long to start as to compute. Here n clients share each start: torch.func.vmap
turns a product with one client's weights into a batched one. A model that fills the device by itself gains nothing, and
n times its trained weights, gradients and activations must fit into memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fl_taskarith.data.batches import batch_positions, draw_augmentations
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.masking.per_example import plain_attention
from fl_taskarith.models.compilation import Network
from fl_taskarith.seeding import torch_seed
from fl_taskarith.training.local import Inputs
from fl_taskarith.training.local_loss import LocalLoss, Outputs


@dataclass(frozen=True)
class ClientData:
    """What one client trains on: `shard`, int64 [n], positions of its examples; `generator` as for `train_locally`."""

    examples: ImageSet
    shard: Tensor
    generator: np.random.Generator


def has_dropout(model: nn.Module) -> bool:
    """Return whether `model` draws random numbers as it trains: clients together would draw other ones."""
    return any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def stacked(weights: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return a copy of each tensor per client, [clients, ...], to be trained."""
    return {
        name: value.detach().expand(clients, *value.shape).clone().requires_grad_() for name, value in weights.items()
    }


def train_stacked(
    model: Network,
    weights: Mapping[str, Tensor],
    clients: Sequence[ClientData],
    optimizer: torch.optim.Optimizer,
    preprocessing: Inputs,
    *,
    local_steps: int,
    batch_size: int,
    loss: LocalLoss = LocalLoss(),  # noqa: B008  (frozen)
) -> list[float]:
    """Train each client's weights as `train_locally` does, to rounding; return the mean loss of each, [clients].

    Args:
        model: serves for what is not in `weights`; without dropout. Its own parameters are those that all clients start
            from, and stay as they are; none should require a gradient.
        weights: of every client, float32 [clients, ...] by name, trained in place by `optimizer`.
        clients: in the order of `weights`.

    Raises:
        ValueError: the clients' batches differ in size.
    """
    sizes = {min(batch_size, len(client.shard)) for client in clients}
    if len(sizes) > 1:
        raise ValueError(f"clients with batches of {sorted(sizes)} examples cannot be trained together")
    batches = [_draw(client, local_steps, batch_size, preprocessing) for client in clients]
    loss_sum = torch.zeros(len(clients), device=clients[0].examples.images.device)
    network = loss.network(model)
    prefix = "" if network is model else "network."
    references = [loss.references(network, (inputs for inputs, _ in batch)) for batch in batches]

    def outputs(own: dict[str, Tensor], inputs: Tensor) -> Outputs:
        result: Outputs = functional_call(network, own, (inputs,))
        return result

    together = vmap(outputs)
    network.train()
    with plain_attention(model):  # fused attention has no batching rule, and is no faster on few tokens
        for step in range(local_steps):
            drawn = [batch[step] for batch in batches]
            own_weights = {prefix + name: value for name, value in weights.items()}
            found = together(own_weights, torch.stack([inputs for inputs, _ in drawn]))
            each = zip(*found, strict=True) if isinstance(found, tuple) else found
            losses = torch.stack(
                [loss(own, labels, None if reference is None else reference[step])
                 for own, (_, labels), reference in zip(each, drawn, references, strict=True)]
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # a client's weights are in its own loss alone
            optimizer.step()
            loss_sum += losses.detach()
    return [loss / local_steps for loss in loss_sum.tolist()]


def _draw(client: ClientData, steps: int, batch_size: int, preprocessing: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Return (inputs, labels) of every step, drawn in the order in which `train_locally` draws."""
    device, generator = client.examples.images.device, client.generator
    torch_seed(generator)
    positions = torch.from_numpy(batch_positions(len(client.shard), batch_size, steps, generator))
    chosen = client.shard[positions.to(client.shard.device)]
    augmentations = draw_augmentations(steps, positions.shape[1], preprocessing.crop_padding, generator, device)
    return [
        (preprocessing.training_inputs(client.examples.images[batch], augmentation), client.examples.labels[batch])
        for batch, augmentation in zip(chosen, augmentations, strict=True)
    ]
