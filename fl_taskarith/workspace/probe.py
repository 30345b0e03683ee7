"""How fast this machine trains under given settings: a model with random weights, random images, and a clock.

Neither data nor weights are needed. Nothing is compiled, which would take a minute.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.effects import idle_reason
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import image_source
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.models.backbone import build_model, trained_parameters
from fl_taskarith.models.compilation import Network
from fl_taskarith.models.per_client import PerClientNetwork
from fl_taskarith.models.suffix import Suffix, prefix_tokens
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.paths import resolve
from fl_taskarith.storage.record_files import COUNT, read_json
from fl_taskarith.training.local import autocast, set_matrix_products, set_trained

FIRST = 4  # images of the first step, which says how many the next ones may have
MOST_AT_ONCE = 16  # clients: more take memory, and hardly share more
GAIN = 1.1  # of the speed with several clients at once, below which they go one by one
FULL = 0.05  # seconds of a step of `FIRST` images from which on a model fills a CPU's core
SECONDS = 0.3  # of each measurement
SPEED_KEYS = (
    "dataset", "model", "input_size", "trainable", "trainable_blocks", "prefix_cache", "batch_size", "device",
    "precision", "compile", "threads",
)  # fmt: skip

FASTEST = "clients-at-once.json"  # below data-dir

_fastest: dict[tuple[object, ...], int] = {}


def fastest_at_once(config: Config, device: torch.device, threads: int) -> int:
    """Return how many clients to train at once: all of a round up to `MOST_AT_ONCE`, or as many as fit, or one.

    Measured once per machine and kind of run, for a run that goes on must train as it began: several go together only
    where they are faster. On a CPU that one client's steps keep busy, or where clients are trained one by one in any
    case, it is 1 without a measurement.

    Args:
        config: with `device` and `precision` as they are on this machine.
    """
    most = min(config.sampled_clients, MOST_AT_ONCE)
    try:
        several = replace(config, clients_at_once=2)
    except ConfigError:  # another engine, or a limit of time for each client
        return 1
    if most == 1 or config.dataset == REGRESSION or idle_reason(several, "clients-at-once"):
        return 1
    key = (*(getattr(config, name) for name in SPEED_KEYS), most)
    if key not in _fastest:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        _fastest[key] = _remembered(
            resolve(config.data_dir, "data-dir") / FASTEST, json.dumps([*key, name, threads]),
            partial(_measured, config, device, threads, most),
        )  # fmt: skip
    return _fastest[key]


def _measured(config: Config, device: torch.device, threads: int, most: int) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    set_matrix_products(config.precision)
    found = _fastest_of(Probe(config, device, config.batch_size), most)
    torch.set_num_threads(before)
    return found


def _remembered(path: Path, key: str, measure: Callable[[], int]) -> int:
    """Return what the file says for `key`; else measure it and write it there, if that is possible."""
    if found := _read(path).get(key):
        return found
    measured = {key: measure()} | _read(path)  # by now another process may have measured it
    with contextlib.suppress(OSError, CheckpointError):
        make_folder(path.parent)
        write_atomically(path, json.dumps(measured, indent=1) + "\n")
    return measured[key]


def _read(path: Path) -> dict[str, int]:
    """Return numbers of clients by kind of run; none where the file is missing or damaged."""
    try:
        numbers: dict[str, int] = read_json(path, {str: COUNT}, "", optional=True) or {}
    except CheckpointError:
        return {}
    return numbers


def _fastest_of(probe: "Probe", most: int) -> int:
    batch = probe.config.batch_size
    probe.train(FIRST)
    if probe.device.type == "cpu" and min(probe.timed(probe.train, FIRST) for _ in range(3)) > FULL:
        return 1
    alone = probe.images_per_second(probe.train, batch, SECONDS)
    while most > 1:
        try:
            together = most * probe.images_per_second(probe.trainer(most), batch, SECONDS)
            return most if together > GAIN * alone else 1
        except torch.OutOfMemoryError:
            most //= 2
    return 1


class Probe:
    """A model of random weights under the settings of a run, and `images` inputs for it.

    Attributes:
        first: the first block that is trained under a prefix cache; 0 without one.
    """

    def __init__(self, config: Config, device: torch.device, images: int) -> None:
        self.config, self.device = config, device
        classes, size = image_source(config.dataset).classes, config.input_size
        model = build_model(config.model, classes, size, "none", download=False, seed=0).to(self.device)
        cached = config.prefix_cache != "off"
        trained_blocks = 0 if config.trainable == "head" else config.trainable_blocks
        self.first = len(model.blocks) - trained_blocks if cached else 0
        self.model = model
        self.network: Network = Suffix(model, self.first) if cached else model
        self.inputs = self.images = torch.rand(images, 3, size, size, device=self.device)
        if cached:
            tokens = prefix_tokens(model, self.images[:1], self.first)
            self.inputs = torch.randn(len(self.images), *tokens.shape[1:], device=self.device)
        self.names = trained_parameters(model, config.trainable, config.trainable_blocks)

    def train(self, count: int) -> None:
        """Run a forward and backward pass of `count` images."""
        set_trained(self.model, self.names)
        self.network.train()
        self._step(self.network, self.inputs[:count])

    def trainer(self, clients: int) -> Callable[[int], None]:
        """Return what runs a pass of `count` images for each of several clients, with weights of their own."""
        set_trained(self.model, [])
        together = PerClientNetwork(self.network, self.names, clients)
        return lambda count: self._step(together, self.inputs[:count].repeat(clients, *[1] * (self.inputs.ndim - 1)))

    def _step(self, network: nn.Module, inputs: Tensor) -> None:
        with autocast(self.device, self.config.precision):
            scores = network(inputs)
        scores.float().logsumexp(1).sum().backward()

    @torch.inference_mode()
    def evaluate(self, count: int) -> None:
        """Run a forward pass of `count` images."""
        self.network.eval()
        with autocast(self.device, self.config.precision):
            self.network(self.inputs[:count])

    def freeze(self, count: int) -> None:
        """Run a pass of `count` images through the frozen blocks."""
        with autocast(self.device, self.config.precision):
            prefix_tokens(self.model, self.images[:count], self.first)

    def images_per_second(self, work: Callable[[int], None], batch: int, seconds: float) -> float:
        """Measure steps of `batch` images, or of as many as take `seconds` where one step would take longer."""
        first = min(FIRST, batch)
        work(first)
        count = max(first, min(batch, round(first * seconds / self.timed(work, first))))
        work(count)
        steps, spent = 0, 0.0
        while not steps or spent < seconds:
            spent += self.timed(work, count)
            steps += 1
        return steps * count / spent

    def timed(self, work: Callable[[int], None], count: int) -> float:
        """Return the seconds that it takes, on the device too."""
        self._wait()
        started = time.perf_counter()
        work(count)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
