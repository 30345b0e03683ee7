"""A pass tells how far it is: a bar on a terminal, a line a minute in a log, and nothing while it is short."""

import io
import itertools
import sys
from collections.abc import Callable

import pytest

from fl_taskarith.storage import progress
from fl_taskarith.storage.progress import tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Every look at the clock is so many seconds after the last."""

    def set_step(seconds: float) -> None:
        ticks = itertools.count(step=seconds)
        monkeypatch.setattr("time.monotonic", lambda: next(ticks))

    return set_step


def test_the_log_has_a_line_a_minute(clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    clock(20.0)
    with caplog.at_level("INFO", logger="fl_taskarith"):
        assert list(tracked(iter(range(10)), 10, "Tokens")) == list(range(10))
    # The third, sixth and ninth item come at 60, 120 and 180 s; the rest is reckoned from what is done by then.
    assert [record.getMessage() for record in caplog.records] == [
        "Tokens: 20 % done, about 4 minutes left.",
        "Tokens: 50 % done, about 2 minutes left.",
        "Tokens: 80 % done, about 45 s left.",
    ]
    assert all(record.name == "fl_taskarith" for record in caplog.records)


def test_a_short_pass_says_nothing(clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    clock(0.1)
    with caplog.at_level("INFO", logger="fl_taskarith"):
        assert list(tracked([1, 2, 3], 3, "Tokens")) == [1, 2, 3]
    assert not caplog.records


@pytest.mark.parametrize("delay", [0.0, 2.0], ids=["long pass", "short pass"])
def test_a_terminal_has_a_bar_of_a_long_pass_alone(
    delay: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "BAR_AFTER", delay)
    assert list(tracked([1, 2, 3], 3, "Tokens")) == [1, 2, 3]
    assert ("Tokens" in sys.stderr.getvalue()) == (delay == 0.0)
    assert not caplog.records


def test_an_error_in_the_pass_is_the_passs_own() -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in tracked((1 / number for number in (1, 0)), 2, "Tokens"):
            pass
