"""Checkpoints: one self-verifying file each. Its name carries the checksum of its content, so no index can disagree."""

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError, Damaged
from fl_taskarith.storage.client_files import StateNames, under
from fl_taskarith.storage.record_files import conforming
from fl_taskarith.storage.run_record import SETTINGS
from fl_taskarith.storage.tensor_file import read_unsealed, unsealed
from fl_taskarith.storage.verified_files import CHECKSUM_DIGITS, read_verified, write_verified

KEPT = 2
ROUND, BEST = "round", "best"  # how the names of both kinds of files begin

_GROUPS = ("trained", "frozen", "strategy_state")
_NO_CHECKPOINT = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)  # of a file that is none

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A run after `round` rounds. Tensors have any shapes and dtypes, and come back with the same.

    Attributes:
        trained: the global weights that rounds update (under a mask, [entries] of each).
        frozen: the tensors of `Frozen`.
        strategy_state: the tensors of the strategy.
        notes: the log so far, JSON values.
        client_states: the file name of each client's own state, by partition, for those that have one.
        settings: of the run, all of them; empty in a file of a version that did not write them.
        best: the model after the round that is best on validation so far, where no file has it yet; it gets its own.
    """

    round: int
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]
    strategy_state: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)
    client_states: StateNames = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    best: "Checkpoint | None" = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` to `folder` as round-NNNNNN-<sha256>.safetensors and drop all but the last two.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are untouched.
    """
    path = _write(folder, ROUND, checkpoint)
    # A run that was resumed may come to a round twice; the later file of the same round is the one just written.
    for _, old in [found for found in list_checkpoints(folder) if found[1] != path][KEPT - 1 :]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def save_best(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a model that is the best on validation to `folder` as best-NNNNNN-<sha256>.safetensors.

    Raises:
        CheckpointError: it cannot be written.
    """
    _write(folder, BEST, checkpoint)


def load_best(folder: Path, number: int) -> Checkpoint | None:
    """Load what `save_best` wrote after the round `number`; None where it is missing or damaged."""
    loaded = (_read(path) for at, path in list_checkpoints(folder, BEST) if at == number)
    return next((each for each in loaded if each is not None), None)


def _write(folder: Path, kind: str, checkpoint: Checkpoint) -> Path:
    tensors = {f"{group}/{name}": value for group in _GROUPS for name, value in getattr(checkpoint, group).items()}
    metadata = {name: json.dumps(getattr(checkpoint, name)) for name in ("round", "notes", "client_states", "settings")}
    return write_verified(folder, f"{kind}-{checkpoint.round:06d}", unsealed(tensors, metadata))


def load_latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Load the newest undamaged checkpoint in `folder`; report and pass over damaged ones. None without any file.

    Raises:
        Damaged: there are checkpoints and all are damaged.
    """
    found = list_checkpoints(folder)
    damaged: list[Path] = []
    for _, path in found:
        checkpoint = _read(path)
        if checkpoint is not None:
            for other in damaged:  # out of the way, so that it counts for none of the kept ones
                with contextlib.suppress(OSError):  # where nothing can be written, the next write says so
                    other.rename(other.with_suffix(".damaged"))
            return checkpoint
        log.warning("The checkpoint %s is damaged (its checksum does not match); trying the one before.", path)
        damaged.append(path)
    if found:
        raise Damaged(
            f"All checkpoints in {folder} are damaged. Delete the folder to start this run from the beginning, "
            "or restore the files from a backup."
        )
    return None


def list_checkpoints(folder: Path, kind: str = ROUND) -> list[tuple[int, Path]]:
    """List (round, path) of every checkpoint file in `folder`, or of every `BEST` one, newest round first."""
    if not folder.is_dir():
        return []
    name = re.compile(rf"{kind}-(\d{{6,}})-[0-9a-f]{{{CHECKSUM_DIGITS}}}\.safetensors")
    matches = [(match, path) for path in folder.iterdir() if (match := name.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in matches), reverse=True)


def require_own(folder: Path, config: Config) -> None:
    """Check that every checkpoint in `folder` that says its settings is one that a run of `config` can go on from.

    Raises:
        CheckpointError: one is of another run; names it, and the settings.
    """
    for number, path in list_checkpoints(folder):
        settings = settings_of(path)
        if not settings or config.extends(settings, number) or read_verified(path) is None:
            continue
        raise CheckpointError(
            f"The checkpoint {path} is of another run ({changes(settings, config) or f'after round {number}'}): move "
            "it out of the folder to go on from this run's own, or restore those settings."
        )


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings that a checkpoint says its run has; {} if it says none, or is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            settings: dict[str, Any] = conforming(json.loads(file.metadata().get("settings", "{}")), SETTINGS)
    except (*_NO_CHECKPOINT, RecursionError):
        return {}
    return settings


def changes(settings: Mapping[str, Any], config: Config) -> str:
    """Name the settings in which a run of `config` cannot differ from one of `settings`, with both values."""
    now = config.to_run_config()
    different = config.differing_keys(settings)
    return "; ".join(f"{key} was {shown(settings.get(key))}, now {shown(now[key])}" for key in different)


def referenced_client_states(folder: Path) -> list[StateNames]:
    """Return the names of the client states that each readable checkpoint in `folder` refers to."""
    tables = []
    for _, path in list_checkpoints(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                tables.append(_state_names(file.metadata()))
        except _NO_CHECKPOINT:
            continue  # damaged: it will be passed over when read
    return tables


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None if its content is not what its name says or no checkpoint."""
    found = read_unsealed(path)
    if found is None:
        return None
    tensors, metadata = found
    try:
        return Checkpoint(
            round=int(metadata["round"]),
            trained=under("trained/", tensors),
            frozen=under("frozen/", tensors),
            strategy_state=under("strategy_state/", tensors),
            notes=json.loads(metadata["notes"]),
            client_states=_state_names(metadata),
            settings=conforming(json.loads(metadata.get("settings", "{}")), SETTINGS),
        )
    except _NO_CHECKPOINT:
        return None


def _state_names(metadata: Mapping[str, str]) -> StateNames:
    return {int(partition): name for partition, name in json.loads(metadata["client_states"]).items()}
