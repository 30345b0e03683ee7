"""How many images per second this machine trains under given settings, and how long their runs will take.

Measured on a model of its own with random weights and random images, so that neither data nor weights are needed, and
without torch.compile, which would take a minute.
"""

import math
from dataclasses import dataclass, replace

import torch

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import image_source, training_images
from fl_taskarith.training.local import set_matrix_products
from fl_taskarith.training.local_loss import REFERRING
from fl_taskarith.workspace.machine import available_threads, choose_device, describe_device
from fl_taskarith.workspace.probe import SPEED_KEYS, Probe
from fl_taskarith.workspace.workspace import EVALUATION_BATCH


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
        _known[key] = known = seconds, _speed(config, seconds)
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


def _speed(config: Config, seconds: float) -> Speed:
    """Measure all three, in about `seconds`."""
    device = choose_device(config.device)
    evaluated = EVALUATION_BATCH[device.type]
    largest = max(config.batch_size, evaluated)
    probe = Probe(config, device, largest)
    return Speed(
        probe.images_per_second(probe.train, config.batch_size, seconds / 2),
        probe.images_per_second(probe.evaluate, evaluated, seconds / 4),
        probe.images_per_second(probe.freeze, largest, seconds / 4) if probe.first else 0.0,
    )
