"""One process makes a thing and the others wait; nobody waits for the dead."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from child_processes import at_work, kill

from fl_taskarith.storage import locks
from fl_taskarith.storage.locks import only_maker


def make_slowly(folder: Path) -> None:
    with only_maker(folder / "thing", "makes the thing"):
        (folder / "ready").touch()
        time.sleep(60)


def make_until_somebody_waits(folder: Path) -> None:
    with only_maker(folder / "thing", "makes the thing"):
        (folder / "ready").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        (folder / "go").unlink()
        (folder / "thing").touch()


@contextmanager
def when_it_is_said_to_wait(act: Callable[[], object]) -> Iterator[None]:
    """Do something once this process logs that it waits."""
    handler = logging.Handler()
    handler.emit = lambda record: act()  # type: ignore[assignment]
    logger = logging.getLogger("fl_taskarith")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_the_next_waits_and_finds_what_the_first_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("INFO", logger="fl_taskarith"),
        at_work(make_until_somebody_waits, tmp_path) as maker,
        when_it_is_said_to_wait((tmp_path / "go").touch),
        only_maker(tmp_path / "thing", "makes the thing"),
    ):
        assert (tmp_path / "thing").exists()
    expected = f"Waiting for another process (PID {maker.pid}) that makes the thing: {tmp_path / 'thing'}"
    assert [record.getMessage() for record in caplog.records] == [expected]
    assert {path.name for path in tmp_path.iterdir()} == {"ready", "thing"}, "no lock stays behind"


def test_a_killed_maker_blocks_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("INFO", logger="fl_taskarith"),
        at_work(make_slowly, tmp_path) as maker,
        when_it_is_said_to_wait(lambda: kill(maker)),
        only_maker(tmp_path / "thing", "makes the thing"),
    ):
        assert not (tmp_path / "thing").exists()
    assert f"PID {maker.pid}" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"ready"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_maker_that_fails_lets_the_next_one_try(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), only_maker(tmp_path / "thing", "makes the thing"):
        raise error
    assert not list(tmp_path.iterdir())
    with only_maker(tmp_path / "thing", "makes the thing"):
        pass


def unlockable(folder: Path) -> bool:
    raise PermissionError(13, "Permission denied", str(folder))


@pytest.mark.parametrize("can_lock", [lambda folder: False, unlockable], ids=["no locks", "may not be written"])
def test_where_nothing_can_be_locked_nobody_waits(
    can_lock: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_work(make_slowly, tmp_path):
        monkeypatch.setattr(locks, "can_lock", can_lock)
        with only_maker(tmp_path / "thing", "makes the thing"):
            pass
        assert (tmp_path / ".thing.lock").exists(), "the lock of the other is its own to remove"


def test_a_maker_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert locks._maker(path) == "PID unknown"
    path.write_text("PID 12 on elsewhere")
    assert locks._maker(path) == "PID 12 on elsewhere"
    path.write_text(f"PID 12 on {os.uname().nodename}")
    assert locks._maker(path) == "PID 12"
