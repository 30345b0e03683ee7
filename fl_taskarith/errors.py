"""The errors a user can meet. Each message says what was wrong, where, what was expected and what to do."""


class FlTaskarithError(Exception):
    """Base class: anything that is the user's to fix. A traceback is for our own bugs only."""


class ConfigError(FlTaskarithError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(FlTaskarithError):
    """A data set is missing, damaged, or cannot be split or sharded as asked."""


class WeightsError(FlTaskarithError):
    """Pretrained weights are missing, damaged, or do not fit the model."""


class CheckpointError(FlTaskarithError):
    """A results folder or checkpoint cannot be read, written or resumed."""


class FrozenMissing(CheckpointError):
    """A client has no file of what is fixed in a round; it can be sent again."""


class FolderInUse(CheckpointError):
    """Another process is writing the run."""


class ClientFailure(FlTaskarithError):
    """A client raised, diverged or did not answer."""


class Divergence(ClientFailure):
    """Training left the finite numbers: the same settings would do so again."""


class AggregateDivergence(Divergence):
    """What the server made of the clients' replies is not finite."""


class BudgetSpent(FlTaskarithError):
    """The time given to a run is over: it stopped after a checkpoint and can be continued."""


class ReportError(FlTaskarithError):
    """TeX could not typeset a report; its source and figures are kept."""


class StudyError(FlTaskarithError):
    """Runs of a study failed, or a study could not choose a learning rate; everything else it ran is kept."""
