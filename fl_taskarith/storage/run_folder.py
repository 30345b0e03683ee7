"""The folder of one run: run.json (what was run, on what), rounds.csv (one row per round), and its checkpoints."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import BudgetSpent, CheckpointError, ConfigError, FolderInUse
from fl_taskarith.storage.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_latest_checkpoint,
    referenced_client_states,
    save_checkpoint,
)
from fl_taskarith.storage.client_files import prune_client_states
from fl_taskarith.storage.files import CHECKSUMS, check_unchanged, write_atomically, write_checksums
from fl_taskarith.storage.paths import checkout, results_root
from fl_taskarith.storage.trackers import Tracker, open_trackers

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

COLUMNS = (
    "round",
    "learning_rate",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "client_update_norm",
    "client_cosine",
    "update_norm",
    "task_vector_norm",
    "largest_distance",
    "matched_distance",
    "nearest_distance",
    "cluster_accuracy",
    "clients",
    "failed_clients",
    "uplink_bytes",
    "downlink_bytes",
    "train_seconds",
    "overhead_seconds",
    "evaluate_seconds",
)
PRETRAINED = "pretrained_sha256"  # in run.json: of the weights that a run starts from
TIMING_COLUMNS = ("train_seconds", "overhead_seconds", "evaluate_seconds")
PACKAGES = ("fl-taskarith", "flwr", "torch", "torchvision", "timm", "numpy")

CHECKED = ("run.json", "rounds.csv", "clients.csv")  # of a finished run: a changed digit shows nowhere else

# Of run.json: what a resumed run does not find out anew.
KEPT_FACTS = ("started", "head", "mask", "continued_from", PRETRAINED)

Row = dict[str, Any]

log = logging.getLogger(__name__)


class Logbook:
    """Writes one run's folder. A context manager: holds the folder's lock, and records how the run ended.

    Attributes:
        folder: absolute path of the run.
        rows: the rows of rounds.csv so far, in order.
        restored: the checkpoint to continue from, if any.
    """

    def __init__(self, config: Config) -> None:
        """Find the run's folder: that of an unfinished run to continue, or a new one (name, name-2, ...).

        From a finished run that has fewer rounds, and whose schedule does not depend on their number, the new one goes
        on: its last checkpoint is copied.

        Raises:
            ConfigError: run-name is no plain folder name.
            CheckpointError: the unfinished run has other settings (names the keys), is being written by another
                process, or cannot be read.
        """
        self.folder, origin = _choose_folder(config)
        self.rows: list[Row] = []
        self.restored: Checkpoint | None = None
        self._config = config
        self._trackers: list[Tracker] = []
        self._lock = _lock(self.folder)
        self._record: dict[str, Any] = {"status": "running", "config": config.to_run_config()} | environment()
        try:
            self._begin(origin)
        except BaseException:  # the lock would last as long as the traceback, in a notebook up to the next error
            if origin is not None and origin != self.folder:  # half a copy, of which there is no need
                shutil.rmtree(self.folder, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()
            raise

    def _begin(self, origin: Path | None) -> None:
        """Clear away what a killed process left, take the last checkpoint back, and write the files anew."""
        if origin is not None and origin != self.folder:
            log.info("Going on from the run in %s, which stays as it is.", origin)
            self._record["continued_from"] = origin.name
            _copy_end(origin, self.folder)
        for leftover in [*self.folder.rglob(".*.tmp"), self.folder / CHECKSUMS]:
            with contextlib.suppress(OSError):  # where nothing can be written, the next write says so
                leftover.unlink(missing_ok=True)
        self.restored = load_latest_checkpoint(self.checkpoints)
        if self.restored is not None:
            self.rows = self.restored.notes["rows"]
            self._record |= self.restored.notes["record"]
            log.info("Continuing %s after round %d.", self.folder, self.restored.round)
        self.note()
        self._rewrite_rounds()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def client_states(self) -> Path:
        """The folder of what clients keep between rounds."""
        return self.folder / "client-states"

    @property
    def rounds_csv(self) -> Path:
        """The table of rounds."""
        return self.folder / "rounds.csv"

    def note(self, **facts: Any) -> None:
        """Add facts (JSON values) to run.json."""
        self._record |= facts
        write_atomically(self.folder / "run.json", json.dumps(self._record, indent=2) + "\n")

    def fact(self, name: str) -> dict[str, Any]:
        """A group of facts of run.json; {} if it is not there (yet)."""
        found = self._record.get(name)
        return found if isinstance(found, dict) else {}

    def note_start(self, **facts: Any) -> None:
        """Add the facts found out at the start of a sitting; one that goes on must have the weights of the first.

        Raises:
            CheckpointError: the pretrained weights are others than those that the run began with.
        """
        began, now = self._record.get(PRETRAINED), facts.get(PRETRAINED)
        if self.restored is not None and began is not None and now != began:
            raise CheckpointError(
                f"The pretrained weights are not those that the run in {self.folder} began with (checksum {now}, not "
                f"{began}): restore the file that `weights` names, or choose another run-name."
            )
        self.note(**facts)

    def write_round(self, row: Row) -> None:
        """Append one row; columns that it lacks stay empty. The row is in the file when this returns."""
        unknown = row.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"not columns of rounds.csv: {sorted(unknown)}")
        self.rows.append(row)
        try:
            with open(self.rounds_csv, "a", encoding="utf-8", newline="") as file:
                file.write(_csv_lines([row]))
        except OSError as error:
            raise CheckpointError(f"Cannot write {self.rounds_csv}: {error.strerror or error}.") from error
        for tracker in self._trackers:
            tracker.log(row)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint with the log up to its round as notes, and drop client states no checkpoint refers to."""
        facts = {key: value for key, value in self._record.items() if key in KEPT_FACTS}
        noted = dataclasses.replace(checkpoint, notes={"rows": self.rows, "record": facts})
        save_checkpoint(self.checkpoints, noted)
        prune_client_states(self.client_states, referenced_client_states(self.checkpoints))

    def __enter__(self) -> Self:
        try:
            self._trackers = open_trackers(self._config, self.folder, self.rows)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.note(status="finished", finished=_now())
                write_checksums(self.folder, CHECKED)
            else:
                stopped = isinstance(error, (KeyboardInterrupt, BudgetSpent))
                if isinstance(error, KeyboardInterrupt):
                    log.warning("%s", self._told_stop())
                self.note(status="interrupted" if stopped else "failed", cause=repr(error))
        except CheckpointError:
            if error is None:  # else the run's own error is the one to show
                raise
        finally:
            if self._lock is not None:
                self._lock.close()
            for tracker in self._trackers:
                tracker.close(failed=error is not None)

    def _told_stop(self) -> str:
        """What an interrupted run says last: which round is saved."""
        saved = list_checkpoints(self.checkpoints)
        if not saved:
            return f"Interrupted before anything was saved: the same command begins anew ({self.folder})."
        return f"Interrupted; saved after round {saved[0][0]}: the same command goes on from there ({self.folder})."

    def _rewrite_rounds(self) -> None:
        write_atomically(self.rounds_csv, ",".join(COLUMNS) + "\n" + _csv_lines(self.rows))


def run_name(config: Config) -> str:
    """`run-name`, or a name made of the main settings and the fingerprint of all that decide the numbers."""
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
    """For example "iid", "nc2" or "dir0.5"."""
    names = {"classes": f"nc{config.classes_per_client}", "dirichlet": f"dir{config.dirichlet_alpha:g}"}
    return names.get(config.sharding, config.sharding)


def read_rounds(folder: Path) -> list[Row]:
    """rounds.csv of a run folder as one dictionary per row; empty cells are None.

    Raises:
        CheckpointError: it is missing, its header is not ours, a row is cut short or not numeric, or it has changed
            since the run ended. Columns that a version did not have yet are None.
    """
    path = folder / "rounds.csv"
    try:
        content = path.read_bytes()
        lines = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Expected the folder of a run.") from error
    if not lines or not {"round"} <= set(lines[0]) <= set(COLUMNS):
        raise CheckpointError(f"{path} does not begin with columns of {', '.join(COLUMNS)}.")
    absent = dict.fromkeys(set(COLUMNS) - set(lines[0]))
    try:
        rows = [absent | {name: _number(cell) for name, cell in zip(lines[0], line, strict=True)} for line in lines[1:]]
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged row ({error}): resume the run to rebuild it.") from error
    check_unchanged(path, content)
    return rows


def _number(cell: str) -> int | float | None:
    if not cell:
        return None
    return int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell)


def _csv_lines(rows: list[Row]) -> str:
    """Floats are written by repr, so that they read back to the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if row.get(name) is None else repr(row[name]) for name in COLUMNS])
    return text.getvalue()


def _choose_folder(config: Config) -> tuple[Path, Path | None]:
    """The folder to write to, made if need be, and the one whose last checkpoint the run begins with, if any."""
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
    """Of `folders` the run with most rounds that can go on as `config`, and whether it does so in its own folder.

    Those come first: unfinished ones of as many rounds.
    """
    found: list[tuple[bool, int, Path]] = []
    for folder in folders:
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            finished, settings = record["status"] == "finished", dict(record["config"])
            checkpoints = list_checkpoints(folder / "checkpoints")
            done = checkpoints[0][0] if checkpoints else -1
            same_length = settings.get("num-rounds", config.num_rounds) == config.num_rounds
            usable = done >= 0 and config.extends(settings, done) and not (finished and same_length)
            if usable and (finished or not _is_locked(folder)):
                found.append((same_length, done, folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no run of ours, or one that cannot be read: it is none to go on from
    if not found:
        return False, None
    in_place, _, folder = max(found)
    return in_place, folder


def _is_locked(folder: Path) -> bool:
    """Whether another process is writing the run in `folder`, or this one may not."""
    try:
        lock = _lock(folder)
    except CheckpointError:  # in use, or not ours to write to
        return True
    if lock is not None:
        lock.close()
    return False


def _copy_end(origin: Path, folder: Path) -> None:
    """What a run that goes on from the last checkpoint of the one in `origin` needs of it.

    Checkpoints first: a folder that has them and no run.json yet, of a killed process, is passed over by the next one.
    """
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        for _, path in reversed(list_checkpoints(origin / "checkpoints")):
            write_atomically(folder / "checkpoints" / path.name, path.read_bytes())
        if (origin / "mask.safetensors").exists():
            shutil.copy2(origin / "mask.safetensors", folder)
        if (origin / "client-states").exists():
            shutil.copytree(origin / "client-states", folder / "client-states", dirs_exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot copy the end of the run in {origin} to {folder}: {error}.") from error


def _is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has ended well; an unfinished one must have the same settings as `config`."""
    path = folder / "run.json"
    if not path.exists():
        return (folder / "checkpoints").exists()  # else it was killed before its first write and may be taken over
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        finished, settings = record["status"] == "finished", record["config"]
        checkpoints = list_checkpoints(folder / "checkpoints")
        different = [] if finished else config.differing_keys(settings)
        if different == ["num-rounds"] and config.extends(settings, checkpoints[0][0] if checkpoints else 0):
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
    return bool(finished)


def _lock(folder: Path) -> IO[str] | None:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    if fcntl is None:
        return None
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise CheckpointError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise FolderInUse(
            f"Another process is writing the run in {folder}: wait for it or stop it (flwr stop RUN-ID for a run that "
            "flwr run started), or choose another run-name."
        ) from error
    except OSError as error:  # some network and FUSE file systems have no locks
        log.warning("%s cannot be locked (%s): do not run the same thing twice at once.", folder, error.strerror)
    return file


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for the records of runs and benchmarks."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": _now(),
        "versions": versions,
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "git_commit": _git_commit(),
    }


def _processor() -> str:
    """The processor's name; Linux keeps it in /proc."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """Commit of the checkout that is installed, with "+" if it has uncommitted changes; None outside a checkout."""
    root = checkout()
    if root is None:
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
