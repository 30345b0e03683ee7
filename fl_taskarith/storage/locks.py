"""Locks between processes: each is a file that its process holds, and that is free again however the process ends."""

import contextlib
import logging
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

POLL_SECONDS = 0.2  # between two looks at a lock that another process holds
A_DAY = 86_400.0  # seconds

log = logging.getLogger(__name__)


def take(path: Path) -> BaseFileLock | None:
    """Hold the lock file at `path` until it is released or this process ends; None in a folder without locks.

    Raises:
        Timeout: another process, or this one, holds it.
        OSError: it cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    if not can_lock(path.parent):
        return None
    while True:
        lock.acquire(timeout=0)
        if path.exists():
            return lock
        lock.release()  # of a file that another process removed meanwhile, for it took it for abandoned


@lru_cache
def can_lock(folder: Path) -> bool:
    """Whether files in `folder` can be locked: some network and FUSE file systems have no locks.

    Raises:
        OSError: no file can be made there.
    """
    probe = folder / f".probe.{os.getpid()}-{secrets.token_hex(4)}.fl-taskarith.tmp"
    probe.touch()
    try:
        with FileLock(probe).acquire(timeout=0):
            return True
    except (Timeout, OSError, NotImplementedError):
        return False
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Show others, by the lock PATH.lock, that this process makes the file or folder at `path` within the block."""
    lock_path = path.with_name(f"{path.name}.lock")
    lock = take(lock_path)
    try:
        yield
    finally:
        if lock is not None:
            _release(lock, lock_path)


def remove_if_abandoned(path: Path) -> None:
    """Remove a file or folder that was `owned` by a process that was killed, and its lock; one that is owned stays.

    A file without a lock, of a folder that has none, counts as abandoned when nobody wrote to it for a day.

    Raises:
        OSError: it is gone, or may not be removed.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    if not lock_path.exists():
        if path.is_file() and time.time() - path.lstat().st_mtime > A_DAY:
            path.unlink()
        return
    try:
        lock = take(lock_path)
    except Timeout:
        return
    if os.path.lexists(path):
        log.info("Removing %s (%.1f MB), which a killed process left behind.", path, path.lstat().st_size / 1e6)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if lock is not None:
        _release(lock, lock_path)


@contextlib.contextmanager
def only_maker(path: Path, what: str) -> Iterator[None]:
    """Let one process at a time make the file at `path`: wait for another one that does, and say so.

    The caller looks again, inside the block, whether the file has been made meanwhile. Where the folder cannot hold
    locks, nobody waits at all.

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
            _release(lock, maker_path, lock_path)


def _acquire(lock: BaseFileLock, path: Path, maker_path: Path, what: str) -> bool:
    """Wait until the lock is held; False where there are no locks."""
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
    """Name the holder of a lock, for example "PID 1234"; with the machine's name where it is another."""
    try:
        number, _, host = path.read_text(encoding="utf-8").partition(" on ")
    except (OSError, UnicodeDecodeError):
        return "PID unknown"
    return number if host == platform.node() else f"{number} on {host}"


def _release(lock: BaseFileLock, *files: Path) -> None:
    """Release the lock, and remove its files under it; Windows removes a lock when it is released."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    lock.release()
