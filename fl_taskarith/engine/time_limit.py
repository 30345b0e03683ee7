"""A limit on how long a client may work, wherever it runs."""

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fl_taskarith.errors import ClientFailure

log = logging.getLogger(__name__)


class _TimeIsUp(BaseException):  # no Exception: work that tolerates errors of its own must not tolerate this one
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs inside after `seconds`; 0 is no limit.

    A thread of its own asks the interpreter to raise in this one, which works in any thread and process but reaches
    Python code only: a call into a library, such as one training step, ends first.

    Raises:
        ClientFailure: the time was over.
    """
    if not seconds:
        yield
        return
    thread = threading.get_ident()
    lock, finished = threading.Lock(), threading.Event()

    def watch() -> None:
        if finished.wait(seconds):
            return
        with lock:
            if not finished.is_set():
                log.warning("A client has worked for %g s and is stopped (client-timeout).", seconds)
                _raise_in(thread, _TimeIsUp)

    watcher = threading.Thread(target=watch, daemon=True)
    try:
        try:
            watcher.start()
            yield
        finally:
            finished.set()
            with lock:  # from here on the watcher does nothing; what it asked for and has not come yet is taken back
                _raise_in(thread, None)
    except _TimeIsUp:
        raise ClientFailure(f"it did not finish within client-timeout = {seconds:g} s") from None


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Have the interpreter raise `exception` in a thread at its next instruction; None takes a pending one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if exception is None else ctypes.py_object(exception)
    )
