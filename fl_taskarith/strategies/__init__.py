"""Aggregation algorithms, one per file: a file `fed_x.py` with one subclass of FedAvg is `strategy = "fed-x"`.

A strategy of your own needs no file here: `strategy = "module:Class"` names any importable one.
"""

import importlib

from fl_taskarith.client.local_work import ANCHORS
from fl_taskarith.config.fields import snake
from fl_taskarith.errors import ConfigError, imported
from fl_taskarith.strategies.fedavg import FedAvg


def strategy_class(name: str) -> type[FedAvg]:
    """Return the class of a configuration's `strategy`.

    Raises:
        ConfigError: "module:Class" that cannot be imported, or is no strategy, or needs clients of its own.
    """
    if ":" not in name:
        module = importlib.import_module(f"{__name__}.{snake(name)}")
        (only,) = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, FedAvg)
                   and each.__module__ == module.__name__)  # fmt: skip
        return only
    own = imported("strategy", name)
    if not (isinstance(own, type) and issubclass(own, FedAvg)):
        raise ConfigError(
            f'strategy = "{name}" is no strategy: expected a subclass of fl_taskarith.strategies.fedavg.FedAvg.'
        )
    for named in ANCHORS:
        if issubclass(own, strategy_class(named)):
            raise ConfigError(
                f'strategy = "{name}" derives from {strategy_class(named).__name__}, whose momentum clients compute '
                f'under strategy = "{named}" alone: derive from fl_taskarith.strategies.fedavg.FedAvg.'
            )
    return own
