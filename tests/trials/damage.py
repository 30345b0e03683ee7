"""Damage every kind of file that a run writes or reads, at positions drawn from a seed, and use it.

A trial ends well where the file is refused by an error of ours that names it, where what was there before is used, or
where the numbers are those of the sound file. Any other error, and any other number, is a loss.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from conftest import final_weights, numbers, power_cut, same_bits
from trials import Tally

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.data.prefix_cache import open_or_make
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.figures.run_groups import find_runs, members, read_run
from fl_taskarith.masking.mask import load_mask
from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.weights import backbone_state, load_weights
from fl_taskarith.one_shot.model_files import ModelFile
from fl_taskarith.storage.checkpoint import (
    Checkpoint,
    load_latest_checkpoint,
    referenced_client_states,
    save_checkpoint,
)
from fl_taskarith.storage.client_files import (
    frozen_name,
    prune_client_states,
    read_client_state,
    read_frozen,
    write_client_state,
    write_frozen,
)
from fl_taskarith.storage.round_zero_files import read_start, write_start
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.study.results import inspect, read_outcome

REFUSED, SAME, BEFORE = "refused by name", "mended or harmless", "the one before is used"

TINY = Config(
    num_clients=8, participation=0.5, classes_per_client=5, num_rounds=2, local_steps=1, learning_rate=0.01,
    mask_rule="random", evaluate_every=1, checkpoint_every=1, threads=1, draw_curves=False, train_subset=300,
    validation_size=60, test_subset=60,
)  # fmt: skip


def damaged(content: bytes, trials: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the content then): one bit flipped, cut short, a stretch of zeros, or garbage at the end.

    A quarter of the flips hit the first two kilobytes, where a .safetensors has its header.
    """
    drawn = random.Random(f"{seed} {len(content)}")
    for number in range(trials):
        position = drawn.randrange(len(content) if number % 4 else min(len(content), 2048))
        if number % 8 < 5:
            bit = 1 << drawn.randrange(8)
            changed = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
            yield f"bit {bit} of byte {position} flipped", changed
        elif number % 8 < 7:
            yield f"cut to {position} bytes", content[:position]
        elif number % 16 == 7 and any(content[position : position + 64]):
            zeros = bytes(len(content[position : position + 64]))
            yield f"64 zeros from byte {position}", content[:position] + zeros + content[position + 64 :]
        else:
            yield "64 bytes of garbage at the end", content + drawn.randbytes(64)


def try_damage(
    tally: Tally, path: Path, trials: int, seed: int, use: Callable[[], object], good: str = SAME, named: str = ""
) -> None:
    """Damage `path` in many ways; each time `use` raises an error of ours that names it, or returns True.

    Args:
        good: what it means that it returned True.
        named: what the error has to name, in place of the file's name.
    """
    sound = path.read_bytes()
    for what, content in damaged(sound, trials, seed):
        path.write_bytes(content)
        try:
            ended = use()
        except FlTaskarithError as error:
            if (named or path.name) in str(error):
                tally.note(REFUSED)
            else:
                tally.lose(f"{path.name}, {what}: the error does not name it: {error}")
        except Exception as error:
            tally.lose(f"{path.name}, {what}: {type(error).__name__}: {error}")
        else:
            if ended:
                tally.note(good)
            else:
                tally.lose(f"{path.name}, {what}: other content, and no word of it")
    path.write_bytes(sound)


def checkpoints(folder: Path, trials: int, seed: int) -> Tally:
    """The newest of two is damaged: the one before is used. Then the other too: an error."""
    tally = Tally("checkpoint damaged")
    states = {0: write_client_state(folder / "client-states", 0, 1, {"c": torch.arange(5.0)})}
    for number in (1, 2):
        tensors = {"w": torch.randn(500, generator=torch.Generator().manual_seed(number))}
        notes = {"rows": [{"round": number}], "record": {}}
        newest = save_checkpoint(folder / "c", Checkpoint(number, tensors, {}, {}, notes, states))

    def is_the_one_before() -> bool:
        referenced_client_states(folder / "c")
        found = load_latest_checkpoint(folder / "c")
        assert found is not None
        for aside in (folder / "c").glob("*.damaged"):
            aside.unlink()
        return found.round == 1 and found.client_states == states

    try_damage(tally, newest, trials, seed, is_the_one_before, BEFORE)
    older = next(path for path in (folder / "c").iterdir() if path != newest)
    older.write_bytes(b"damaged")
    try_damage(
        tally, newest, trials // 4, seed + 1, lambda: load_latest_checkpoint(folder / "c") is None, named="c are"
    )
    return tally


def client_files(folder: Path, trials: int, seed: int) -> Tally:
    """A client's state is refused; the frozen head and mask are too, and sent anew they are sound again."""
    tally = Tally("client's state, frozen head and mask damaged")
    tensors = {"c": torch.arange(300.0)}
    name = write_client_state(folder, 3, 1, tensors)
    try_damage(tally, folder / "000003" / name, trials // 2, seed,
               lambda: same_bits(read_client_state(folder, 3, name), tensors))  # fmt: skip
    frozen = frozen_name(tensors)
    write_frozen(folder, frozen, tensors)
    try_damage(tally, folder / frozen, trials // 4, seed, lambda: same_bits(read_frozen(folder, frozen), tensors))

    def sent_anew() -> bool:
        write_frozen(folder, frozen, tensors)
        return same_bits(read_frozen(folder, frozen), tensors)

    try_damage(tally, folder / frozen, trials // 4, seed + 1, sent_anew)
    prune_client_states(folder, [{3: name}])
    return tally


def prefix_caches(folder: Path, trials: int, seed: int) -> Tally:
    """A cache, or the record of its checksum, is damaged: it is made anew."""
    tally = Tally("prefix cache damaged")
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def tokens() -> torch.Tensor:
        return open_or_make(folder, "key", images, lambda part: part.float().flatten(2), "float32")

    sound = tokens().clone()
    for name in ("key.npy", "key.json"):
        try_damage(tally, folder / name, trials // 2, seed, lambda: torch.equal(tokens(), sound))
    return tally


def starts(folder: Path, trials: int, seed: int) -> Tally:
    """What round 0 found is damaged: it is not there, so it is found anew."""
    tally = Tally("start shared with other processes damaged")
    tensors = {"head.weight": torch.arange(300.0).view(10, 30)}

    def is_missing() -> bool:
        return read_start(folder, "head-0") is None

    write_start(folder, "head-0", tensors, {"facts": {"ridge_lambda": 0.1}, "counted": {"clients": 3}})
    (path,) = folder.iterdir()
    try_damage(tally, path, trials, seed, is_missing)
    found = read_start(folder, "head-0")
    assert found is not None and same_bits(found[0], tensors) and found[1]["counted"] == {"clients": 3}
    return tally


def finished_run(folder: Path, trials: int, seed: int) -> list[Tally]:
    """What a finished run leaves: table, run.json, mask, exported model; each as its readers read it."""
    config = dataclasses.replace(TINY, results_dir=str(folder), run_name="finished")
    run = simulate(config).folder
    mask, facts = load_mask(run / "mask.safetensors")
    weights, rows, outcome, member = final_weights(run), numbers(run), read_outcome(run), members([read_run(run)])

    def same_mask() -> bool:
        again, told = load_mask(run / "mask.safetensors")
        return same_bits(again.tensors, mask.tensors) and all(told.get(key) == value for key, value in facts.items())

    def same_start() -> bool:
        model = build_model("vit_glyph", 10, 16, "none", download=False, seed=1)
        load_weights(model, run / "model.safetensors")
        return all(torch.equal(value, weights[name]) for name, value in backbone_state(model).items())

    def same_record() -> bool:
        return read_outcome(run) == outcome and inspect(config) == outcome and members(find_runs([folder])) == member

    tables = Tally("table of a finished run damaged")
    try_damage(tables, run / "rounds.csv", trials, seed, lambda: numbers(run) == rows and read_outcome(run) == outcome)
    records = Tally("run.json of a finished run damaged")
    try_damage(records, run / "run.json", trials, seed, same_record, named=run.name)
    masks = Tally("mask damaged")
    try_damage(masks, run / "mask.safetensors", trials, seed, same_mask)
    models = Tally("exported model damaged, as weights and as a model to merge")
    try_damage(models, run / "model.safetensors", trials // 2, seed, same_start)
    try_damage(models, run / "model.safetensors", trials // 2, seed + 1,
               lambda: same_bits(dict(ModelFile(run / "model.safetensors")), weights))  # fmt: skip
    archives = Tally("weights as .pth damaged")
    torch.save(weights, folder / "weights.pth")

    def same_archive() -> bool:
        model = build_model("vit_glyph", 10, 16, "none", download=False, seed=1)
        load_weights(model, folder / "weights.pth")
        return all(torch.equal(value, weights[name]) for name, value in backbone_state(model).items())

    try_damage(archives, folder / "weights.pth", trials // 2, seed, same_archive)
    return [tables, records, masks, models, archives]


def unfinished_run(folder: Path, trials: int, seed: int) -> Tally:
    """The table and run.json of a run that was cut off are made anew from its checkpoint, or refused."""
    tally = Tally("table or run.json of an unfinished run damaged")
    config = dataclasses.replace(TINY, results_dir=str(folder), run_name="cut")
    with power_cut(1):
        simulate(config)
    run = folder / "cut"
    rows = numbers(run)

    def continued() -> bool:
        logbook = Logbook(config)
        assert logbook._lock is not None
        logbook._lock.release()
        at_rest = logbook.folder == run and numbers(run) == rows
        record = json.loads((run / "run.json").read_text())
        return at_rest and record["config"] == config.to_run_config()

    try_damage(tally, run / "rounds.csv", trials // 2, seed, continued)
    try_damage(tally, run / "run.json", trials // 2, seed, continued, named="cut")
    return tally


def all_kinds(folder: Path, trials: int, seed: int = 0) -> list[Tally]:
    """Every kind of file, `trials` times each."""
    tallies = []
    for each in (checkpoints, client_files, prefix_caches, starts, unfinished_run):
        (folder / each.__name__).mkdir()
        tallies.append(each(folder / each.__name__, trials, seed))
    (folder / "finished").mkdir()
    return tallies + finished_run(folder / "finished", trials, seed)
