"""Which folder a run writes to, and from which run it goes on: its own, an unfinished one, or a shorter one."""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import CheckpointError, ConfigError, FolderInUse
from fl_taskarith.storage.checkpoint import changes, list_checkpoints, require_own, settings_of
from fl_taskarith.storage.files import make_folder, require_writable
from fl_taskarith.storage.locks import take
from fl_taskarith.storage.own_modules import changed_modules
from fl_taskarith.storage.paths import results_root
from fl_taskarith.storage.run_record import RECORD, is_finished, read_record
from fl_taskarith.storage.verified_files import CHECKSUMS

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
        CheckpointError: the unfinished run there has other settings, holds checkpoints of another run, or a folder
            cannot be used.
    """
    folder, origin = _find_folder(config)
    make_folder(folder)
    return folder, origin


def require_folder(config: Config) -> None:
    """Check all that `choose_folder` and `hold` check, before the data of a run are read; nothing is left behind.

    Raises:
        ConfigError, CheckpointError: as those do.
    """
    folder, _ = _find_folder(config)
    if not folder.exists():
        require_writable(folder)
    elif (lock := hold(folder)) is not None:
        lock.release()


def _find_folder(config: Config) -> tuple[Path, Path | None]:
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
    """Return the folder of the last finished run of these settings under its name; None if there is none.

    A run of another version of a module that the settings name is none of these settings.
    """
    last = None
    for folder in itertools.takewhile(Path.exists, _folders(results_root(config.results_dir), run_name(config))):
        try:
            record = read_record(folder, checked=False)
            same = record is not None and from_mapping(record["config"]).fingerprint() == config.fingerprint()
            if same and is_finished(record) and _has_ended(folder, config):
                if changed := changed_modules(record, config):
                    log.warning("The module that %s names has changed since the run in %s.", changed[0], folder)
                else:
                    last = folder
        except (OSError, CheckpointError, ConfigError):
            continue  # no run of ours, or one that cannot be read
    return last


def _folders(root: Path, name: str) -> Iterator[Path]:
    """Yield the folders of the runs that have one name, in order, without end."""
    yield root / name
    yield from (root / f"{name}-{number}" for number in itertools.count(2))


def _folder_for(root: Path, name: str, config: Config) -> tuple[Path, Path | None]:
    finished = []
    for folder in _folders(root, name):
        if not folder.exists():
            break
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file where a run's folder should be: move it away.")
        if config.resume and not _has_ended(folder, config):
            require_own(folder / "checkpoints", config)
            if last_saved_round(folder) >= 0 or (folder / RECORD).exists():
                return folder, folder
            break  # killed before its first write: it is begun as if it were not there
        finished.append(folder)
    if not config.resume:
        return folder, None
    others = finished if config.run_name else sorted(root.glob(f"{name.rpartition('-')[0]}-*/"))
    in_place, origin = _extendable(others, config)
    return (origin if in_place and origin is not None else folder), origin


def _extendable(folders: Iterable[Path], config: Config) -> tuple[bool, Path | None]:
    """Find among `folders` the run with most rounds that can go on as `config`, and whether it does so in its folder.

    Those come first: unfinished ones of as many rounds.
    """
    candidates: list[tuple[bool, int, Path]] = []
    for folder in folders:
        try:
            record, done = read_record(folder, checked=False), last_saved_round(folder)
            if record is None or done < 0:
                continue
            settings, finished = record["config"], is_finished(record)
            same_length = settings.get("num-rounds", config.num_rounds) == config.num_rounds
            if not config.extends(settings, done) or (finished and same_length):
                continue
            require_own(folder / "checkpoints", config)
        except (OSError, CheckpointError):
            continue  # no run of ours, or one that cannot be read: it is none to go on from
        if finished or not _is_in_use(folder):
            candidates.append((same_length, done, folder))
    in_place, _, origin = max(candidates, default=(False, 0, None))
    return in_place, origin


def last_saved_round(folder: Path) -> int:
    """Return the round of a run's last checkpoint; -1 without one."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    return checkpoints[0][0] if checkpoints else -1


def _is_in_use(folder: Path) -> bool:
    """Whether another process is writing the run in `folder`, or this one may not."""
    try:
        lock = hold(folder)
    except CheckpointError:
        return True
    if lock is not None:
        lock.release()
    return False


def _has_ended(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has ended well; one that has not must have the same settings as `config`.

    A run that was killed before it wrote SHA256SUMS, its last file, has not ended: it is completed from its last
    checkpoint. Without run.json, the checkpoints say the settings.
    """
    done, record = last_saved_round(folder), read_record(folder, checked=False)
    if record is None and done < 0:
        return False  # killed before its first write: it is begun as if it were not there
    settings = _recorded_settings(folder, config) if record is None else record["config"]
    different = changes(settings, config)
    if is_finished(record):
        return bool(different) or done < 0 or (folder / CHECKSUMS).exists()
    if different and not config.extends(settings, max(done, 0)):
        raise CheckpointError(
            f"The unfinished run in {folder} cannot be continued under other settings: {different}. Restore them, "
            "choose another run-name, or set resume = false to begin a new run beside it."
        )
    return False


def _recorded_settings(folder: Path, config: Config) -> dict[str, Any]:
    """Return the settings of a run without run.json: its checkpoints say them, or its name has their fingerprint."""
    for _, path in list_checkpoints(folder / "checkpoints"):
        if settings := settings_of(path):
            return settings
    if not config.run_name:
        return config.to_run_config()
    raise CheckpointError(
        f"{folder} has checkpoints and no run.json, and they do not say under which settings: restore run.json, move "
        "the folder away, or choose another run-name."
    )


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
