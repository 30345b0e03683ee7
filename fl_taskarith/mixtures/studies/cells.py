"""Many small computations, each a pure function of its cell: shared out to processes, written to CSVs, resumable."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from tqdm.auto import tqdm

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.processes import worker_pool

Row = dict[str, Any]
Found = Mapping[str, Sequence[Row]]
"""What one cell yields: rows by table, without the cell's own columns. The table "runs" must not be empty."""

SAVE_SECONDS = 10.0  # between writes of the tables: what a power cut can cost
QUIET_SECONDS = 15.0  # between lines of progress where standard error is no terminal
MAIN = "runs"
DIGITS = "%.6g"  # of what is written; a cell's own numbers must not need more


class CellTables:
    """The tables of a study: one row or more per finished cell, its fields first.

    A cell is a frozen dataclass of numbers and words. Whether it is done is seen from the table "runs" alone.
    """

    def __init__(self, folder: Path, cell_type: type, columns: Mapping[str, Sequence[str]]) -> None:
        """Read what is there; `columns` are those of each table beside the cell's fields.

        Raises:
            CheckpointError: a table cannot be read or has other columns.
        """
        self.folder = folder
        self.fields = [field.name for field in dataclasses.fields(cell_type)]
        self.columns = {table: [*self.fields, *own] for table, own in columns.items()}
        self.frames = {table: self._read(table) for table in self.columns}
        self._new: dict[str, list[Row]] = {table: [] for table in self.columns}
        self.done = set(self.frames[MAIN][self.fields].itertuples(index=False, name=None))
        for table, frame in self.frames.items():  # rows of a cell that was cut off before its main row
            kept = [key in self.done for key in frame[self.fields].itertuples(index=False, name=None)]
            self.frames[table] = frame.loc[np.array(kept, dtype=bool)]  # an empty list would choose no columns

    def add(self, cell: Any, found: Found) -> None:
        """Take in what a cell yielded; written at the next `save`."""
        for table, rows in found.items():
            self._new[table] += [dataclasses.asdict(cell) | row for row in rows]
        self.done.add(dataclasses.astuple(cell))

    def save(self) -> None:
        """Write what is new, "runs" last: a table is the old or the new one, whatever happens meanwhile."""
        for table in sorted(self.columns, key=lambda table: table == MAIN):
            if self._new[table]:
                new = pandas.DataFrame(self._new[table], columns=self.columns[table])
                frames = [frame for frame in (self.frames[table], new) if len(frame)]
                self.frames[table] = pandas.concat(frames, ignore_index=True)
                self._new[table] = []
                write_atomically(self._path(table), self.frames[table].to_csv(index=False, float_format=DIGITS))

    def _path(self, table: str) -> Path:
        return self.folder / f"{table}.csv"

    def _read(self, table: str) -> pandas.DataFrame:
        path, columns = self._path(table), self.columns[table]
        if not path.exists():
            return pandas.DataFrame(columns=columns)
        try:
            frame = pandas.read_csv(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}. Restore it, or delete it to begin anew.") from error
        if list(frame.columns) != columns:
            raise CheckpointError(f"{path} has not the columns {', '.join(columns)}: delete it to begin anew.")
        for field in frame[self.fields].select_dtypes("float"):  # the very numbers of the cells, not an ulp beside them
            frame[field] = [float(DIGITS % value) for value in frame[field]]
        return frame


def run_cells(
    tables: CellTables,
    cells: Sequence[Any],
    work: Callable[[Any], Found],
    cost: Callable[[Any], float],
    *,
    jobs: int = 1,
    budget: float | None = None,
) -> bool:
    """Do the cells that are not done, in order; whether all of them are done now.

    Args:
        work: a module's function, called in `jobs` processes of one thread each.
        cost: of a cell, in any unit: the time left is reckoned from it.
        budget: seconds after which no cell is begun any more.
    """
    left = [cell for cell in dict.fromkeys(cells) if dataclasses.astuple(cell) not in tables.done]
    if not left:
        return True
    tables.folder.mkdir(parents=True, exist_ok=True)
    deadline = None if budget is None else time.monotonic() + budget
    saved = time.monotonic()
    quiet = not sys.stderr.isatty()
    units = {cell: max(1, round(1000 * cost(cell))) for cell in left}  # whole numbers add up to the total exactly
    shape = "{percentage:3.0f} % {bar} {postfix} {elapsed} so far, {remaining} left"
    with tqdm(total=sum(units.values()), bar_format=shape, mininterval=QUIET_SECONDS if quiet else 0.5) as bar:
        finished = 0
        try:
            for cell, found in _yielded(left, work, jobs, deadline):
                tables.add(cell, found)
                finished += 1
                bar.set_postfix_str(f"{finished} of {len(left)}", refresh=False)
                bar.update(units[cell])
                if time.monotonic() - saved > SAVE_SECONDS:
                    tables.save()
                    saved = time.monotonic()
        finally:
            tables.save()
    return finished == len(left)


def _yielded(
    cells: Sequence[Any], work: Callable[[Any], Found], jobs: int, deadline: float | None
) -> Iterator[tuple[Any, Found]]:
    """Each cell with what it yielded, as they finish."""
    if jobs == 1:
        for cell in cells:
            if deadline is not None and time.monotonic() > deadline:
                return
            yield cell, work(cell)
        return
    executor = worker_pool(jobs, threads=1)
    waiting = iter(cells)
    running: dict[Future[Found], Any] = {}
    try:
        while True:
            while len(running) < 2 * jobs and (deadline is None or time.monotonic() < deadline):
                if (cell := next(waiting, None)) is None:
                    break
                running[executor.submit(work, cell)] = cell
            if deadline is not None and time.monotonic() >= deadline:
                running = {future: cell for future, cell in running.items() if not future.cancel()}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        executor.shutdown(cancel_futures=True)
