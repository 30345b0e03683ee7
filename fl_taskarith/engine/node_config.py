"""What a SuperNode's `--node-config` says: its partition, and the paths and the device of its own machine.

A message carries the server's paths. A SuperNode on another machine, or under another user, has its own.
"""

from typing import Any

from flwr.app import ConfigRecord, Context

from fl_taskarith.errors import ConfigError
from fl_taskarith.storage.paths import resolve

OWN_SETTINGS = ("data-dir", "weights", "device")  # settings of the run that a SuperNode may override
STATE_DIR = "state-dir"  # its folder for what clients keep between rounds


def partition_of(context: Context) -> int:
    """Return the partition that this client holds.

    Raises:
        ConfigError: the SuperNode was started without one.
    """
    partition = context.node_config.get("partition-id")
    if isinstance(partition, bool) or not isinstance(partition, int):
        raise ConfigError(
            f"This SuperNode has partition-id = {partition!r}, not a whole number: start it with "
            '--node-config "partition-id=N", N from 0, a different one for each.'
        )
    return partition


def use_own_places(settings: ConfigRecord, context: Context) -> None:
    """Put this SuperNode's own values in place of the server's in a message's settings (`grid.settings_record`).

    Raises:
        ConfigError: a `state-dir` that cannot be made absolute.
    """
    own: dict[str, Any] = dict(context.node_config)
    for key in OWN_SETTINGS:
        if key in own:
            settings[key] = own[key]
    if STATE_DIR in own:
        settings["round.state_folder"] = str(resolve(str(own[STATE_DIR]), STATE_DIR))
