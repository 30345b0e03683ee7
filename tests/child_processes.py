"""Processes that a test starts, watches and kills."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path


@contextmanager
def at_work(work: Callable[[Path], None], folder: Path) -> Iterator[BaseProcess]:
    """A process that has reached the point where `work` touches folder/ready."""
    process = get_context("fork").Process(target=work, args=(folder,), daemon=True)
    process.start()
    try:
        while not (folder / "ready").exists():
            assert process.is_alive()
            time.sleep(0.01)
        yield process
    finally:
        kill(process)


def kill(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
