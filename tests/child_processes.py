"""Processes that a test starts, watches and kills."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from fl_taskarith.cli.command import main


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


@contextmanager
def command(words: list[str], folder: Path) -> Iterator[BaseProcess]:
    """A command of ours in a process group of its own, everything imported; it prints into files in `folder`."""
    process = get_context("fork").Process(target=_run, args=(words, folder))
    process.start()
    try:
        yield process
    finally:
        if process.pid is not None and process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _run(words: list[str], folder: Path) -> None:
    os.setsid()
    sys.stdout, sys.stderr = open(folder / "printed.txt", "w"), open(folder / "errors.txt", "w")
    sys.exit(main(words))


def kill(process: BaseProcess) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
