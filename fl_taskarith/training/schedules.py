"""The learning rate over rounds, and what local steps under momentum add up to. Pure numerics."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from fl_taskarith.config.settings import Config
from fl_taskarith.seeding import random_generator

STEP_DECAY = 0.1  # factor of the step schedule (at one half and three quarters of the run) and of the plateau schedule
PLATEAU_PATIENCE = 3  # rounds without improvement before the plateau schedule lowers the rate
FINAL_SHARE = 0.01  # share of the peak at which the exponential schedule ends


def learning_rate(config: Config, step: int, validation_losses: Sequence[float]) -> float:
    """Return the learning rate of round `step` in 1..num-rounds under the configuration's schedule.

    `validation_losses` are those of the rounds 1..step-1, in order; only the plateau schedule uses them.
    """
    peak, warmup = config.peak_rate, config.warmup_rounds
    if config.schedule == "plateau" and step > warmup:
        return plateau_learning_rate(peak, validation_losses[warmup:])
    schedule = "constant" if config.schedule == "plateau" else config.schedule
    return scheduled_learning_rate(schedule, peak, step, config.num_rounds, warmup)


def plateau_learning_rate(peak: float, validation_losses: Sequence[float]) -> float:
    """Return `peak`, times 0.1 whenever the loss has not improved for more than `PLATEAU_PATIENCE` rounds.

    It replays torch's ReduceLROnPlateau over the losses so far, so that a resumed run needs no state of its own.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=STEP_DECAY, patience=PLATEAU_PATIENCE)
    for loss in validation_losses:
        scheduler.step(loss)
    return float(optimizer.param_groups[0]["lr"])


def scheduled_learning_rate(schedule: str, peak: float, step: int, total: int, warmup: int) -> float:
    """Return the learning rate of step `step` in 1..total.

    It rises linearly to `peak` in the first `warmup` steps and then follows the schedule over t in [0, 1), the share of
    the remaining steps that is done:
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


def draw_local_steps(config: Config, server_round: int, partition: int) -> int:
    """Return J, or this client's number of steps this round, uniform on local-steps-min..max where they are set."""
    if not config.local_steps_max:
        return config.local_steps
    generator = random_generator(config.seed, "local steps", server_round, partition)
    return int(generator.integers(config.local_steps_min, config.local_steps_max + 1))


@lru_cache(maxsize=64)
def step_coefficient_sum(config: Config, local_steps: int, learning_rate: float) -> float:
    """Return ‖a‖₁ of θ_0 − θ_J = η Σ_j a_j g_j: how many plain SGD steps J local ones amount to (Wang et al. 2020).

    It is J for plain SGD and [J − μ(1 − μ^J)/(1 − μ)]/(1 − μ) for heavy-ball momentum μ. The steps are simulated, each
    with a gradient of 1 of its own, which covers dampening, Nesterov and FedProx's pull to the start (which can make
    coefficients negative); weight decay counts as gradient.
    """
    moved, velocity = np.zeros(local_steps), np.zeros(local_steps)  # the share of g_j in both, over j
    for step in range(local_steps):
        gradient = -learning_rate * config.proximal_mu * moved
        gradient[step] += 1.0
        velocity = config.momentum * velocity + (1 - config.dampening) * gradient if step else gradient
        direction = gradient + config.momentum * velocity if config.nesterov else velocity
        moved = moved + (direction if config.momentum else gradient)
    return float(np.abs(moved).sum())
