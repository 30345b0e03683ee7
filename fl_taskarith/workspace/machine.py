"""The device of this machine, and what settings that are "auto" become on it."""

import dataclasses
import os
from typing import Any

import torch

from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError

AMPERE = 8  # major compute capability from which a GPU has units for bfloat16 and TF32


def choose_device(name: str) -> torch.device:
    """Return the torch device of `device`; "auto" is the first GPU, or the CPU without one.

    Raises:
        ConfigError: not a device, or not present on this machine.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device = "{name}" cannot be used here: {error}. Use "auto" or "cpu".') from error
    return device


def available_threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_device(device: torch.device) -> str:
    """Return the name of a device, for example "NVIDIA T4" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def on_this_machine(config: Config) -> Config:
    """Return the settings with `device`, `precision`, `compile` and `clients_at_once` as they are on this machine.

    A device that "auto" would choose becomes "auto", so that a run on a CPU is the same run under both names.
    """
    device = choose_device(config.device)
    settings: dict[str, Any] = {}
    default = choose_device(AUTO)
    if (device.type, device.index or 0) == (default.type, default.index or 0):
        settings["device"] = AUTO
    recent = device.type == "cuda" and _is_recent(device)
    if config.precision == AUTO:
        settings["precision"] = "fp32" if device.type == "cpu" else "bf16" if recent else "fp16"
    if config.compile == AUTO:
        # Clients together in single precision were not compiled by earlier versions: such runs keep their names.
        together = config.clients_at_once not in (1, AUTO) and config.precision in ("fp32", "tf32")
        settings["compile"] = "default" if recent and not together else "off"
    here = dataclasses.replace(config, **settings)
    if here.clients_at_once != AUTO:
        return here
    from fl_taskarith.workspace.probe import fastest_at_once  # which imports timm: most callers need none of it

    at_once = fastest_at_once(here, device, here.threads or available_threads())
    return dataclasses.replace(here, clients_at_once=at_once)


def emulated(config: Config) -> list[str]:
    """Return a sentence for each setting that this machine only emulates; no setting may be "auto" any more."""
    device = choose_device(config.device)
    name, sentences = describe_device(device), []
    if device.type == "cuda" and not _is_recent(device) and config.precision in ("bf16", "tf32"):
        sentences.append(
            f'precision = "{config.precision}": {name} has no units for it (compute capability '
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}, needed {AMPERE}.0) and "
            f"{'emulates it, slower than fp32' if config.precision == 'bf16' else 'computes in fp32'}: "
            'use "fp16", or "auto".'
        )
    if device.type == "cpu" and config.precision in ("fp16", "bf16") and not _cpu_has(config.precision):
        sentences.append(
            f'precision = "{config.precision}": this CPU has no units for it and emulates it, slower than fp32: use '
            '"fp32", or "auto".'
        )
    if device.type == "cpu" and config.precision == "tf32":
        sentences.append('precision = "tf32": a CPU computes in fp32: use "fp32", or "auto".')
    if device.type == "cpu" and config.compile != "off":
        sentences.append(f'compile = "{config.compile}": it is slower on a CPU: use "off", or "auto".')
    return sentences


def _is_recent(device: torch.device) -> bool:
    """Return whether a GPU has units for bfloat16; torch itself says so of cards that emulate it, too."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= AMPERE


def _cpu_has(precision: str) -> bool:
    """Return whether this CPU has units for matrices of the type (AVX-512 or AMX)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # a torch that cannot tell
        return True
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16") if precision == "bf16" else ("avx512_fp16", "amx_fp16", "fp16")
    return any(capabilities.get(name) for name in names)
