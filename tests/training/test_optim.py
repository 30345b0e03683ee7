import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_taskarith.config.fields import SCHEDULES
from fl_taskarith.config.settings import load
from fl_taskarith.training.schedules import learning_rate, scheduled_learning_rate

CLOSED_FORMS = [schedule for schedule in SCHEDULES if schedule != "plateau"]  # that one looks at losses


def curve(schedule: str, total: int = 100, warmup: int = 0) -> list[float]:
    return [scheduled_learning_rate(schedule, 2.0, step, total, warmup) for step in range(1, total + 1)]


def test_each_schedule_against_its_formula() -> None:
    assert set(curve("constant")) == {2.0}
    assert curve("cosine")[50] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert curve("cosine")[99] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert curve("step")[49] == 2.0
    assert curve("step")[50] == pytest.approx(0.2)
    assert curve("step")[75] == pytest.approx(0.02)
    assert curve("exponential")[50] == pytest.approx(2.0 * 0.01**0.5)


@given(st.sampled_from(CLOSED_FORMS), st.integers(1, 50), st.data())
def test_warmup_rises_to_the_peak_and_no_schedule_exceeds_it(schedule: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = curve(schedule, total, warmup)
    assert rates[:warmup] == pytest.approx([2.0 * step / warmup for step in range(1, warmup + 1)])
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < total:
        assert rates[warmup] == 2.0


@given(st.lists(st.sampled_from([1.0, 0.9, 0.8, 0.7]), max_size=20), st.integers(0, 4))
def test_the_plateau_schedule_against_counting(losses: list[float], warmup: int) -> None:
    config = load(overrides={"schedule": "plateau", "learning_rate": 2.0, "warmup_rounds": warmup, "num_rounds": 30,
                             "evaluate_every": 1})  # fmt: skip
    expected, best, stale = 2.0, math.inf, 0
    for loss in losses[warmup:]:  # of the rounds before, each after which the loss has not improved counts
        best, stale = (loss, 0) if loss < best * (1 - 1e-4) else (best, stale + 1)
        if stale == 4:
            expected, stale = expected * 0.1, 0
    step = len(losses) + 1
    rate = learning_rate(config, step, losses)
    assert rate == pytest.approx(2.0 * step / warmup if step <= warmup else expected)


@given(st.sampled_from(CLOSED_FORMS), st.integers(1, 60), st.integers(0, 20))
def test_behind_the_warmup_a_schedule_is_that_of_the_steps_left(schedule: str, left: int, warmup: int) -> None:
    assert curve(schedule, warmup + left, warmup)[warmup:] == pytest.approx(curve(schedule, left))
