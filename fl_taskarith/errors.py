"""The errors a user can meet. Each message says what was wrong, where, what was expected and what to do."""

import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 320  # characters of a foreign text in a message


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


class Damaged(CheckpointError):
    """None of the checkpoints of a run can be read: it has to begin again."""


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


def printable(text: object, width: int = LONGEST) -> str:
    """Return a foreign text on one line of at most `width` characters, with a ? for each that cannot be printed.

    A text that is too long keeps the first two thirds and its end, for errors end with what to do.
    """
    try:
        full = str(text)
        if len(full) > 4 * width:
            full = full[: 2 * width] + full[-2 * width :]
        line = " ".join("".join(each if each.isprintable() or each.isspace() else "?" for each in full).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # an object of a client's own, which says what it likes, and exits if it likes
        return "(text that cannot be read)"
    end = width // 3
    return line if len(line) <= width else f"{line[: width - end - 5]} ... {line[-end:]}"


def named_error(error: BaseException) -> str:
    """Return the type and the text of an exception that foreign code raised, on one line."""
    return printable(f"{printable(type(error).__name__)}: {printable(error)}")


def kind_of(value: object) -> str:
    """Return what a message says of a value of a wrong kind: its type, and of a tensor the dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return printable(f"{type(value).__name__} {value.dtype} {list(value.shape)}")
    return printable(type(value).__name__)


def imported(key: str, name: str) -> Any:
    """Return the object that a setting names as "module:name", for example one of the user's own.

    Raises:
        ConfigError: it cannot be imported; names the key.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except FlTaskarithError as error:  # of an object that this package refuses to make
        raise ConfigError(f'{key} = "{name}" cannot be imported: {error}') from error
    except (Exception, SystemExit) as error:  # whatever the module's own code does
        raise ConfigError(
            f'{key} = "{name}" cannot be imported ({type(error).__name__}: {error}). Expected "module:name" of an '
            "installed module, or of one in a folder on PYTHONPATH."
        ) from error


@contextmanager
def own_code(key: str, name: str) -> Iterator[None]:
    """Say what the user's own object raises as an error of the setting that names it; the package's own pass.

    Args:
        key, name: the setting and its value: "module:name", or a short name, whose errors pass as they are.

    Raises:
        ConfigError: in place of any other exception of code that `name` names.
    """
    try:
        yield
    except FlTaskarithError:
        raise
    except Exception as error:
        if ":" not in name:
            raise
        file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        frames = traceback.extract_tb(error.__traceback__)
        last = ([frame for frame in frames if frame.filename == file] or frames)[-1]
        place = f"{last.filename}, line {last.lineno}"
        raise ConfigError(f'{key} = "{name}" raised {named_error(error)} ({place}).') from error
