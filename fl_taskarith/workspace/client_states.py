"""What clients keep between rounds, on the device from one visit to the next, and in files that a thread writes."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from fl_taskarith.storage.client_files import read_client_state, state_file, write_client_state
from fl_taskarith.workspace.global_model import Weights

UNWRITTEN = 4  # states that may wait for the disk; a client with another one waits, too
SHARE = 0.25  # of a GPU's free memory that states may take
CPU_BYTES = 2**31  # that they may take in the memory of a CPU


class ClientStates:
    """The states of a process's clients, by the names of their files (`storage.client_files`).

    Those that fit into a part of the device's memory stay there, so most are never read back.

    Args:
        behind: whether rounds go on while states are written: whoever names one in a checkpoint calls `flush` first.
            Otherwise its file is there when `write` returns, as a client must have it that answers another process.
    """

    def __init__(self, device: torch.device, behind: bool) -> None:
        self._device = device
        self._newest: dict[tuple[Path, int], tuple[str, Weights]] = {}
        free = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BYTES
        self._left = free  # bytes
        self._writer = ThreadPoolExecutor(1, "client-states") if behind else None
        self._unwritten: list[Future[Path]] = []

    def read(self, folder: Path, partition: int, name: str) -> Weights:
        """Return the tensors of state `name` of a client, on the device, in the shapes in which they were written.

        Raises:
            CheckpointError: it is not in memory, and its file is missing or damaged.
        """
        kept = self._newest.get((folder, partition))
        if kept is not None and kept[0] == name:
            return kept[1]
        self.flush()
        state = read_client_state(folder, partition, name)
        state = {key: value.to(self._device) for key, value in state.items()}
        self._keep(folder, partition, name, state)
        return state

    def write(self, folder: Path, partition: int, version: int, state: Weights) -> str:
        """Keep the tensors, of any shapes, that a client has after round `version`; return the name of their file.

        Raises:
            CheckpointError: this file, or one that was to be written before it, cannot be written.
        """
        if self._writer is None:
            name = write_client_state(folder, partition, version, state)
        else:
            name, write = state_file(folder, partition, version, state)
            self._wait(UNWRITTEN - 1)
            self._unwritten.append(self._writer.submit(write))
        self._keep(folder, partition, name, {key: value.detach().clone() for key, value in state.items()})
        return name

    def flush(self) -> None:
        """Wait until all states are in their files.

        Raises:
            CheckpointError: one cannot be written.
        """
        self._wait(0)

    def forget(self) -> None:
        """Begin another run, whose states are read from their files, and to which no failure of an earlier one matters.

        What that was still to write is written.
        """
        wait(self._unwritten)
        self._unwritten.clear()
        for folder, partition in [*self._newest]:
            self._drop(folder, partition)

    def _wait(self, unwritten: int) -> None:
        """Wait until so many states at most are not in their files; one that failed stays among them, and fails."""
        while len(self._unwritten) > unwritten:
            self._unwritten[0].result()
            self._unwritten.pop(0)

    def _keep(self, folder: Path, partition: int, name: str, state: Weights) -> None:
        self._drop(folder, partition)
        size = sum(value.nbytes for value in state.values())
        if size <= self._left:
            self._newest[folder, partition] = name, state
            self._left -= size

    def _drop(self, folder: Path, partition: int) -> None:
        _, state = self._newest.pop((folder, partition), ("", {}))
        self._left += sum(value.nbytes for value in state.values())
