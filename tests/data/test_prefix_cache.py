"""The frozen blocks' tokens, kept: the same numbers as without, exact keys, and files that tell damage."""

import argparse
import dataclasses
import operator
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import at_work, kill
from conftest import final_weights, numbers, same_bits

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data import prefix_cache
from fl_taskarith.data.batches import draw_augmentations
from fl_taskarith.data.prefix_cache import CachedInputs, cache_key, near, open_or_make
from fl_taskarith.errors import CheckpointError, ConfigError, DataError
from fl_taskarith.models.suffix import Suffix, prefix_parameters, prefix_tokens
from fl_taskarith.workspace.workspace import Workspace


@pytest.fixture
def cached_config(quick_config: Config, tmp_path: Path) -> Config:
    return dataclasses.replace(
        quick_config, trainable_blocks=1, prefix_cache="float32", data_dir=str(tmp_path / "data"), augmentation="flip"
    )


def files(config: Config) -> list[Path]:
    return sorted((Path(config.data_dir) / "prefix-cache").glob("*.npy"))


@pytest.mark.parametrize("architecture", [{}, {"reg_tokens": 2, "global_pool": "avg"}, {"pre_norm": True}])
def test_prefix_and_suffix_are_the_model(architecture: dict[str, object]) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_glyph", num_classes=5, **architecture).eval()
    inputs = torch.randn(3, 3, 16, 16)
    for first in range(5):
        suffix = Suffix(model, first)
        tokens = prefix_tokens(model, inputs, first)
        assert torch.equal(suffix(tokens), model(inputs))
        own = dict(model.named_parameters())
        for name, parameter in suffix.named_parameters():
            assert parameter is own[name], "a suffix shares parameters under the model's names"
        assert not prefix_parameters(model, first).keys() & dict(suffix.named_parameters()).keys()


@pytest.mark.parametrize("settings", [{}, {"mask_rule": "least-sensitive", "calibration_size": 20}],
                         ids=["dense", "masked"])  # fmt: skip
def test_a_cached_run_has_the_numbers_of_one_without(cached_config: Config, settings: dict[str, object]) -> None:
    cached = simulate(cached_config, **settings)
    plain = simulate(cached_config, prefix_cache="off", **settings)
    for mine, theirs in zip(numbers(cached.folder), numbers(plain.folder), strict=True):
        for column in ("train_loss", "val_loss", "test_loss"):
            if theirs[column] is not None:
                assert mine[column] == pytest.approx(theirs[column], rel=1e-3), (mine["round"], column)
        assert mine["uplink_bytes"] == theirs["uplink_bytes"]
    assert len(files(cached_config)) == 2, "the images, and the training set flipped"


@pytest.mark.parametrize(
    "settings",
    [{"trainable": "all"}, {"trainable": "head", "head": "linear", "trainable_blocks": 0}],
    ids=["head too", "head alone"],
)
def test_whatever_is_trained_is_behind_the_cut(cached_config: Config, settings: dict[str, object]) -> None:
    cached = simulate(cached_config, num_rounds=1, **settings)
    plain = simulate(cached_config, num_rounds=1, prefix_cache="off", **settings)
    assert cached.rows[1]["train_loss"] == pytest.approx(plain.rows[1]["train_loss"], rel=1e-3)
    assert cached.rows[1]["client_update_norm"] == pytest.approx(plain.rows[1]["client_update_norm"], rel=1e-3)


def test_half_precision_is_close(cached_config: Config) -> None:
    half = simulate(cached_config, prefix_cache="float16", num_rounds=1)
    single = simulate(cached_config, num_rounds=1)
    assert half.rows[1]["train_loss"] == pytest.approx(single.rows[1]["train_loss"], rel=1e-2)
    sizes = [path.stat().st_size for path in files(cached_config)]
    assert max(sizes) == pytest.approx(2 * sorted(sizes)[-2], rel=0.3)


def test_a_second_run_reads_what_the_first_computed(cached_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Workspace(cached_config)
    made = [path.stat().st_mtime_ns for path in files(cached_config)]
    monkeypatch.setattr("fl_taskarith.workspace.workspace.prefix_tokens", None)  # calling it would be an error
    again = Workspace(dataclasses.replace(cached_config, learning_rate=0.5, num_clients=7))
    assert [path.stat().st_mtime_ns for path in files(cached_config)] == made
    positions = torch.tensor([3, 500])
    assert torch.equal(
        first.preprocessing.evaluation_inputs(positions), again.preprocessing.evaluation_inputs(positions)
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "no record", "record is no JSON"])
def test_a_damaged_cache_is_made_anew(cached_config: Config, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(cached_config, augmentation="none")
    sound = Workspace(config).preprocessing.evaluation_inputs(torch.arange(5)).clone()
    (path,) = files(config)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped bit":
        content[-100] ^= 1
        path.write_bytes(content)
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("{")
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        again = Workspace(config).preprocessing.evaluation_inputs(torch.arange(5))
    assert torch.equal(again, sound)
    assert "damaged" in caplog.text


def test_everything_that_tokens_depend_on_is_in_the_key(cached_config: Config) -> None:
    seen = set()
    for settings in (
        {}, {"trainable_blocks": 2}, {"weights": "none"}, {"weights": "none", "seed": 1}, {"prefix_cache": "float16"},
        {"train_subset": 600}, {"model": "vit_tiny_patch16_224", "weights": "none", "input_size": 32},
    ):  # fmt: skip
        Workspace(dataclasses.replace(cached_config, augmentation="none", **settings))
        seen.add(len(files(cached_config)))
    assert seen == {1, 2, 3, 4, 5, 6, 7}
    assert cache_key({"a": torch.zeros(2)}) != cache_key({"a": torch.tensor([0.0, -0.0])})
    assert cache_key({"a": torch.zeros(2)}) != cache_key({"b": torch.zeros(2)})


def test_flips_are_drawn_as_without_a_cache() -> None:
    tokens, mirrored = torch.zeros(50, 3, 4), torch.ones(50, 3, 4)
    inputs = CachedInputs(tokens, mirrored, torch.device("cpu"))
    (augmentation,) = draw_augmentations(1, 50, inputs.crop_padding, np.random.default_rng(1), torch.device("cpu"))
    drawn = inputs.training_inputs(torch.arange(50), augmentation)[:, 0, 0]
    generator = np.random.default_rng(1)
    generator.integers(0, 1, size=(50, 2))
    assert drawn.tolist() == (generator.random(50) < 0.5).tolist()


@pytest.fixture
def two_caches(tmp_path: Path) -> dict[Path, torch.Tensor]:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    return {tmp_path / f"{key}.npy": open_or_make(tmp_path, key, part, lambda some: some.float().flatten(2), "float16")
            for key, part in (("all", images), ("flipped", images[:1]))}  # fmt: skip


def test_a_gpu_gets_both_caches_once_or_neither(
    two_caches: dict[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU stands in for the GPU's memory."""
    given = list(two_caches.values())
    assert all(map(operator.is_, near(two_caches, torch.device("cpu")), given))
    memory = [2 * sum(tokens.nbytes for tokens in given)]
    asked: list[torch.device] = []

    def moved(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
        asked.append(device)
        return tokens.clone()

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: argparse.Namespace(total_memory=memory[0]))
    monkeypatch.setattr(torch.Tensor, "to", moved)
    gpu = torch.device("cuda")
    there = near(two_caches, gpu)
    assert all(map(operator.is_, near(two_caches, gpu), there)), "the next run of the process has them"
    assert all(map(torch.equal, there, given)) and asked == [gpu, gpu]
    memory[0] -= 1
    assert all(map(operator.is_, near(two_caches, gpu), given)), "the smaller one alone would fit"


def test_a_gpu_that_fills_up_leaves_both_on_the_host(
    two_caches: dict[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tokens: torch.Tensor, _: torch.device) -> torch.Tensor:
        if len(tokens) == 1:
            raise torch.OutOfMemoryError("full")
        return tokens.clone()

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: argparse.Namespace(total_memory=2**30))
    monkeypatch.setattr(torch.Tensor, "to", full)
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        assert all(map(operator.is_, near(two_caches, torch.device("cuda")), two_caches.values()))
    assert "no room" in caplog.text
    assert not prefix_cache._copied.cache_info().currsize, "the one that did fit is let go"


def test_a_file_is_read_for_its_checksum_once_until_it_changes(tmp_path: Path) -> None:
    def tokens() -> torch.Tensor:
        return open_or_make(tmp_path, "k", torch.zeros(2, 1, 2, 2), lambda part: part.flatten(2), "float32")

    tokens(), tokens()
    reads = prefix_cache._digest.cache_info().misses
    tokens()
    assert prefix_cache._digest.cache_info().misses == reads
    (tmp_path / "k.npy").touch()
    tokens()
    assert prefix_cache._digest.cache_info().misses == reads + 1


def test_a_token_beyond_half_precision_is_an_error(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(DataError, match='prefix-cache = "float32"'):
        open_or_make(tmp_path, "k", images, lambda part: torch.full((len(part), 2, 2), 1e6), "float16")
    assert not list(tmp_path.iterdir()), "no half-written file stays behind"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        open_or_make(
            tmp_path / "file" / "x", "k", torch.zeros(1, 3, 4, 4), lambda part: torch.zeros(1, 1, 1), "float16"
        )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"trainable_blocks": 0}, "set trainable-blocks"), ({"augmentation": "crop-flip"}, "crops")],
)
def test_settings_that_contradict_a_cache_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(overrides={"prefix_cache": "float16", "trainable_blocks": 1} | settings)


def test_cifars_own_augmentation_is_refused_by_name(cifar100_folder: Path, cached_config: Config) -> None:
    config = dataclasses.replace(
        cached_config, dataset="cifar100", data_dir=str(cifar100_folder), download=False, augmentation="auto",
        validation_size=100, calibration_size=100, test_subset=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match='augmentation = "flip"'):
        Workspace(config)


def test_resuming_needs_no_images(cached_config: Config) -> None:
    """The same configuration run twice from one cache: the same bits."""
    first = simulate(cached_config, run_name="first")
    second = simulate(cached_config, run_name="second")
    assert numbers(first.folder) == numbers(second.folder)
    assert same_bits(final_weights(first.folder), final_weights(second.folder))


def test_a_file_of_the_class_token_alone_has_a_key_of_its_own(
    cached_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older files of the same prefix hold all tokens: one of a pair made anew would not fit the other."""
    head_alone = dataclasses.replace(cached_config, trainable="head", trainable_blocks=0)
    keys: list[list[str]] = [[]]
    monkeypatch.setattr(
        "fl_taskarith.workspace.workspace.open_or_make",
        lambda _, key, pictures, *rest: keys[-1].append(key) or torch.zeros(len(pictures), 1, 64),
    )
    Workspace(head_alone)
    monkeypatch.setattr("fl_taskarith.models.backbone.compute_class_token_only", lambda model: None)
    keys.append([])
    Workspace(head_alone)
    assert keys[0] and not set(keys[0]) & set(keys[1])


def slow_tokens(folder: Path, seconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Tokens that take `seconds` per pass; every pass leaves a line with its process's number."""

    def compute(part: torch.Tensor) -> torch.Tensor:
        with open(folder / "passes", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return part.float().flatten(2)

    return compute


def many_images() -> torch.Tensor:
    return torch.arange(200 * 12, dtype=torch.int64).remainder(251).to(torch.uint8).view(200, 3, 2, 2)


def make_with(folder: Path, seconds: float) -> torch.Tensor:
    return open_or_make(folder / "cache", "0123456789abcdef", many_images(), slow_tokens(folder, seconds), "float16")


def make_and_copy(folder: Path) -> None:
    tokens = make_with(folder, 0.05)
    np.save(folder / f"seen-{os.getpid()}.npy", tokens.numpy())


def make_for_ever(folder: Path) -> None:
    (folder / "cache").mkdir()

    def compute(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 1:  # the first image alone shows the shape
            (folder / "ready").touch()
            time.sleep(60)
        return part.float().flatten(2)

    open_or_make(folder / "cache", "0123456789abcdef", many_images(), compute, "float16")


def test_of_three_processes_one_computes_the_tokens(tmp_path: Path) -> None:
    started = [get_context("fork").Process(target=make_and_copy, args=(tmp_path,)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [0, 0, 0]
    passes = (tmp_path / "passes").read_text().split()
    assert len(set(passes)) == 1 and len(passes) == 1 + 4, "the first image for the shape, and 200 by 64"
    seen = [np.load(path) for path in tmp_path.glob("seen-*.npy")]
    expected = many_images().float().flatten(2).half().numpy()
    assert len(seen) == 3 and all(np.array_equal(tokens, expected) for tokens in seen)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"0123456789abcdef.npy", "0123456789abcdef.json"}


def test_a_process_killed_while_it_computes_leaves_nothing_and_blocks_nobody(tmp_path: Path) -> None:
    with at_work(make_for_ever, tmp_path) as maker:
        assert [path.name for path in (tmp_path / "cache").glob(f".*.{maker.pid}-*.tmp")]
        kill(maker)
    assert list((tmp_path / "cache").glob(".*.tmp")), "what it had written"
    tokens = make_with(tmp_path, 0.0)
    assert torch.equal(tokens, many_images().float().flatten(2).half())
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"0123456789abcdef.npy", "0123456789abcdef.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_cuts_it_short_leaves_neither_file_nor_lock(error: type[BaseException], tmp_path: Path) -> None:
    def compute(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 1:
            raise error
        return part.float().flatten(2)

    with pytest.raises(error):
        open_or_make(tmp_path / "cache", "0123456789abcdef", many_images(), compute, "float16")
    assert not list((tmp_path / "cache").iterdir())
    assert len(make_with(tmp_path, 0.0)) == 200


def test_a_sound_cache_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared drive the folder may be another's."""
    make_with(tmp_path, 0.0)
    monkeypatch.setattr(prefix_cache, "only_maker", lambda *_: pytest.fail("took a lock"))
    monkeypatch.setattr(prefix_cache, "make_folder", lambda *_: pytest.fail("made a folder"))
    assert len(make_with(tmp_path, 0.0)) == 200
