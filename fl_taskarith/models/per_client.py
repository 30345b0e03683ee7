"""A network with several clients' own weights, in which one call of a kernel serves all of them. Pure PyTorch.

The images of n clients are one batch, [n·B, ...], client after client. A layer with trained weights holds those of each
client, [n, ...], and computes one product per client in one call. Everything else runs as written: frozen layers, and
attention, whose fused kernels see n times as many images.
"""

import copy
from collections.abc import Sequence

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

QKV_BIASES = ("q_bias", "k_bias", "v_bias")  # of timm's EvaAttention, [d] each; the layer qkv has none
ROOT_TOKENS = ("cls_token", "reg_token", "pos_embed")  # of timm's models: [1, ..., d], broadcast over B
SCALES = ("gamma_1", "gamma_2")  # LayerScale of timm's EvaBlock, [d]


class PerClientNetwork(nn.Module):
    """`network` with n values of each trained weight; the frozen ones are the network's own tensors.

    Attributes:
        clients: n.
        weights: what is trained, float32 [n, ...], by name; at first, each client has the network's.

    Args:
        names: what is trained, without `prefix`, with which they begin in `network`.

    Raises:
        NotImplementedError: a layer of a kind that has no form for several clients; names it.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], clients: int, prefix: str = "") -> None:
        super().__init__()
        self.clients, self._prefix = clients, prefix
        self.network = copy.deepcopy(network, {id(each): each for each in (*network.parameters(), *network.buffers())})
        self.weights = {name: nn.Parameter(_repeated(network.get_parameter(prefix + name), clients).clone())
                        for name in names}  # fmt: skip
        self._broadcast: dict[str, nn.Parameter] = {}
        owners = []
        for name in names:
            owner, _, own_name = (prefix + name).rpartition(".")
            module = network.get_submodule(owner)
            if isinstance(module, LayerScale) or own_name in (*SCALES, *ROOT_TOKENS):
                self._broadcast[prefix + name] = self.weights[name]
            else:
                owners.append(f"{owner}.qkv" if isinstance(module, EvaAttention) and own_name in QKV_BIASES else owner)
        for owner in dict.fromkeys(owners):
            self._replace(owner)

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return what the network returns for its inputs [n·B, ...], the first B of which are the first client's."""
        images = len(inputs) // self.clients
        each = {name: value.view(self.clients, 1, -1, value.shape[-1]) for name, value in self._broadcast.items()}
        own = {name: value.expand(-1, images, -1, -1).flatten(0, 1) for name, value in each.items()}
        outputs: Tensor | tuple[Tensor, Tensor] = functional_call(self.network, own, (inputs,))
        return outputs

    @torch.no_grad()
    def start_from(self, network: nn.Module) -> None:
        """Give every client the weights of `network`, and no gradient."""
        for name, value in self.weights.items():
            value.copy_(network.get_parameter(self._prefix + name))
            value.grad = None

    def _replace(self, owner: str) -> None:
        """Put the form for n clients in the place of a layer."""
        above, _, own_name = owner.rpartition(".")
        parent, module = self.network.get_submodule(above), self.network.get_submodule(owner)
        own = {name: self._own(f"{owner}.{name}", tensor) for name, tensor in module.named_parameters(recurse=False)}
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1 and "weight" in own:
            layer: nn.Module = _LayerNorm(module.eps, own["weight"], own.get("bias"))
        elif isinstance(module, nn.Linear):
            biases = [own["bias"]] if "bias" in own else []
            if isinstance(parent, EvaAttention) and own_name == "qkv" and parent.q_bias is not None:
                biases = [self._own(f"{above}.{name}", getattr(parent, name)) for name in QKV_BIASES]
                parent.q_bias = parent.k_bias = parent.v_bias = None  # type: ignore[assignment]
            layer = _Linear(own["weight"], biases)
        elif is_patch_embedding(module):
            assert isinstance(module, nn.Conv2d)
            layer = _PatchEmbedding(module.kernel_size, own["weight"], [own["bias"]] * ("bias" in own))
        else:
            raise NotImplementedError(f"{owner}, a {type(module).__name__}, has no form for several clients at once")
        setattr(parent, own_name, layer)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """Return the clients' own values, [n, ...], or the frozen ones as if each client had some."""
        own = self.weights.get(name.removeprefix(self._prefix))
        return _repeated(tensor, self.clients) if own is None else own


class _Linear(nn.Module):
    """Linear layers of n clients: weights [n, out, in], and biases [n, out] in as many parts as there are."""

    def __init__(self, weight: Tensor, biases: Sequence[Tensor]) -> None:
        super().__init__()
        self.own_weight, self.biases = weight, tuple(biases)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n·B, ..., out] of [n·B, ..., in]."""
        weight = self.own_weight.flatten(2).transpose(1, 2)
        rows = inputs.reshape(len(weight), -1, inputs.shape[-1])
        if self.biases:
            outputs = torch.baddbmm(torch.cat(self.biases, 1).unsqueeze(1), rows, weight)
        else:
            outputs = torch.bmm(rows, weight)
        return outputs.view(*inputs.shape[:-1], -1)


class _PatchEmbedding(_Linear):
    """A convolution whose windows tile the image: a `_Linear` on patches, with weights [n, out, 3, h, w]."""

    def __init__(self, window: tuple[int, ...], weight: Tensor, biases: Sequence[Tensor]) -> None:
        super().__init__(weight, biases)
        self.window = window

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n·B, out, rows, columns] of images [n·B, 3, H, W]."""
        height, width = self.window
        patches = inputs.unfold(2, height, height).unfold(3, width, width)  # [n·B, 3, rows, columns, h, w]
        return super().forward(patches.permute(0, 2, 3, 1, 4, 5).flatten(3)).permute(0, 3, 1, 2)


class _LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with weights [n, d] and biases [n, d]."""

    def __init__(self, eps: float, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.eps, self.own_weight, self.own_bias = eps, weight, bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [n·B, ..., d] of the same shape."""
        width = inputs.shape[-1]
        rows = functional.layer_norm(inputs, (width,), eps=self.eps).view(len(self.own_weight), -1, width)
        weight = self.own_weight.unsqueeze(1)
        if self.own_bias is None:
            return (rows * weight).view(inputs.shape)
        return torch.addcmul(self.own_bias.unsqueeze(1), rows, weight).view(inputs.shape)


def is_patch_embedding(module: nn.Module) -> bool:
    """Return whether this is a convolution whose windows tile the image: a Linear on patches."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding == (0, 0)
        and module.groups == 1
        and module.dilation == (1, 1)
    )


def _repeated(tensor: Tensor, clients: int) -> Tensor:
    """Return a view [clients, ...] of a tensor of any shape."""
    return tensor.detach().expand(clients, *tensor.shape)
