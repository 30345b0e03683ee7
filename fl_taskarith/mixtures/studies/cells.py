"""Many small computations, each a pure function of its cell: shared out to processes, written to CSVs, resumable."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pandas
from tqdm.auto import tqdm

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.processes import worker_pool

Rows = Mapping[str, Sequence[dict[str, Any]]]
"""What one cell yields: rows by table, without the cell's own columns. The table `MAIN` must not be empty."""

SAVE_SECONDS = 10.0  # between writes of the tables: what a power cut can cost
QUIET_SECONDS = 15.0  # between lines of progress where standard error is no terminal
MAIN = "runs"
DIGITS = "%.6g"  # of what is written; a cell's own numbers must not need more


class CellTables:
    """The tables of a study: one row or more per finished cell, its fields first. `MAIN` alone says which are done.

    A cell is a frozen dataclass of numbers and words.
    """

    def __init__(self, folder: Path, cell_type: type, columns: Mapping[str, Sequence[str]]) -> None:
        """Read what is there; `columns` are those of each table beside the cell's fields.

        Raises:
            CheckpointError: a table cannot be read or has other columns.
        """
        self.folder = folder
        self.fields = [field.name for field in dataclasses.fields(cell_type)]
        self._defaults = {
            field.name: field.default
            for field in dataclasses.fields(cell_type)
            if field.default is not dataclasses.MISSING
        }
        self._words = {"method", *(field.name for field in dataclasses.fields(cell_type) if field.type in (str, "str"))}
        self.columns = {table: [*self.fields, *own] for table, own in columns.items()}
        self.frames = {table: self._read(table) for table in self.columns}
        self._new: dict[str, list[dict[str, Any]]] = {table: [] for table in self.columns}
        self.done = set(self.frames[MAIN][self.fields].itertuples(index=False, name=None))
        for table, frame in self.frames.items():  # without the rows of a cell that was cut off before its main row
            keys = pandas.Series(frame[self.fields].itertuples(index=False, name=None), frame.index, dtype=object)
            self.frames[table] = frame[keys.isin(self.done)]

    def add(self, cell: Any, rows: Rows) -> None:
        """Take in what a cell yielded; the next `save` writes it."""
        for table, of_table in rows.items():
            self._new[table] += [dataclasses.asdict(cell) | row for row in of_table]
        self.done.add(dataclasses.astuple(cell))

    def save(self) -> None:
        """Write what is new, `MAIN` last: a table is the old or the new one, whatever happens meanwhile."""
        for table in sorted(self.columns, key=lambda table: table == MAIN):
            if self._new[table]:
                new = pandas.DataFrame(self._new[table], columns=self.columns[table])
                frames = [frame for frame in (self.frames[table], new) if len(frame)]
                self.frames[table] = pandas.concat(frames, ignore_index=True)
                self._new[table] = []
                content = self.frames[table].to_csv(index=False, float_format=DIGITS)
                write_atomically(self.folder / f"{table}.csv", content)

    def _read(self, table: str) -> pandas.DataFrame:
        path, columns = self.folder / f"{table}.csv", self.columns[table]
        if not path.exists():
            return pandas.DataFrame(columns=columns)
        try:
            frame = pandas.read_csv(path)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}. Restore it, or delete it to start again.") from error
        for name in set(self._defaults) - set(frame.columns):  # of a version whose cells had fewer fields
            frame[name] = self._defaults[name]
        if set(frame.columns) != set(columns):
            raise CheckpointError(f"{path} does not have the columns {', '.join(columns)}: delete it to start again.")
        if damaged := [name for name in frame if name not in self._words and frame[name].dtype == object]:
            raise CheckpointError(f"{path} holds more than numbers in {damaged[0]}: restore it, or delete it.")
        frame = frame[columns]
        for name in frame[self.fields].select_dtypes("float"):  # the very numbers of the cells, not an ulp beside them
            frame[name] = [float(DIGITS % value) for value in frame[name]]
        return frame


def run_cells(
    tables: CellTables, cells: Sequence[Any], work: Callable[[Any], Rows], cost: Callable[[Any], float], *,
    jobs: int = 1, budget: float | None = None,
) -> bool:  # fmt: skip
    """Do the cells that are not done, in order; return whether all of them are done now.

    Args:
        work: a module's function, called in `jobs` processes of one thread each.
        cost: of a cell, in any unit: the remaining time is estimated from it.
        budget: seconds after which no cell is begun any more.
    """
    left = [cell for cell in dict.fromkeys(cells) if dataclasses.astuple(cell) not in tables.done]
    if not left:
        return True
    make_folder(tables.folder)
    saved = time.monotonic()
    deadline = math.inf if budget is None else saved + budget
    units = {cell: max(1, round(1000 * cost(cell))) for cell in left}  # whole numbers add up to the total exactly
    shape = "{percentage:3.0f} % {bar} {postfix} {elapsed} so far, {remaining} left"
    interval = 0.5 if sys.stderr.isatty() else QUIET_SECONDS
    finished = 0
    with tqdm(total=sum(units.values()), bar_format=shape, mininterval=interval) as bar:
        try:
            for cell, rows in _computed(takewhile(lambda _: time.monotonic() < deadline, left), work, jobs):
                tables.add(cell, rows)
                finished += 1
                bar.set_postfix_str(f"{finished} of {len(left)}", refresh=False)
                bar.update(units[cell])
                if time.monotonic() - saved > SAVE_SECONDS:
                    tables.save()
                    saved = time.monotonic()
        finally:
            tables.save()
    return finished == len(left)


def _computed(cells: Iterator[Any], work: Callable[[Any], Rows], jobs: int) -> Iterator[tuple[Any, Rows]]:
    """Yield each cell with its rows as it finishes; no cell waits in a queue, so none begins once `cells` ends."""
    if jobs == 1:
        yield from ((cell, work(cell)) for cell in cells)
        return
    running: dict[Future[Rows], Any] = {}
    with worker_pool(jobs, threads=1) as executor:
        while True:
            running |= {executor.submit(work, cell): cell for cell in islice(cells, jobs - len(running))}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
