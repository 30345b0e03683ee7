"""What round 0 finds, kept from one run to the next where the next differs only in what comes after it."""

from collections.abc import Callable
from typing import Any, TypeVar

from fl_taskarith.config import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.files import version_of
from fl_taskarith.logbook import Row
from fl_taskarith.paths import resolve

Found = TypeVar("Found")

LATER_KEYS = frozenset({"learning-rate", "num-rounds", "run-name", "results-dir"})  # what round 0 does not depend on
CONFIGURATIONS = 2  # that are kept
COUNTED = ("clients", "uplink_bytes", "downlink_bytes")  # of a row: as much as if it had been found anew


class Starts:
    """The ridge head and the mask of the last two configurations, for the next run of a search.

    A search runs one configuration at many learning rates for a few rounds each: its rounds may take less time than
    solving the head and scoring the mask, which are the same bits every time. Two, since a process that shares runs
    with others goes to and fro between one arm's search and another's seeds.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], dict[str, tuple[Any, Row]]] = {}  # the last one used at the end

    def once(self, config: Config, what: str, row: Row, find: Callable[[], Found]) -> Found:
        """`find()`, which may count traffic in `row`, or what it found under `what` for the same configuration.

        Not kept under head-rounds, whose result depends on the rate, nor where failed clients may be left out.
        """
        if config.head_rounds or config.on_client_failure == "skip":
            return find()
        settings = [item for item in config.to_run_config().items() if item[0] not in LATER_KEYS]
        files = {"weights": config.weights, "mask-file": config.mask_file}
        key = (*settings, *(_version(path, name) for name, path in files.items() if path))
        kept = self._kept[key] = self._kept.pop(key, {})
        if len(self._kept) > CONFIGURATIONS:
            del self._kept[next(iter(self._kept))]
        if what not in kept:
            before = dict(row)
            found = find()
            kept[what] = found, {name: row[name] - before[name] for name in COUNTED if name in row}
            return found
        found, counted = kept[what]
        for name, value in counted.items():
            row[name] += value
        return found


def _version(path: str, key: str) -> tuple[int, int]:
    """Changes when the file is replaced, for the next run reads it anew; (0, 0) where `path` names no file."""
    try:
        return version_of(resolve(path, key))
    except (OSError, ConfigError):  # a word such as "pretrained", or a file that the run itself will miss
        return 0, 0
