"""The folder of one run: run.json (what was run, on what), rounds.csv (one row per round), and its checkpoints."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config, course_of
from fl_taskarith.errors import BudgetSpent, CheckpointError
from fl_taskarith.storage.checkpoint import (
    BEST,
    Checkpoint,
    list_checkpoints,
    load_best,
    load_latest_checkpoint,
    referenced_client_states,
    save_best,
    save_checkpoint,
)
from fl_taskarith.storage.client_files import prune_client_states
from fl_taskarith.storage.correctness import HEAD_CORRECT
from fl_taskarith.storage.environment import environment, now
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.folder_choice import choose_folder, hold
from fl_taskarith.storage.own_modules import OWN_MODULES
from fl_taskarith.storage.record_files import COUNT, Within, parsed_csv, read_content
from fl_taskarith.storage.run_record import RECORD, read_record
from fl_taskarith.storage.tensor_file import RUN
from fl_taskarith.storage.trackers import Tracker, open_trackers
from fl_taskarith.storage.verified_files import ALWAYS, CHECKSUMS, check_unchanged, write_checksums

COLUMNS = (
    "round", "learning_rate", "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy",
    "client_update_norm", "client_cosine", "update_norm", "task_vector_norm", "largest_distance", "matched_distance",
    "nearest_distance", "cluster_accuracy", "clients", "failed_clients", "uplink_bytes", "downlink_bytes",
    "train_seconds", "overhead_seconds", "evaluate_seconds", "rounds_since_best",
)  # fmt: skip
WAITING = COLUMNS[-1]  # of a run that may stop early: a column that others do without
PRETRAINED = "pretrained_sha256"  # in run.json: of the weights that a run starts from
TIMING_COLUMNS = ("train_seconds", "overhead_seconds", "evaluate_seconds")
# Facts of run.json that a resumed run takes from its checkpoint.
KEPT_FACTS = ("started", "head", "mask", "continued_from", "starts", PRETRAINED, HEAD_CORRECT, OWN_MODULES)

CELLS = {  # what a column holds; what was not measured is empty, and what has no value NaN
    **dict.fromkeys(COLUMNS, (Within(float, nan=True), None)),
    **dict.fromkeys(("val_accuracy", "test_accuracy", "cluster_accuracy"), (Within(float, 0, 1, nan=True), None)),
    **dict.fromkeys(("clients", "failed_clients", "uplink_bytes", "downlink_bytes", WAITING), (COUNT, None)),
    "round": COUNT,
}

Row = dict[str, Any]

log = logging.getLogger(__name__)


class Logbook:
    """Writes one run's folder. A context manager: holds the folder's lock, and records how the run ended.

    Attributes:
        folder: absolute path of the run; checkpoints, client_states: of the folders in it; rounds_csv: of its table.
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
        self.folder, origin = choose_folder(config)
        self.checkpoints, self.client_states = self.folder / "checkpoints", self.folder / "client-states"
        self.rounds_csv = self.folder / "rounds.csv"
        self.rows: list[Row] = []
        self.restored: Checkpoint | None = None
        self._config = config
        self._trackers: list[Tracker] = []
        self._lock = hold(self.folder)
        self._here = environment()
        self._outputs: set[str] = set()
        self._columns = COLUMNS if config.early_stopping_patience else COLUMNS[:-1]
        self._record: dict[str, Any] = {"status": "running", "config": config.to_run_config()} | self._here
        try:
            self._begin(origin)
        except BaseException:  # the lock would last as long as the traceback, in a notebook up to the next error
            if origin is not None and origin != self.folder:  # half a copy, of which there is no need
                shutil.rmtree(self.folder, ignore_errors=True)
            if self._lock is not None:
                self._lock.release()
            raise

    def _begin(self, origin: Path | None) -> None:
        """Clear away what a killed process left, load the last checkpoint, and write the files again as of then."""
        if origin is not None and origin != self.folder:
            log.info("Going on from the run in %s, which stays as it is.", origin)
            self._record["continued_from"] = origin.name
            _copy_end(origin, self.folder)
        self.restored = load_latest_checkpoint(self.checkpoints)
        for leftover in [*self.folder.rglob(".*.tmp"), *self.folder.rglob(".*.tmp.lock"), self.folder / CHECKSUMS]:
            with contextlib.suppress(OSError):  # where nothing can be written, the next write says so
                leftover.unlink(missing_ok=True)
        starts: list[dict[str, Any]] = []
        if self.restored is not None:
            self.rows = self.restored.notes["rows"]
            self._record |= self.restored.notes["record"]
            log.info("Continuing %s after round %d.", self.folder, self.restored.round)
            starts = self._earlier_starts(self.restored)
        self._record["starts"] = [*starts, self._here | {"first_round": len(self.rows), "last_round": None}]
        self.note()
        self._write_all_rounds()

    def _earlier_starts(self, restored: Checkpoint) -> list[dict[str, Any]]:
        """Return when, where and under which versions the rounds so far were computed; warn of other versions."""
        if not restored.settings:
            log.warning(
                "The checkpoint in %s was written by a version that did not say whose it is: it is taken for this "
                "folder's run.", self.checkpoints,
            )  # fmt: skip
        starts: list[dict[str, Any]] = restored.notes["record"].get("starts", [])
        if not starts and (record := read_record(self.folder, checked=False)) is not None:
            starts = [{key: record.get(key) for key in self._here} | {"first_round": 0, "last_round": restored.round}]
        if not starts:
            return []
        before, now = starts[-1].get("versions") or {}, self._here["versions"]
        if other := [f"{name} {before[name]}, now {now.get(name)}" for name in before if before[name] != now.get(name)]:
            log.warning(
                "The run in %s goes on under other versions than those of its rounds so far: %s. Its numbers may "
                "differ from those of a run under one version; run.json lists both under starts.",
                self.folder, "; ".join(other),
            )  # fmt: skip
        return starts

    def note(self, **facts: Any) -> None:
        """Add facts (JSON values) to run.json."""
        self._record |= facts
        write_atomically(self.folder / RECORD, json.dumps(self._record, indent=2) + "\n")

    @property
    def owner(self) -> dict[str, str]:
        """The metadata by which masks and models of this run say that they are its own."""
        return {RUN: course_of(self._config.to_run_config())}

    def output(self, name: str) -> Path:
        """Return the path of a file that belongs to the finished run, which SHA256SUMS will list."""
        self._outputs.add(name)
        return self.folder / name

    def fact(self, name: str) -> dict[str, Any]:
        """Return a group of facts of run.json; {} if it is not there (yet)."""
        found = self._record.get(name)
        return found if isinstance(found, dict) else {}

    def note_start(self, **facts: Any) -> None:
        """Add the facts of a start; a run that is continued must start from the weights that it began with.

        So must the user's own modules be those that it began with.

        Raises:
            CheckpointError: the pretrained weights, or one's own modules or examples, are others than then.
        """
        own = self._record.get(OWN_MODULES, {})
        others = [key for key, checksum in facts.get(OWN_MODULES, {}).items() if own.get(key, checksum) != checksum]
        if self.restored is not None and others:
            raise CheckpointError(
                f"The module that {others[0]} names, or what it loads, has changed since the run in {self.folder} "
                "began: restore it, choose another run-name, or set resume = false to begin a new run beside it."
            )
        began, now = self._record.get(PRETRAINED), facts.get(PRETRAINED)
        if self.restored is not None and began is not None and now != began:
            raise CheckpointError(
                f"The pretrained weights are not those that the run in {self.folder} began with (checksum {now}, not "
                f"{began}): restore the file that `weights` names, or choose another run-name."
            )
        self.note(**facts)

    def write_round(self, row: Row) -> None:
        """Append one row; columns that it lacks stay empty. The row is in the file when this returns."""
        unknown = row.keys() - set(self._columns)
        if unknown:
            raise ValueError(f"not columns of rounds.csv: {sorted(unknown)}")
        self.rows.append(row)
        try:
            with open(self.rounds_csv, "a", encoding="utf-8", newline="") as file:
                file.write(self._csv_lines([row]))
        except OSError as error:
            raise CheckpointError(f"Cannot write {self.rounds_csv}: {error.strerror or error}.") from error
        for tracker in self._trackers:
            tracker.log(row)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint with the log up to its round as notes, and drop what no checkpoint refers to any more.

        Those are states of clients, and models that were the best on validation.
        """
        settings = self._config.to_run_config()
        if checkpoint.best is not None:  # first: whoever goes on from the checkpoint finds it
            save_best(self.checkpoints, dataclasses.replace(checkpoint.best, settings=settings))
        self._record["starts"][-1]["last_round"] = checkpoint.round
        facts = {key: value for key, value in self._record.items() if key in KEPT_FACTS}
        noted = dataclasses.replace(checkpoint, notes={"rows": self.rows, "record": facts}, settings=settings)
        save_checkpoint(self.checkpoints, noted)
        prune_client_states(self.client_states, referenced_client_states(self.checkpoints))
        ends = [number for number, _ in list_checkpoints(self.checkpoints)]
        best = [best_row(row for row in self.rows if row["round"] <= end) for end in ends]
        needed = {row["round"] for row in best if row is not None}
        for number, path in list_checkpoints(self.checkpoints, BEST):
            if number not in needed:
                path.unlink(missing_ok=True)

    def load_best(self) -> Checkpoint | None:
        """Return the model after the round that is best on validation; None where it was not saved, or is damaged."""
        best = best_row(self.rows)
        loaded = None if best is None else load_best(self.checkpoints, best["round"])
        return loaded if loaded is not None and course_of(loaded.settings) == self.owner[RUN] else None

    def _write_all_rounds(self) -> None:
        write_atomically(self.rounds_csv, ",".join(self._columns) + "\n" + self._csv_lines(self.rows))

    def _csv_lines(self, rows: list[Row]) -> str:
        """csv writes floats by repr, so that they read back to the same bits, and nothing for None."""
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()

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
                self._write_all_rounds()  # whatever else wrote to the file, on a disk that several machines mount
                self.note(status="finished", finished=now())
                write_checksums(self.folder, [*sorted(self._outputs), *ALWAYS])
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
                self._lock.release()
            for tracker in self._trackers:
                tracker.close(failed=error is not None)

    def _told_stop(self) -> str:
        """Return the last line of an interrupted run: which round is saved."""
        saved = list_checkpoints(self.checkpoints)
        if not saved:
            return f"Interrupted before anything was saved: the same command starts again ({self.folder})."
        return f"Interrupted; saved after round {saved[0][0]}: the same command goes on from there ({self.folder})."


def read_rounds(folder: Path) -> list[Row]:
    """Read rounds.csv of a run folder as one dictionary per row; empty cells are None.

    Raises:
        CheckpointError: it is missing, its header is not ours, a row is cut short or not numeric, or it has changed
            since the run ended. Columns that a version did not have yet are None.
    """
    path = folder / "rounds.csv"
    remedy = "Expected the table of a run: restore it, or resume the run to rebuild it."
    content = read_content(path, remedy) or b""
    check_unchanged(path, content)
    if unknown := set(content.partition(b"\n")[0].decode(errors="replace").split(",")) - set(COLUMNS):
        raise CheckpointError(f"{path} has columns that no run has: {shown(sorted(unknown))}. {remedy}")
    rows = parsed_csv(path, content, CELLS, remedy)
    if any(row["round"] != rows[0]["round"] + place for place, row in enumerate(rows)):
        raise CheckpointError(f"{path} does not have one row for every round. {remedy}")
    return rows


def model_file(best: bool = False, cluster: int | None = None) -> str:
    """Return the name of the file of an exported model: the last one's or the best on validation's, of one cluster."""
    return f"model{'-best' if best else ''}{'' if cluster is None else f'-cluster-{cluster}'}.safetensors"


def best_row(rows: Iterable[Row]) -> Row | None:
    """Return the first of the rows that are best on validation: by accuracy, then by loss. None if none has any."""

    def score(row: Row) -> tuple[float, float]:
        loss = row.get("val_loss")
        return row["val_accuracy"], -math.inf if loss is None else -loss

    return max((row for row in rows if row.get("val_accuracy") is not None), key=score, default=None)


def _copy_end(origin: Path, folder: Path) -> None:
    """Copy what a run needs that goes on from the last checkpoint of the one in `origin`.

    Checkpoints last, the newest at the end: a folder that has one, of a killed process, has all that it refers to.
    """
    try:
        if (origin / "client-states").exists():
            shutil.copytree(origin / "client-states", folder / "client-states", dirs_exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        best = list_checkpoints(origin / "checkpoints", BEST)
        for _, path in [*best, *reversed(list_checkpoints(origin / "checkpoints"))]:
            write_atomically(folder / "checkpoints" / path.name, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Cannot copy the end of the run in {origin} to {folder}: {error}.") from error
