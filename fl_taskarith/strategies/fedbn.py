"""FedBN (Li et al., ICLR 2021): FedAvg of all but the normalisation parameters, which stay with each client."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.errors import ConfigError
from fl_taskarith.strategies.fedavg import FedAvg

LAYER_SCALE = {"*.ls1.*": "*.gamma_1", "*.ls2.*": "*.gamma_2"}  # the same parameters by the names of timm's Eva models


def personal_patterns(config: Config) -> list[str]:
    """Return the patterns of the names that stay with each client; those of LayerScale under all of its names."""
    given = [pattern.strip() for pattern in config.personal_parameters.split(",")]
    return given + [LAYER_SCALE[pattern] for pattern in given if pattern in LAYER_SCALE]


class FedBN(FedAvg):
    """Sends all that is trained but the `personal-parameters`: of a vision transformer its LayerNorm and LayerScale.

    A client keeps what it trains and is not sent in a file of its own. So there is no single model: rounds.csv measures
    the global one, whose personal parameters stay as pretrained; each client's own is evaluated at the end.
    """

    streams = True

    def message_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """Return the shared tensors alone.

        Raises:
            ConfigError: `personal-parameters` leaves nothing to share.
        """
        patterns = personal_patterns(self.config)
        shared = ArrayRecord()
        for name, array in arrays.items():
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                shared[name] = array
        if not shared:
            raise ConfigError(f'personal-parameters = "{self.config.personal_parameters}" leaves nothing to share.')
        return {self.arrayrecord_key: shared}

    def configure_evaluate(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Return a message to every client, for the accuracy of its own model."""
        records = self.message_arrays(arrays)
        for partition in grid.get_node_ids():
            settings = self.round_settings(server_round, partition)
            content = RecordDict({**records, self.configrecord_key: settings_record(self.config, settings)})
            yield Message(content, partition, MessageType.EVALUATE)
