"""What a command prints: run.log and study.log beside its results, and output whose faults never end the work."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

LOGGER = logging.getLogger("fl_taskarith")
RUN_LOG = "run.log"  # in the folder of a run, and of whatever else prints as it is made
UNPRINTED = {"unprinted": True}  # `extra` of a record for the file alone: a progress bar shows it on the terminal


class RunLog(logging.Handler):
    """A context manager that writes all that is logged within it, warnings of Python, and how it ends, to a file.

    Lines that come before `open` names the file are written then. A file that cannot be written costs a warning and
    never the run.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self._path = path
        self._kept: list[str] = []

    def open(self, path: Path) -> None:
        """Append to `path` from now on, beginning with the lines before."""
        self._path = path
        self.write("")

    def write(self, line: str) -> None:
        """Write a line (an empty one: the lines that wait); from any thread."""
        self.acquire()
        try:
            self._write(line)
        finally:
            self.release()

    def _write(self, line: str) -> None:
        self._kept += [line] if line else []
        if self._path is None or not self._kept:
            return
        text = "\n".join(self._kept) + "\n"
        self._kept.clear()
        try:
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            path, self._path = self._path, None
            warnings.warn(f"Cannot write {path}: {error.strerror or error}; the run goes on.", stacklevel=2)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of our logger."""
        self.write(self.format(record))

    def __enter__(self) -> Self:
        LOGGER.addHandler(self)
        self._show = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
            self._show(message, category, filename, lineno, *rest)
            self.write(f"{category.__name__}: {message}")

        warnings.showwarning = show  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.write(f"{type(error).__name__}: {error}")
        warnings.showwarning = self._show
        LOGGER.removeHandler(self)


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Append whatever is printed within it, to standard output or error, to the file `path` as well.

    Progress bars, which overwrite their line, are left out. A file that cannot be written is no reason to stop.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError:
        yield
        return
    lasting = LastingStream(file)
    with file, redirect_stdout(_Tee(sys.stdout, lasting)), redirect_stderr(_Tee(sys.stderr, lasting)):
        yield


class _Tee:
    """The first of two text streams, whose lines go to the second as well."""

    def __init__(self, first: TextIO, second: "LastingStream") -> None:
        self._first, self._second = first, second

    def write(self, text: str) -> int:
        """Write text to both, unless it overwrites a line."""
        if "\r" not in text:
            self._second.write(text)
        return self._first.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


class LastingStream:
    """A text stream that escapes what it cannot encode, and from its first fault on loses what is written to it.

    Attributes:
        fault: why nothing is written any more; None while all is well.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # None: closed from outside
        self.fault: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write `text`, as far as that is possible."""
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, as far as that is possible."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.fault is None:
            try:
                action()
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        self.fault = error
        with contextlib.suppress(OSError, ValueError):  # what waits in its buffer would fail again at the very end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._stream is sys.__stdout__ and not isinstance(error, BrokenPipeError) and sys.stderr is not None:
            reason = getattr(error, "strerror", None) or error
            print(f"Standard output is lost from here on ({reason}); the work goes on.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Make standard output and error lasting within it; yield the former."""
    before = sys.stdout, sys.stderr
    output, error = (each if isinstance(each, LastingStream) else LastingStream(each) for each in before)
    sys.stdout, sys.stderr = output, error
    try:
        yield output
    finally:
        output.flush()
        error.flush()
        sys.stdout, sys.stderr = before
