"""A limit on how long a client may work, wherever it runs."""

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from fl_taskarith.errors import ClientFailure

Result = TypeVar("Result")

PATIENCE = 1.0  # seconds until the next attempt, should the work have swallowed the exception

log = logging.getLogger(__name__)


class _TimeIsUp(BaseException):  # no Exception: work that tolerates errors of its own must not tolerate this one
    pass


def limited(work: Callable[[], Result], seconds: float) -> Result:
    """Return what `work` returns, if it does so within `seconds`; 0 is no limit.

    A watching thread asks the interpreter to raise an exception in this one, repeatedly until it takes effect. That
    works in any thread and process but reaches Python code only: a call into a library ends first.

    Raises:
        ClientFailure: the time was over.
    """
    if not seconds:
        return work()
    thread = threading.get_ident()
    lock, finished = threading.Lock(), threading.Event()

    def watch() -> None:
        wait = seconds
        while not finished.wait(wait):
            with lock:
                if finished.is_set():
                    return
                log.warning("A client has worked for %g s and is stopped (client-timeout).", seconds)
                _raise_in(thread, _TimeIsUp)
            wait = PATIENCE

    def stop_watching() -> None:
        finished.set()
        with lock:  # from here on the watcher does nothing; an exception that is still pending is cancelled
            _raise_in(thread, None)

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        try:
            watcher.start()
            return work()
        finally:
            stop_watching()
    except _TimeIsUp:
        stop_watching()  # the exception may have come in the middle of that
        raise ClientFailure(f"it did not finish within client-timeout = {seconds:g} s") from None


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Have the interpreter raise `exception` in a thread at its next instruction; None cancels a pending one."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if exception is None else ctypes.py_object(exception)
    )
