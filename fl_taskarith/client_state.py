"""What a client keeps between rounds: one file per partition and version, never overwritten.

Flower's Context.state would travel with every message, and a client that ran ahead of the last checkpoint could not be
taken back. Here the server knows each client's newest file by name, a checkpoint holds those names, and a resumed run
hands every client the version that belongs to the checkpoint.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fl_taskarith.errors import CheckpointError
from fl_taskarith.files import read_verified, write_verified

StateNames = dict[int, str]  # file name of the newest state, by partition


def write_client_state(folder: Path, partition: int, version: int, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors that client `partition` keeps after round `version`; returns the file's name.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return write_verified(_folder_of(folder, partition), f"round-{version:06d}", content).name


def read_client_state(folder: Path, partition: int, name: str) -> dict[str, Tensor]:
    """The tensors of the file `name` of client `partition`, on the CPU; none for the empty name (no state yet).

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not name:
        return {}
    path = _folder_of(folder, partition) / name
    content = read_verified(path)
    if content is None:
        raise CheckpointError(
            f"The state {path} of client {partition} is missing or damaged, and the checkpoint refers to it: "
            "delete the newest checkpoint to continue from the one before, or restore the file."
        )
    return safetensors.torch.load(content)


def prune_client_states(folder: Path, kept: Iterable[StateNames]) -> None:
    """Delete every state that none of the name tables in `kept` refers to."""
    wanted = {(partition, name) for names in kept for partition, name in names.items()}
    for path in folder.glob("*/*.safetensors"):
        if (int(path.parent.name), path.name) not in wanted:
            path.unlink(missing_ok=True)


def _folder_of(folder: Path, partition: int) -> Path:
    return folder / f"{partition:06d}"
