"""Progress of a pass that may take minutes: a bar for whoever watches, a line a minute for a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

BAR_AFTER = 2.0  # seconds: a shorter pass shows no bar
LINE_EVERY = 60.0  # seconds between two lines of the log

log = logging.getLogger("fl_taskarith")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def is_watched() -> bool:
    """Whether somebody watches, on a terminal or in a notebook, for whom bars are drawn."""
    return sys.stderr.isatty() or in_notebook()


def tracked(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield `items` one by one, and show how far the pass over them is and how long the rest will take.

    On a terminal or in a notebook this is a bar, from the third second on; elsewhere a line in the log every minute.

    Args:
        total: the number of items.
        what: the pass, for example "Tokens of the frozen blocks".
    """
    if is_watched():
        yield from tqdm(items, total=total, desc=what, delay=BAR_AFTER, leave=False)
        return
    started = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= LINE_EVERY:
            told = now
            left = (now - started) * max(0, total - done) / done
            log.info("%s: %.0f %% done, about %s left.", what, 100 * done / max(done, total), duration(left))
        yield item


def duration(seconds: float) -> str:
    """Return, for example, "40 s", "12 minutes" or "3.4 hours"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
