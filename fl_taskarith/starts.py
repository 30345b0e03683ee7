"""What round 0 finds, kept from one run to the next where the next differs only in what comes after it."""

from collections.abc import Callable
from typing import Any, TypeVar

from fl_taskarith.config import Config
from fl_taskarith.logbook import Row

Found = TypeVar("Found")

LATER_KEYS = frozenset({"learning-rate", "num-rounds", "run-name", "results-dir"})  # what round 0 does not depend on
COUNTED = ("clients", "uplink_bytes", "downlink_bytes")  # of a row: as much as if it had been found anew


class Starts:
    """The ridge head and the mask of the last configuration, for the next run of a search.

    A search runs one configuration at many learning rates for a few rounds each: its rounds may take less time than
    solving the head and scoring the mask, which are the same bits every time.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[str, object], ...] = ()
        self._kept: dict[str, tuple[Any, Row]] = {}

    def once(self, config: Config, what: str, row: Row, find: Callable[[], Found]) -> Found:
        """`find()`, which may count traffic in `row`, or what it found under `what` for the same configuration.

        Not kept under head-rounds, whose result depends on the rate, nor where failed clients may be left out.
        """
        if config.head_rounds or config.on_client_failure == "skip":
            return find()
        key = tuple((name, value) for name, value in config.to_run_config().items() if name not in LATER_KEYS)
        if key != self._key:
            self._key, self._kept = key, {}
        if what not in self._kept:
            before = dict(row)
            found = find()
            self._kept[what] = found, {name: row[name] - before[name] for name in COUNTED if name in row}
            return found
        kept, counted = self._kept[what]
        for name, value in counted.items():
            row[name] += value
        return kept  # type: ignore[no-any-return]
