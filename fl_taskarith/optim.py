"""The clients' optimizer and the schedule of its learning rate over rounds. Pure numerics."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fl_taskarith.config import Config

STEP_DECAY = 0.1  # factor of the step schedule (at one half and three quarters of the run) and of the plateau schedule
PLATEAU_PATIENCE = 3  # rounds without improvement that the plateau schedule bears
FINAL_SHARE = 0.01  # share of the peak that the exponential schedule ends on


def sgdm(parameters: Iterable[nn.Parameter], config: Config, learning_rate: float) -> torch.optim.SGD:
    """torch's SGD with the configuration's momentum, dampening, Nesterov flag and weight decay; momentum at zero."""
    return torch.optim.SGD(
        parameters,
        lr=learning_rate,
        momentum=config.momentum,
        dampening=config.dampening,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: Config, step: int, validation_losses: Sequence[float]) -> float:
    """Learning rate of round `step` in 1..num-rounds under the configuration's schedule.

    `validation_losses` are those of the rounds 1..step-1, in order; only the plateau schedule looks at them.
    """
    peak, warmup = config.learning_rate, config.warmup_rounds
    if config.schedule == "plateau" and step > warmup:
        return plateau_learning_rate(peak, validation_losses[warmup:])
    schedule = "constant" if config.schedule == "plateau" else config.schedule
    return scheduled_learning_rate(schedule, peak, step, config.num_rounds, warmup)


def plateau_learning_rate(peak: float, validation_losses: Sequence[float]) -> float:
    """`peak`, times 0.1 whenever the loss has not improved for more than `PLATEAU_PATIENCE` rounds.

    Replays torch's ReduceLROnPlateau over the losses so far, so that a resumed run needs no state of its own.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=STEP_DECAY, patience=PLATEAU_PATIENCE)
    for loss in validation_losses:
        scheduler.step(loss)
    return float(optimizer.param_groups[0]["lr"])


def scheduled_learning_rate(schedule: str, peak: float, step: int, total: int, warmup: int) -> float:
    """Learning rate of step `step` in 1..total.

    The first `warmup` steps rise linearly to `peak`; the rest follow the schedule over t in [0, 1), the share of the
    remaining steps that is done:
        constant     peak
        cosine       peak · ½(1 + cos πt)               (Loshchilov & Hutter 2017, without restarts)
        step         peak · 0.1 from t = ½, · 0.01 from t = ¾
        exponential  peak · 0.01^t
    """
    if step <= warmup:
        return peak * step / warmup
    t = (step - 1 - warmup) / (total - warmup)
    factor: float = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * t)),
        "step": STEP_DECAY ** float((t >= 0.5) + (t >= 0.75)),
        "exponential": FINAL_SHARE**t,
    }[schedule]
    return peak * factor
