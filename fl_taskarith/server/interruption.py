"""Ctrl-C and SIGTERM: the round that is under way is finished and saved, and then the run ends."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("fl_taskarith")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 1.0  # seconds within which a second signal is the first one again, passed on by a parent process

_received: int | None = None
_received_at = 0.0
_in_rounds = False


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; `exit_status` is 128 + its number."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


@contextmanager
def finishing_rounds() -> Iterator[None]:
    """Within it a first signal lets the round under way be finished (`asked_to_stop`); a second one ends it at once.

    Without effect outside the main thread, which alone receives signals.
    """
    global _received, _in_rounds
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    _in_rounds = True
    try:
        yield
    except BaseException:
        _received = None
        raise
    finally:
        _in_rounds = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the program like Ctrl-C, so that whatever is open is closed. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ending_until_idle() -> Iterator[None]:
    """For a worker process: within it both signals end the work, and after it they are ignored.

    A pool of which one idle process dies ends all the others, in the middle of their rounds.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def asked_to_stop() -> bool:
    """Whether a signal came within the present `finishing_rounds`."""
    return _in_rounds and _received is not None


def stop_if_asked(message: str) -> None:
    """Raise Interrupted if a signal came within the last `finishing_rounds`; only once."""
    if _received is not None:
        raise interrupted(message)


def interrupted(message: str) -> Interrupted:
    """Return the exception that ends a run after a signal, and forget the signal."""
    global _received
    number, _received = _received, None
    return Interrupted(message, number or signal.SIGINT)


def _on_signal(number: int, _: FrameType | None) -> None:
    global _received, _received_at
    if _received is not None:
        if time.monotonic() - _received_at < ECHO:
            return
        raise Interrupted("Stopped at once, in the middle of a round.", number)
    _received, _received_at = number, time.monotonic()
    words = "Stopping: the round under way is finished and saved first. Press Ctrl-C again to stop at once."
    log.warning(words)
    if getattr(sys.stdout, "name", "") == os.devnull and sys.__stderr__ is not None:  # a study's run: see its log
        print(words, file=sys.__stderr__, flush=True)


def _end(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"Stopped by {signal.Signals(number).name}.", number)
