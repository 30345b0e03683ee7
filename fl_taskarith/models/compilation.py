"""torch.compile, once per process for every client, round and run of one architecture.

Compiling takes up to minutes and belongs to a module, not to its weights; so the module of the first run stays, and
later runs of the same architecture load their weights into it.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
from torch import nn

from fl_taskarith.models.suffix import Backbone, Suffix

Network = Backbone | Suffix
"""A whole model on images, or the last blocks of one on the tokens of its frozen ones."""

log = logging.getLogger(__name__)


@dataclass
class _Kept:
    """The module of one architecture, and what is compiled of it by (class, first block, mode)."""

    architecture: Hashable
    model: Backbone
    networks: dict[tuple[type, int, str], Network] = field(default_factory=dict)


_kept: _Kept | None = None


def shared_model(architecture: Hashable, fresh: Backbone) -> Backbone:
    """Return the process's module of this architecture with the weights of `fresh`: `fresh` itself the first time.

    One architecture is kept at a time; `architecture` must differ wherever more than weights does.
    """
    global _kept
    if _kept is None or _kept.architecture != architecture:
        _kept = _Kept(architecture, fresh)
    else:
        _kept.model.load_state_dict(fresh.state_dict())
    return _kept.model


def compiled(network: Network, first_block: int, mode: str, device: torch.device) -> Network:
    """Compile `network`, the shared model from `first_block` on, under torch.compile's `mode`; it keeps its parameters.

    It is compiled again for each batch size: kernels for any size are slower, and a federation has few sizes. Where
    nothing can be compiled (no C++ compiler, no Triton) `network` itself is returned, and a warning says why.
    """
    assert _kept is not None, "shared_model comes first"
    if reason := _obstacle(device):
        log.warning('compile = "%s" is left out, training runs as written: %s', mode, reason)
        return network
    key = (type(network), first_block, mode)
    if key not in _kept.networks:
        module = torch.compile(cast(nn.Module, network), mode=mode, dynamic=False)
        _kept.networks[key] = cast(Network, module)
    return _kept.networks[key]


@lru_cache
def _obstacle(device: torch.device) -> str:
    """Return why a minimal function cannot be compiled for `device`; empty if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, its back end or the tools they call
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""
