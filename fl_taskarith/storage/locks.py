"""One process makes what several need, and the others wait for it."""

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fl_taskarith.storage.files import can_lock

POLL_SECONDS = 0.2  # between two looks at a lock that another process holds

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_maker(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time make the file at `path`: wait for another one that does, and say so.

    The caller looks again, inside the block, whether the file has been made meanwhile. The lock goes with its process,
    however that ends, so nobody waits for a dead one. Where the folder cannot hold locks, nobody waits at all.

    Args:
        path: of the file, in a folder that exists.
        what: what the other process does, for the message: "computes the tokens".
    """
    lock_path, maker_path = path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.pid")
    lock = FileLock(lock_path)
    locked = _acquire(lock, path, maker_path, what)
    if locked:
        with contextlib.suppress(OSError):
            maker_path.write_text(f"PID {os.getpid()} on {platform.node()}", encoding="utf-8")
    try:
        yield
    finally:
        if locked:
            for leftover in (maker_path, lock_path):  # Windows removes the lock when it is released
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, path: Path, maker_path: Path, what: str) -> bool:
    """Whether the lock is held now; False where there are no locks."""
    try:
        if not can_lock(path.parent):
            return False
        try:
            lock.acquire(timeout=POLL_SECONDS, poll_interval=POLL_SECONDS / 4)
        except Timeout:
            log.info("Waiting for another process (%s) that %s: %s", _maker(maker_path), what, path)
            lock.acquire(poll_interval=POLL_SECONDS)
    except OSError as error:  # a folder or a lock of another user, which this one may only read
        log.info("%s is made without a lock (%s).", path, error.strerror or error)
        return False
    return True


def _maker(path: Path) -> str:
    """Who holds the lock, for example "PID 1234"; with the machine's name where it is another."""
    try:
        number, _, host = path.read_text(encoding="utf-8").partition(" on ")
    except (OSError, UnicodeDecodeError):
        return "PID unknown"
    return number if host == platform.node() else f"{number} on {host}"
