"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import torch

GRACE = 30.0  # seconds between the end of the parent and that of its workers


def worker_pool(jobs: int, threads: int | None = None) -> ProcessPoolExecutor:
    """`jobs` spawned processes, each with `threads` threads of torch (None: its default).

    At the end of a `with` block, what has not begun is cancelled. However this process ends, killed included, so do
    they: left behind they would hold memory and finish their runs in folders that the next command wants.
    """
    context = multiprocessing.get_context("spawn")
    return _Pool(jobs, mp_context=context, initializer=_begin, initargs=(threads,))


class _Pool(ProcessPoolExecutor):
    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)


def _begin(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Once the parent is gone, a run in this process may finish its round and save it, within `GRACE` seconds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if callable(signal.getsignal(signal.SIGTERM)):  # a run is under way
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
    os._exit(1)
