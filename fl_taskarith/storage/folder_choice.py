"""Which folder a run writes to, and from which run it goes on: its own, an unfinished one, or a shorter one."""

import json
import logging
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import CheckpointError, ConfigError, FolderInUse
from fl_taskarith.storage.checkpoint import list_checkpoints
from fl_taskarith.storage.locks import take
from fl_taskarith.storage.paths import results_root

log = logging.getLogger(__name__)


def run_name(config: Config) -> str:
    """Return `run-name`, or a name made of the main settings and the fingerprint of all that decide the numbers."""
    if config.run_name:
        return config.run_name
    words = [name.rpartition(":")[2].lower() for name in (config.dataset, config.strategy)]
    if config.dataset == REGRESSION:
        words += [f"m{config.num_clients}", f"n{config.examples_per_client}", f"k{config.num_clusters}"]
    elif config.strategy != "centralized":
        drawn = f"j{config.local_steps_min}to{config.local_steps_max}"
        words += [sharding_name(config), drawn if config.local_steps_max else f"j{config.local_steps}"]
    return "-".join([*words, f"s{config.seed}", config.fingerprint()])


def sharding_name(config: Config) -> str:
    """Name the sharding, for example "iid", "nc2" or "dir0.5"."""
    names = {"classes": f"nc{config.classes_per_client}", "dirichlet": f"dir{config.dirichlet_alpha:g}"}
    return names.get(config.sharding, config.sharding)


def choose_folder(config: Config) -> tuple[Path, Path | None]:
    """Return the folder to write to, made if need be, and the one whose last checkpoint the run begins with, if any.

    Raises:
        ConfigError: run-name is no plain folder name.
        CheckpointError: the unfinished run there has other settings, or a folder cannot be used.
    """
    name = run_name(config)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}", name):
        raise ConfigError(
            f'run-name = {shown(name)} is no plain folder name: use letters, digits, ".", "_" and "-" (at most 150), '
            "beginning with a letter, digit or underscore."
        )
    root = results_root(config.results_dir)
    try:
        return _folder_for(root, name, config)
    except OSError as error:  # a name too long for the file system, a folder that may not be looked into
        raise CheckpointError(
            f"Cannot use the results folder {root / name}: {error.strerror or error}. Set results-dir."
        ) from error


def finished_run(config: Config) -> Path | None:
    """Return the folder of the last finished run of these settings under its name; None if there is none."""
    root, name = results_root(config.results_dir), run_name(config)
    last = None
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return last
        try:
            status, settings, _ = _read_record(folder)
            if status == "finished" and from_mapping(settings).fingerprint() == config.fingerprint():
                last = folder
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
            continue  # no run of ours, or one that cannot be read
    return last


def _folder_for(root: Path, name: str, config: Config) -> tuple[Path, Path | None]:
    number, finished = 1, []
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file where a run's folder should be: move it away.")
        if config.resume and not _is_finished(folder, config):
            if (folder / "run.json").exists():
                return folder, folder
            break  # killed before its first write: it is begun as if it were not there
        finished.append(folder)
        number += 1
    origin = None
    if config.resume:
        others = finished if config.run_name else sorted(root.glob(f"{name.rpartition('-')[0]}-*/"))
        in_place, origin = _extendable(others, config)
        if in_place and origin is not None:
            return origin, origin
    folder.mkdir(parents=True, exist_ok=True)
    return folder, origin


def _extendable(folders: Iterable[Path], config: Config) -> tuple[bool, Path | None]:
    """Find among `folders` the run with most rounds that can go on as `config`, and whether it does so in its folder.

    Those come first: unfinished ones of as many rounds.
    """
    candidates: list[tuple[bool, int, Path]] = []
    for folder in folders:
        try:
            status, settings, done = _read_record(folder)
            same_length = settings.get("num-rounds", config.num_rounds) == config.num_rounds
            finished = status == "finished"
            usable = done >= 0 and config.extends(settings, done) and not (finished and same_length)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no run of ours, or one that cannot be read: it is none to go on from
        if usable and (finished or not _is_in_use(folder)):
            candidates.append((same_length, done, folder))
    in_place, _, origin = max(candidates, default=(False, 0, None))
    return in_place, origin


def _read_record(folder: Path) -> tuple[str, dict[str, Any], int]:
    """Return a run's status and settings from its run.json, and the round of its last checkpoint, -1 without one.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no such record, or it is none of a run.
    """
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    checkpoints = list_checkpoints(folder / "checkpoints")
    return record["status"], dict(record["config"]), checkpoints[0][0] if checkpoints else -1


def _is_in_use(folder: Path) -> bool:
    """Whether another process is writing the run in `folder`, or this one may not."""
    try:
        lock = hold(folder)
    except CheckpointError:
        return True
    if lock is not None:
        lock.release()
    return False


def _is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has ended well; an unfinished one must have the same settings as `config`."""
    path = folder / "run.json"
    if not path.exists():
        return (folder / "checkpoints").exists()  # else it was killed before its first write and may be taken over
    try:
        status, settings, done = _read_record(folder)
        different = [] if status == "finished" else config.differing_keys(settings)
        if different == ["num-rounds"] and config.extends(settings, max(done, 0)):
            different = []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}), so the run in this folder can be neither continued nor passed over: "
            "move the folder away, or choose another run-name."
        ) from error
    if different:
        now = config.to_run_config()
        changes = "; ".join(f"{key} was {settings.get(key)!r}, now {now[key]!r}" for key in different)
        raise CheckpointError(
            f"The unfinished run in {folder} cannot be continued under other settings: {changes}. Restore them, "
            "choose another run-name, or set resume = false to begin a new run beside it."
        )
    return status == "finished"


def hold(folder: Path) -> BaseFileLock | None:
    """Hold a run's folder for this process; the lock goes with the process, however it ends. None without locks.

    Raises:
        FolderInUse: another process holds it.
        CheckpointError: nothing can be written there.
    """
    try:
        lock = take(folder / ".lock")
    except Timeout as error:
        raise FolderInUse(
            f"Another process is writing the run in {folder}: wait for it or stop it (flwr stop RUN-ID for a run that "
            "flwr run started), or choose another run-name."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    if lock is None:  # some network and FUSE file systems
        log.warning("%s cannot be locked: do not run the same thing twice at once.", folder)
    return lock
