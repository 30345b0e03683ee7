"""The folder of a small run with files of it deleted, cut, emptied, changed, or taken from another run."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.figures.run_groups import members, read_run
from fl_taskarith.masking.mask import Mask, load_mask, save_mask
from fl_taskarith.one_shot.model_files import ModelFile
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.client_files import read_client_state, write_client_state
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.storage.tensor_file import sealed

FAULT = "run folders with files damaged, gone, or another run's"
ROUNDS = 3


class Prepared(NamedTuple):
    """Folders that hold the run and one of another seed, whole and cut off after round 2; and what the run has."""

    whole: Path
    cut: Path
    others: tuple[Path, Path]
    config: Config
    rows: list[Row]


def prepare(folder: Path) -> Prepared:
    config = Config(num_rounds=ROUNDS, run_name="run", mask_rule="random", learning_rate=0.1)
    places = [_run(dataclasses.replace(config, seed=seed, results_dir=str(folder / f"{seed}-{last}")), last)
              for seed in (0, 1) for last in (ROUNDS, ROUNDS - 1)]  # fmt: skip
    return Prepared(places[0], places[1], (places[2], places[3]), config, [_row(0, number) for number in range(4)])


def _row(seed: int, number: int) -> Row:
    return {"round": number, "val_accuracy": 0.5 + 0.01 * number + 0.001 * seed, "test_accuracy": 0.6}


def _tensors(seed: int, number: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(20, generator=torch.Generator().manual_seed(10 * seed + number))}


def _run(config: Config, last: int) -> Path:
    """Write what a run leaves that ended, or was killed, after round `last`."""
    logbook = Logbook(config)
    mask = Mask({"w": _tensors(config.seed, 0)["w"] > 0})
    save_mask(logbook.output("mask.safetensors"), mask, {"model": "none", "facts": "{}", **logbook.owner})
    for number in range(last + 1):
        logbook.write_round(_row(config.seed, number))
        tensors = _tensors(config.seed, number)
        states = {4: write_client_state(logbook.client_states, 4, number, tensors)}
        logbook.save_checkpoint(Checkpoint(number, tensors, {}, {}, client_states=states))
    if last == ROUNDS:
        write_atomically(logbook.output("model.safetensors"), sealed(_tensors(config.seed, last), logbook.owner))
        with logbook:
            pass
    elif logbook._lock is not None:
        logbook._lock.release()
    return logbook.folder


def attempt(prepared: Prepared, drawn: random.Random, folder: Path) -> str:
    finished = drawn.random() < 0.5
    run = folder / "results" / "run"
    source, other = (prepared.whole, prepared.others[0]) if finished else (prepared.cut, prepared.others[1])
    shutil.copytree(source, run)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = drawn.sample(files, drawn.choice([1, 1, 2]))
    foreign = [_damage(path, other / path.relative_to(run), drawn) for path in chosen]
    if not finished:
        return _resumed(prepared, run, any(foreign))
    sums = [path for path in chosen if path.name == "SHA256SUMS"]
    if sums and not sums[0].exists():
        sound = all(path.name == "SHA256SUMS" for path in chosen)
        return _read(prepared, run) if sound else _whatever(lambda: _read(prepared, run))
    return _read(prepared, run)


def _damage(path: Path, other: Path, drawn: random.Random) -> bool:
    """Do something to a file; return whether it is another run's checkpoint now."""
    content = path.read_bytes()
    kind = drawn.choice(["gone", "empty", "cut", "flipped", "swapped", "swapped", "folder", "lines"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "swapped":
        others = [other] if other.is_file() else sorted(other.parent.glob("*.safetensors"))
        target = path.with_name(drawn.choice(others).name)
        shutil.copyfile(drawn.choice(others) if target != path else other, target)
        if target.name != path.name and path.parent.name == "checkpoints":
            shutil.copyfile(others[[each.name for each in others].index(target.name)], target)
            return True
    elif kind != "gone":
        place = drawn.randrange(len(content))
        lines = content.splitlines(keepends=True)
        del lines[drawn.randrange(len(lines))]
        flipped = content[:place] + bytes([content[place] ^ 1 << drawn.randrange(8)]) + content[place + 1 :]
        path.write_bytes({"empty": b"", "cut": content[:place], "flipped": flipped, "lines": b"".join(lines)}[kind])
    return False


def _resumed(prepared: Prepared, run: Path, has_foreign: bool) -> str:
    """Continue the run: whatever is restored is the run's own, to the bit."""
    logbook = Logbook(dataclasses.replace(prepared.config, results_dir=str(run.parent)))
    if logbook._lock is not None:
        logbook._lock.release()
    assert not has_foreign, "another run's checkpoint was taken"
    assert logbook.folder == run
    if (restored := logbook.restored) is None:
        assert not list(run.glob("checkpoints/round*")), "sound checkpoints were passed over"
        return "begun anew"
    assert [row["val_accuracy"] for row in logbook.rows] == [
        row["val_accuracy"] for row in prepared.rows[: restored.round + 1]
    ]
    assert torch.equal(restored.trained["w"], _tensors(0, restored.round)["w"])
    state = read_client_state(logbook.client_states, 4, restored.client_states[4])
    assert torch.equal(state["w"], _tensors(0, restored.round)["w"])
    return "continued"


def _read(prepared: Prepared, run: Path) -> str:
    """Read everything of a finished run that still is there: what is accepted is the run's."""
    record = read_run(run)
    (member,) = members([record])
    assert member.settings["seed"] == 0
    assert [row["test_accuracy"] for row in record.rows] == [row["test_accuracy"] for row in prepared.rows]
    assert [row["val_accuracy"] for row in record.rows] == [row["val_accuracy"] for row in prepared.rows]
    assert torch.equal(load_mask(run / "mask.safetensors")[0].tensors["w"], _tensors(0, 0)["w"] > 0)
    assert torch.equal(ModelFile(run / "model.safetensors")["w"], _tensors(0, ROUNDS)["w"])
    return "read"


def _whatever(use: Callable[[], str]) -> str:
    """Without SHA256SUMS, numbers may have been changed on purpose; an error of ours is the only one that may come."""
    try:
        return use()
    except (FlTaskarithError, AssertionError):
        return "as it was changed"
