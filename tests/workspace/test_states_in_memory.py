"""Clients' states in memory are those of their files, which are there when a checkpoint names them."""

import threading
from pathlib import Path

import pytest
import torch

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage import client_files
from fl_taskarith.storage.client_files import read_client_state
from fl_taskarith.workspace import client_states
from fl_taskarith.workspace.client_states import ClientStates

CPU = torch.device("cpu")


def state(value: float) -> dict[str, torch.Tensor]:
    return {"own/a": torch.full((3, 2), float(value)), "mask/a": torch.arange(3, dtype=torch.uint8)}


def same(found: dict[str, torch.Tensor], value: float) -> bool:
    expected = state(value)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_read_is_what_was_written_last(behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = client_states.read_client_state
    monkeypatch.setattr(
        client_states, "read_client_state", lambda folder, partition, name: read.append(partition)
        or original(folder, partition, name)
    )  # fmt: skip
    states = ClientStates(CPU, behind)
    tensors = state(1.0)
    names = {1: states.write(tmp_path, 1, 1, tensors), 2: states.write(tmp_path, 2, 1, state(2.0))}
    tensors["own/a"].zero_()
    assert same(states.read(tmp_path, 1, names[1]), 1.0) and same(states.read(tmp_path, 2, names[2]), 2.0)
    assert not read
    newer = states.write(tmp_path, 1, 2, state(3.0))
    assert same(states.read(tmp_path, 1, names[1]), 1.0), "an older one, of the checkpoint before"
    assert same(states.read(tmp_path, 1, newer), 3.0)
    assert states.read(tmp_path, 3, "") == {}
    states.forget()
    assert same(states.read(tmp_path, 2, names[2]), 2.0)
    assert read == [1, 1, 3, 2]
    assert same(read_client_state(tmp_path, 1, newer), 3.0)


def test_states_beyond_the_memory_that_they_may_take_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_states, "CPU_BYTES", 2 * sum(value.nbytes for value in state(0.0).values()))
    states = ClientStates(CPU, behind=True)
    names = {client: states.write(tmp_path, client, 1, state(client)) for client in range(5)}
    assert len(states._newest) == 2
    names |= {client: states.write(tmp_path, client, 2, state(client + 0.5)) for client in (0, 4)}
    assert len(states._newest) == 2, "a newer state takes the place of the client's older one"
    for client, name in names.items():
        assert same(states.read(tmp_path, client, name), client + (0.5 if client in (0, 4) else 0.0))


def test_files_are_written_while_rounds_go_on_and_are_there_after_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, original = threading.Event(), client_files.write_verified
    monkeypatch.setattr(client_files, "write_verified", lambda *given: go.wait(30) and original(*given))
    states = ClientStates(CPU, behind=True)
    names = [states.write(tmp_path, client, 1, state(client)) for client in range(client_states.UNWRITTEN)]
    assert not list(tmp_path.rglob("*.safetensors")), "none waits for the disk"
    assert same(states.read(tmp_path, 0, names[0]), 0.0)
    threading.Timer(0.1, go.set).start()
    states.write(tmp_path, 9, 1, state(9))  # one more than may wait
    assert len(list(tmp_path.rglob("*.safetensors"))) >= 1
    states.flush()
    assert [same(read_client_state(tmp_path, client, name), client) for client, name in enumerate(names)]
    assert len(list(tmp_path.rglob("*.safetensors"))) == client_states.UNWRITTEN + 1


def test_a_state_that_cannot_be_written_stops_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = client_files.write_verified

    def full(folder: Path, *given: object) -> Path:
        if folder.name == "000001":
            raise CheckpointError(f"Cannot write {folder}: No space left on device.")
        return original(folder, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(client_files, "write_verified", full)
    states = ClientStates(CPU, behind=True)
    states.write(tmp_path, 1, 1, state(1.0))
    states.write(tmp_path, 2, 1, state(2.0))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="000001: No space left"):
            states.flush()
    states.forget()
    states.flush()
    with pytest.raises(CheckpointError):
        ClientStates(CPU, behind=False).write(tmp_path, 1, 1, state(1.0))
