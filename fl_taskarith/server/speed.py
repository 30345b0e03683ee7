"""How many images per second this machine trains under given settings, and how long their runs will take.

Measured on a model of its own with random weights and random images, so that neither data nor weights are needed, and
without torch.compile, which would take a minute.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import image_source, training_images
from fl_taskarith.models.backbone import build_model, trained_parameters
from fl_taskarith.models.compilation import Network
from fl_taskarith.models.suffix import Suffix, prefix_tokens
from fl_taskarith.training.local import autocast, set_matrix_products, set_trained
from fl_taskarith.training.local_loss import REFERRING
from fl_taskarith.workspace.machine import available_threads, choose_device, describe_device
from fl_taskarith.workspace.workspace import EVALUATION_BATCH

FIRST = 4  # images of the first step, which says how many the next ones may have
SPEED_KEYS = (
    "dataset", "model", "input_size", "trainable", "trainable_blocks", "prefix_cache", "batch_size", "device",
    "precision", "compile", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Images per second of local steps, of evaluation, and of a pass through the frozen blocks (0 without a cache)."""

    training: float
    evaluation: float
    frozen: float = 0.0


_known: dict[tuple[object, ...], tuple[float, Speed]] = {}  # by SPEED_KEYS: seconds of measurement, and its result


@dataclass(frozen=True)
class Work:
    """Images that a run trains on, evaluates, scores for its mask, and sends through frozen blocks for its cache."""

    trained: int
    evaluated: int
    scored: int
    frozen: int

    def seconds(self, speed: Speed) -> float:
        """Return the time that it takes at a measured speed."""
        frozen = self.frozen / speed.frozen if speed.frozen else 0.0
        return (self.trained + self.scored) / speed.training + self.evaluated / speed.evaluation + frozen

    def again(self) -> "Work":
        """Return the work of another run, for which mask and cache exist."""
        return replace(self, scored=0, frozen=0)


def device_line(config: Config, speed: Speed | None) -> str:
    """Describe what a run computes on, for example "device Tesla T4, fp16, compile off, 590 images/s"."""
    words = [f"device {describe_device(choose_device(config.device))}"]
    if speed is not None:
        words += [config.precision, f"compile {config.compile}", f"{speed.training:,.0f} images/s"]
        words[-1] += "" if config.compile == "off" else " before it is compiled"
    return ", ".join(words)


def speed_of(config: Config, seconds: float) -> Speed | None:
    """Return the speed of `config`, measured for at least `seconds`, once per process; None of regression data.

    Args:
        config: with `device`, `precision` and `compile` as they are on this machine.

    Raises:
        ConfigError: the model cannot be built.
    """
    if config.dataset == REGRESSION:
        return None
    key = tuple(getattr(config, name) for name in SPEED_KEYS)
    known = _known.get(key)
    if known is None or known[0] < seconds:
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads or available_threads())
        set_matrix_products(config.precision)
        _known[key] = known = seconds, _Probe(config).speed(seconds)
        torch.set_num_threads(threads)
    return known[1]


def work_of(config: Config) -> Work | None:
    """Count the images of a whole run; None for regression data."""
    if config.dataset == REGRESSION:
        return None
    size = image_source(config.dataset)
    held_out = config.validation_size + config.calibration_size
    train = training_images(config)
    test = config.test_subset or size.test
    evaluations = 1 + math.ceil(config.num_rounds / config.evaluate_every)
    if config.strategy == "centralized":
        trained = config.num_rounds * train
    else:
        steps = (config.local_steps_min + config.local_steps_max) / 2 or config.local_steps
        batch = min(config.batch_size, max(1, train // config.num_clients))
        trained = round(config.num_rounds * config.sampled_clients * steps * batch)
    refreshes = math.ceil(config.num_rounds / config.ridge_refresh) if config.ridge_refresh else 0
    head = (train + config.validation_size) * (1 + refreshes) if config.solved else 0
    scored = 0
    if config.scored:
        each = min(config.calibration_per_client * config.num_clients or train, train)
        scored = config.calibration_rounds * (config.calibration_size if config.mask_source == "server" else each)
    referred = trained if config.local_loss in REFERRING else 0
    cached = config.prefix_cache != "off"
    frozen = (2 * train + held_out + test) if cached else 0
    return Work(trained, (config.validation_size + test) * evaluations + head + referred, scored, frozen)


class _Probe:
    """A model of random weights under the settings of a run, and inputs for it."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, choose_device(config.device)
        classes, size = image_source(config.dataset).classes, config.input_size
        model = build_model(config.model, classes, size, "none", download=False, seed=0).to(self.device)
        cached = config.prefix_cache != "off"
        trained_blocks = 0 if config.trainable == "head" else config.trainable_blocks
        self.first = len(model.blocks) - trained_blocks if cached else 0
        self.model = model
        self.network: Network = Suffix(model, self.first) if cached else model
        self.inputs = self.images = torch.rand(self.largest_batch, 3, size, size, device=self.device)
        if cached:
            tokens = prefix_tokens(model, self.images[:1], self.first)
            self.inputs = torch.randn(len(self.images), *tokens.shape[1:], device=self.device)
        self.names = trained_parameters(model, config.trainable, config.trainable_blocks)

    @property
    def largest_batch(self) -> int:
        """Images at a time: those of a local step or of an evaluation."""
        return max(self.config.batch_size, EVALUATION_BATCH[self.device.type])

    def train(self, count: int) -> None:
        """Run a forward and backward pass of `count` images."""
        set_trained(self.model, self.names)
        self.network.train()
        with autocast(self.device, self.config.precision):
            scores = self.network(self.inputs[:count])
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

    def speed(self, seconds: float) -> Speed:
        """Measure all three, in about `seconds`."""
        return Speed(
            self._images_per_second(self.train, self.config.batch_size, seconds / 2),
            self._images_per_second(self.evaluate, EVALUATION_BATCH[self.device.type], seconds / 4),
            self._images_per_second(self.freeze, self.largest_batch, seconds / 4) if self.first else 0.0,
        )

    def _images_per_second(self, work: Callable[[int], None], batch: int, seconds: float) -> float:
        """Measure steps of `batch` images, or of as many as take `seconds` where one step would take longer."""
        first = min(FIRST, batch)
        work(first)
        count = max(first, min(batch, round(first * seconds / self._timed(work, first))))
        work(count)
        steps, spent = 0, 0.0
        while not steps or spent < seconds:
            spent += self._timed(work, count)
            steps += 1
        return steps * count / spent

    def _timed(self, work: Callable[[int], None], count: int) -> float:
        self._wait()
        started = time.perf_counter()
        work(count)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
