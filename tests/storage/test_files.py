"""Files are replaced whole, and a process that is killed as it writes leaves nothing for good."""

import os
import time
from pathlib import Path

import pytest
from child_processes import at_work, kill

from fl_taskarith.storage import files, locks
from fl_taskarith.storage.files import remove_leftovers, replacement, scratch_folder, write_atomically

FOREIGN = (
    ".run.json.123.tmp",
    "editor.tmp",
    ".editor.tmp",
    ".notes.txt.12-0123abcd.tmp",
    "x.12-0123abcd.fl-taskarith.tmp",
    ".x.12-0123ABCD.fl-taskarith.tmp",
    ".x.12-0123abcd.fl-taskarith.tmp.bak",
)


def write_slowly(folder: Path) -> None:
    with replacement(folder / "table.csv") as file:
        file.write(b"half")
        file.flush()
        (folder / "ready").touch()
        time.sleep(60)


def use_scratch(folder: Path) -> None:
    with scratch_folder() as scratch:
        (scratch / "model").write_bytes(b"much")
        (folder / "ready").touch()
        time.sleep(60)


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def test_what_a_killed_process_wrote_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    write_atomically(tmp_path / "table.csv", "old")
    with at_work(write_slowly, tmp_path) as writer:
        (half_written,) = temporary_files(tmp_path)
        assert str(writer.pid) in half_written.name
        remove_leftovers(tmp_path)
        assert temporary_files(tmp_path) == [half_written], "its process lives"
        kill(writer)
    assert temporary_files(tmp_path) == [half_written]
    files._remove_leftovers_once.cache_clear()
    write_atomically(tmp_path / "another.csv", "new")
    assert not temporary_files(tmp_path), "whoever writes to the folder next removes it"
    assert (tmp_path / "table.csv").read_text() == "old"


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path)
    assert (tmp_path / name).exists()


def test_the_names_that_stay_differ_from_ours_by_little(tmp_path: Path) -> None:
    for name in (".x.12-0123abcd.fl-taskarith.tmp", ".x.12-0123abcd.fl-taskarith.tmp.lock"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_alone_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    dead, alive = (tmp_path / f".{name}.12-0123abcd.fl-taskarith.tmp.lock" for name in ("dead", "alive"))
    dead.touch()
    with locks.owned(alive.with_suffix("")):
        remove_leftovers(tmp_path)
        assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_block_that_is_cut_short_leaves_the_old_file_alone(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_atomically(path, "old")
    with pytest.raises(error), replacement(path) as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_without_locks_only_what_nobody_wrote_to_for_a_day_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "can_lock", lambda folder: False)
    fresh, old = (tmp_path / f".{name}.12-0123abcd.fl-taskarith.tmp" for name in ("fresh", "old"))
    fresh.touch()
    old.touch()
    os.utime(old, (time.time() - 86_500,) * 2)
    write_atomically(tmp_path / "table.csv", "new")
    remove_leftovers(tmp_path)
    assert fresh.exists() and not old.exists()
    assert (tmp_path / "table.csv").read_text() == "new"


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "x"])
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, "content")
    assert (tmp_path / name).read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_scratch_folder_goes_at_its_end_and_after_its_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    foreign = temporary / "fl-taskarith-of-a-student"
    foreign.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with at_work(use_scratch, tmp_path) as user:
        with scratch_folder():
            assert len(list(temporary.iterdir())) == 5, "two in use, with their locks, and one that is not ours"
        assert len(list(temporary.iterdir())) == 3
        kill(user)
    with scratch_folder() as mine:
        assert set(temporary.iterdir()) == {mine, mine.with_name(f"{mine.name}.lock"), foreign}
    assert list(temporary.iterdir()) == [foreign]
