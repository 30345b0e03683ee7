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


def tracked(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield `items` one by one, and show how far the pass over them is and how long the rest will take.

    On a terminal or in a notebook this is a bar, from the third second on; elsewhere a line in the log every minute.

    Args:
        total: the number of items.
        what: the pass, for example "Tokens of the frozen blocks".
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        yield from tqdm(items, total=total, desc=what, delay=BAR_AFTER, leave=False)
        return
    started = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= LINE_EVERY:
            told = now
            left = (now - started) * max(0, total - done) / done
            log.info("%s: %.0f %% done, about %s left.", what, 100 * done / max(done, total), _spoken(left))
        yield item


def _spoken(seconds: float) -> str:
    """Write a time, for example "40 s", "12 min" or "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
