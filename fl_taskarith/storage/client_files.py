"""What a client stores between rounds: files that are never overwritten, since their names carry a checksum.

Every function here takes and returns tensors of any shapes and dtypes by their names, and leaves both as they are.
Frozen tensors (the head, the mask) are the same for all clients and sent once: one file, which clients on the same
machine share. A client's own state is one file per partition and version.

Flower's Context.state would travel with every message, and a client that ran ahead of the last checkpoint could not be
taken back. Here the server knows each client's newest file by name, a checkpoint holds those names, and a resumed run
hands every client the version that belongs to the checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from fl_taskarith.errors import CheckpointError, FrozenMissing
from fl_taskarith.storage.files import version_of
from fl_taskarith.storage.tensor_file import read_unsealed, unsealed
from fl_taskarith.storage.verified_files import read_verified, verified_name, write_verified

StateNames = dict[int, str]  # file name of the newest state, by partition

# In a client's file: its control variate c_k, parameters that it does not share, its own mask, and the weights that its
# momentum is measured from.
CONTROL, OWN, MASK, ANCHOR = "control/", "own/", "mask/", "anchor/"


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors (of any shapes) whose names begin with `prefix`, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def frozen_name(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the file that holds these frozen tensors, of any shapes; equal tensors have equal names."""
    return verified_name("frozen", unsealed(tensors))


def write_frozen(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Store frozen tensors, of any shapes, as the file `name` that `frozen_name` gave them, unless it is there, sound.

    Raises:
        CheckpointError: it cannot be written, or the tensors that arrived are not those that were sent.
    """
    if not _is_sound(folder / name) and write_verified(folder, "frozen", unsealed(tensors)).name != name:
        raise CheckpointError(f"The frozen tensors for {folder / name} arrived damaged: run again.")


def read_frozen(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the frozen tensors of the file `name`, in the shapes that they were sent in, on the CPU.

    The empty name stands for no tensors.

    Raises:
        FrozenMissing: there is no such file.
        CheckpointError: it is damaged.
    """
    if not name:
        return {}
    found = read_unsealed(folder / name)
    if found is None:
        kind = CheckpointError if (folder / name).exists() else FrozenMissing
        raise kind(
            f"The frozen head and mask in {folder / name} are missing or damaged: delete that file, if it is there, "
            "and run again; clients are sent it again."
        )
    return found[0]


def write_client_state(folder: Path, partition: int, version: int, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors, of any shapes, that client `partition` has after round `version`; return the file's name.

    Raises:
        CheckpointError: it cannot be written.
    """
    name, write = state_file(folder, partition, version, tensors)
    write()
    return name


def state_file(
    folder: Path, partition: int, version: int, tensors: Mapping[str, Tensor]
) -> tuple[str, Callable[[], Path]]:
    """Return the name of the file of a client's tensors, of any shapes, as they are now, and what writes it.

    See `write_client_state`, which does both at once.
    """
    place, stem, content = _folder_of(folder, partition), f"round-{version:06d}", unsealed(tensors)
    return verified_name(stem, content), partial(write_verified, place, stem, content)


def read_client_state(folder: Path, partition: int, name: str) -> dict[str, Tensor]:
    """Read the tensors of the file `name` of client `partition`, in the shapes that they were written in, on the CPU.

    The empty name stands for no state yet.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not name:
        return {}
    path = _folder_of(folder, partition) / name
    found = read_unsealed(path)
    if found is None:
        raise CheckpointError(
            f"The state {path} of client {partition} is missing or damaged, and the checkpoint refers to it: "
            "delete the newest checkpoint to continue from the one before, or restore the file."
        )
    return found[0]


def prune_client_states(folder: Path, kept: Iterable[StateNames]) -> None:
    """Delete every state that none of the name tables in `kept` names."""
    wanted = {(partition, name) for names in kept for partition, name in names.items()}
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name.isdecimal() and (int(path.parent.name), path.name) not in wanted:
            path.unlink(missing_ok=True)


def _is_sound(path: Path) -> bool:
    """Whether a verified file is there and is what its name says; it is read once while nobody touches it."""
    return path.exists() and _is_sound_version(path, version_of(path))


@lru_cache(maxsize=1)
def _is_sound_version(path: Path, version: tuple[int, int]) -> bool:
    return read_verified(path) is not None


def _folder_of(folder: Path, partition: int) -> Path:
    return folder / f"{partition:06d}"
