"""Standard output and error that never end the work which prints to them: a closed pipe, a full disk, odd encodings."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream that escapes what it cannot encode, and from its first fault on loses what is written to it.

    Attributes:
        fault: why nothing is written any more; None while all is well.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = (
            open(os.devnull, "w", encoding="utf-8") if stream is None else stream
        )  # None: closed from outside
        self.fault: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write `text`, as far as that is possible."""
        if self.fault is None:
            try:
                self._stream.write(self._encodable(text))
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, as far as that is possible."""
        if self.fault is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

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
    output = before[0] if isinstance(before[0], LastingStream) else LastingStream(before[0])
    error = before[1] if isinstance(before[1], LastingStream) else LastingStream(before[1])
    sys.stdout, sys.stderr = output, error
    try:
        yield output
    finally:
        output.flush()
        error.flush()
        sys.stdout, sys.stderr = before
