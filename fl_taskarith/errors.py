"""The errors a user can meet. Each message says what was wrong, where, what was expected and what to do."""

from collections.abc import Iterable


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


def listed(lines: Iterable[str], most: int = 5, width: int = 400) -> str:
    """Return lines for a message, indented: at most `most`, then how many more; none with control characters."""
    lines = list(lines)
    shown = [printable(line, width) for line in lines[:most]]
    return "".join(f"\n  {line}" for line in shown) + (f"\n  and {len(lines) - most} more" if lines[most:] else "")


def printable(text: object, width: int = 160) -> str:
    """Return a foreign text on one line of at most `width` characters, none of them a control character."""
    line = "".join(each if each.isprintable() else " " for each in str(text)[: width + 1])
    return line if len(line) <= width else line[: width - 3] + "..."
