"""Aggregation algorithms, one per file: a file `fed_x.py` with one subclass of FedAvg is `strategy = "fed-x"`.

A strategy of your own needs no file here: `strategy = "module:Class"` names any importable one.
"""

import importlib

from fl_taskarith.client.local_work import ANCHORS
from fl_taskarith.config.fields import snake
from fl_taskarith.errors import ConfigError, imported
from fl_taskarith.strategies.fedavg import FedAvg

BY_NAME = (*ANCHORS, "scaffold", "fedbn", "br-ifca", "fed-em")
"""Strategies that clients, and the checks of settings, know by these names: a subclass would not be known."""


def strategy_class(name: str) -> type[FedAvg]:
    """Return the class of a configuration's `strategy`.

    Raises:
        ConfigError: it cannot be imported, is no strategy, or derives from one that is known by its name.
    """
    own = imported("strategy", name) if ":" in name else _in_file(name)
    if not (isinstance(own, type) and issubclass(own, FedAvg)):
        raise ConfigError(
            f'strategy = "{name}" is no strategy: expected a subclass of fl_taskarith.strategies.fedavg.FedAvg.'
        )
    for known in BY_NAME:
        if name not in BY_NAME and issubclass(own, _in_file(known)):
            raise ConfigError(
                f'strategy = "{name}" derives from {_in_file(known).__name__}, whose clients do their part under '
                f'strategy = "{known}" alone: derive from fl_taskarith.strategies.fedavg.FedAvg.'
            )
    return own


def _in_file(name: str) -> type[FedAvg]:
    """Return the strategy in the file of this name in this folder."""
    module = importlib.import_module(f"{__name__}.{snake(name)}")
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, FedAvg)
             and each.__module__ == module.__name__]  # fmt: skip
    if len(found) != 1:
        raise ConfigError(f"The module {module.__name__} has {len(found)} subclasses of FedAvg: expected one.")
    return found[0]
