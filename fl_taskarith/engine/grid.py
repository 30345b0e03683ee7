"""The interface of an engine, addressed by the partition ids 0..K-1, and what a message says beside its tensors.

Flower draws node ids at random for every run and returns replies in the order of arrival. Both would make results
depend on chance, so every engine here addresses partitions and returns replies in the order of the messages.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Message

from fl_taskarith.config.settings import Config, from_mapping


class PartitionGrid(ABC):
    """What carries messages to clients, which partition ids address, and their replies back."""

    @abstractmethod
    def get_node_ids(self) -> range:
        """Return the partition ids 0..K-1."""

    @abstractmethod
    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield replies in the order of `messages`; an error reply from a client that raised or did not answer.

        Rules that add up one reply at a time need no more memory for a hundred clients than for one: a reply's tensors
        may be overwritten when the next one is asked for, so use or copy them first. `engine.replies` says what a run
        does about errors.
        """


@dataclass(frozen=True)
class RoundSettings:
    """What changes from message to message beside the tensors.

    number: the round, from 1, or 0 before the first; the calibration round in messages about masks. learning_rate: of
    this round. state_folder: where clients keep files between rounds. state_name: the receiver's newest file in it;
    empty if it has none. frozen_name: the file in it with what is frozen in this round; empty if nothing is.
    logit_scale: the factor between the ridge head's own scores and the model's, which the squared loss removes.
    """

    number: int
    learning_rate: float = 0.0
    state_folder: str = ""
    state_name: str = ""
    frozen_name: str = ""
    logit_scale: float = 1.0


def settings_record(config: Config, current: RoundSettings) -> ConfigRecord:
    """Return all settings of the run and of the round, as every message carries them.

    Clients take their settings from here and not from their own run-config, so that the server's resolved values
    (such as threads) hold everywhere, however the run was started.
    """
    of_round = {f"round.{name}": value for name, value in dataclasses.asdict(current).items()}
    return ConfigRecord({**config.to_run_config(), **of_round})


def read_settings(record: ConfigRecord) -> tuple[Config, RoundSettings]:
    """Return what `settings_record` was given."""
    values: dict[str, Any] = dict(record)
    of_round = {name: values.pop(name) for name in list(values) if name.startswith("round.")}
    current = RoundSettings(**{name.removeprefix("round."): value for name, value in of_round.items()})
    return _checked(tuple((name, type(value), value) for name, value in values.items())), current


@lru_cache(maxsize=4)
def _checked(settings: tuple[tuple[str, type, Any], ...]) -> Config:
    """Check the settings of a run once and not with every message; types tell 1 from 1.0 and True."""
    return from_mapping({name: value for name, _, value in settings})
