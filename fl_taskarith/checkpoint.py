"""Checkpoints: one self-verifying file each. Its name carries the checksum of its content, so no index can disagree."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fl_taskarith.errors import CheckpointError
from fl_taskarith.files import write_atomically

KEPT = 2
CHECKSUM_DIGITS = 32
_NAME = re.compile(rf"round-(\d{{6,}})-([0-9a-f]{{{CHECKSUM_DIGITS}}})\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A run after `round` rounds: global weights, the strategy's own tensors, and the log so far (JSON values)."""

    round: int
    weights: dict[str, Tensor]
    strategy_state: dict[str, Tensor]
    notes: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` to `folder` as round-NNNNNN-<sha256>.safetensors and drop all but the last two.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are untouched.
    """
    tensors = _prefixed("weights", checkpoint.weights) | _prefixed("strategy", checkpoint.strategy_state)
    content = safetensors.torch.save(tensors, {"round": str(checkpoint.round), "notes": json.dumps(checkpoint.notes)})
    checksum = hashlib.sha256(content).hexdigest()[:CHECKSUM_DIGITS]
    path = folder / f"round-{checkpoint.round:06d}-{checksum}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    write_atomically(path, content)
    # A run that was resumed may come to a round twice; the later file of the same round is the one just written.
    for _, old in [found for found in list_checkpoints(folder) if found[1] != path][KEPT - 1 :]:
        old.unlink(missing_ok=True)
    return path


def load_latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`; a damaged one is reported and passed over. None without any file.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    found = list_checkpoints(folder)
    for _, path in found:
        checkpoint = _read(path)
        if checkpoint is not None:
            return checkpoint
        log.warning("The checkpoint %s is damaged (its checksum does not match); trying the one before.", path)
    if found:
        raise CheckpointError(
            f"All checkpoints in {folder} are damaged. Delete the folder to start this run from the beginning, "
            "or restore the files from a backup."
        )
    return None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(round, path) of every checkpoint file in `folder`, newest round first."""
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in matches), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if its content is not what its name says."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:CHECKSUM_DIGITS] != path.stem.rsplit("-", 1)[1]:
            return None
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load(content)
    except (OSError, SafetensorError):
        return None
    return Checkpoint(
        round=int(metadata["round"]),
        weights=_under("weights", tensors),
        strategy_state=_under("strategy", tensors),
        notes=json.loads(metadata["notes"]),
    )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }
