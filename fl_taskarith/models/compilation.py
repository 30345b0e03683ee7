"""torch.compile, once per process for every client, round and run of one architecture.

Compiling takes up to minutes and belongs to a module, not to its weights; so the module of the first run stays, and
later runs of the same architecture load their weights into it.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar, cast

import torch
from torch import nn

from fl_taskarith.models.suffix import Backbone, Suffix

Network = Backbone | Suffix
"""A whole model on images, or the last blocks of one on the tokens of its frozen ones."""

Module = TypeVar("Module", bound=nn.Module)

log = logging.getLogger(__name__)


@dataclass
class _Kept:
    """The module of one architecture, and what is compiled of it, by mode and what else it depends on."""

    architecture: Hashable
    model: Backbone
    networks: dict[Hashable, nn.Module] = field(default_factory=dict)


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


def compiled(make: Callable[[], Module], key: Hashable, mode: str, device: torch.device) -> Module:
    """Compile what `make` makes of the shared model under torch.compile's `mode`; it keeps its parameters.

    It is made once per process and `key`, and compiled again for each batch size: kernels for any size are slower, and
    a federation has few sizes. Where nothing can be compiled (no C++ compiler, no Triton) it is returned as made, and a
    warning says why.
    """
    assert _kept is not None, "shared_model comes first"
    if reason := _obstacle(device):
        log.warning('compile = "%s" is left out, training runs as written: %s', mode, reason)
        return make()
    if (key, mode) not in _kept.networks:
        _kept.networks[key, mode] = cast(nn.Module, torch.compile(make(), mode=mode, dynamic=False))
    return cast(Module, _kept.networks[key, mode])


def release(clients: int) -> None:
    """Let go of the compiled networks with weights of more clients than this, for their memory."""
    if _kept is not None:
        kept = {key: network for key, network in _kept.networks.items() if getattr(network, "clients", 0) <= clients}
        _kept.networks = kept


@lru_cache
def _obstacle(device: torch.device) -> str:
    """Return why a minimal function cannot be compiled for `device`; empty if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, its back end or the tools they call
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""
