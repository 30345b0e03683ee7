import errno
import io
import os
import sys

import pytest

from fl_taskarith.storage.run_log import LastingStream, lasting_output


class Full(io.StringIO):
    """A stream of a disk that is full, or of a pipe that nobody reads."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error, self.tried = error, 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "no space")])
def test_a_stream_at_fault_loses_what_follows_and_never_raises(error: OSError) -> None:
    stream = Full(error)
    lasting = LastingStream(stream)
    for _ in range(3):
        assert lasting.write("a line\n") == 7
        lasting.flush()
    assert lasting.fault is error and stream.tried == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str) -> None:
    binary = io.BytesIO()
    lasting = LastingStream(io.TextIOWrapper(binary, encoding=encoding))
    lasting.write("Δ ‖τ‖ \udcff\n")
    lasting.flush()
    written = binary.getvalue().decode(encoding)
    assert written.endswith("\\udcff\n") and ("\\u0394" in written or encoding == "utf-8")


def test_within_it_a_closed_or_missing_output_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output() as output:
        print("lost")
        print("lost", file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()
        with lasting_output() as inner:
            assert inner is output
    assert isinstance(output.fault, ValueError)
    assert sys.stdout is closed and sys.stderr is None


def test_a_closed_pipe_does_not_fail_again_at_the_end() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        lasting = LastingStream(stream)
        lasting.write("nobody reads this")
        lasting.flush()
        assert isinstance(lasting.fault, BrokenPipeError)  # and leaving the block flushes what waited
