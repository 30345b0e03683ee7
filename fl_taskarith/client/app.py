"""The Flower ClientApp: which function answers which message.

A client is stateless but for files that messages name: everything else it needs is in the message, the data set and its
partition id. It knows no strategy: a message with a record "control" is answered as SCAFFOLD asks, and what is trained
but not in the message is the client's own.
"""

import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_taskarith.client.local_training import train, train_in_cluster
from fl_taskarith.client.queries import (
    evaluate_own,
    gram_diagonals,
    keep_frozen,
    ridge_statistics,
    score_sensitivity,
    tell_partition,
)
from fl_taskarith.client.regression_client import cluster_step, expectation_step
from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.node_config import partition_of, use_own_places
from fl_taskarith.engine.replies import CLIENT_ERROR, DIVERGED, LACKS_FROZEN
from fl_taskarith.engine.time_limit import limited
from fl_taskarith.errors import Divergence, FlTaskarithError, FrozenMissing, named_error
from fl_taskarith.workspace.regression_data import mixture_of
from fl_taskarith.workspace.workspace import workspace

log = logging.getLogger(__name__)

ROUTES: dict[str, Callable[[Message, int], RecordDict]] = {
    "train": train,
    "train.cluster": train_in_cluster,
    "train.expectation": expectation_step,
    "train.cluster_step": cluster_step,
    "evaluate": evaluate_own,
    "query.partition": tell_partition,
    "query.ridge": ridge_statistics,
    "query.sensitivity": score_sensitivity,
    "query.gram": gram_diagonals,
    "query.frozen": keep_frozen,
}
"""What a client does at a message of each type: from the message and the client's partition to its reply."""


def answer(work: Callable[[Message, int], RecordDict], message: Message, context: Context) -> Message:
    """Reply with what `work` returns for this client's partition, or with an error in the client's own words.

    Flower would turn an exception into a reply that its strategies silently skip; ours report it or stop.
    """
    try:
        settings = message.content.config_records["config"]
        use_own_places(settings, context)
        partition, timeout = partition_of(context), float(settings.get("client-timeout", 0.0))  # type: ignore[arg-type]
        if timeout:
            load(message)
        return Message(limited(lambda: work(message, partition), timeout), reply_to=message)
    except Divergence as error:
        return Message(Error(DIVERGED, str(error)), reply_to=message)
    except FrozenMissing as error:
        return Message(Error(LACKS_FROZEN, str(error)), reply_to=message)
    except FlTaskarithError as error:
        reason = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a bug of ours, or out of memory: the server must learn of it with its origin
        log.debug("Client %s:", context.node_config.get("partition-id"), exc_info=True)
        origin = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{named_error(error)} ({Path(origin.filename).name}, line {origin.lineno})"
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)


def load(message: Message) -> None:
    """Load what all messages need: a limit on the client's work does not count it, and must not interrupt it."""
    config, _ = read_settings(message.content.config_records["config"])
    if config.dataset == REGRESSION:
        mixture_of(config)
    else:
        workspace(config)


app = ClientApp()
for message_type, work in ROUTES.items():
    category, _, action = message_type.partition(".")
    getattr(app, category)(action or "default")(partial(answer, work))
