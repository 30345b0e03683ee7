"""The table of reliability says what was tried, adds parts up, and fails where anything was lost."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import reliability
from trials import Tally


def counted(fault: str, good: int, lost: int = 0) -> Tally:
    tally = Tally(fault)
    for _ in range(good):
        tally.note("as before")
    for number in range(lost):
        tally.lose(f"trial {number}: another number")
    return tally


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, part: str, *tallies: Tally) -> int:
    def rows(sizes: object, seed: int, *more: object) -> Iterator[tuple[str, Tally]]:
        yield from ((part, tally) for tally in tallies)

    monkeypatch.setitem(reliability.PARTS, part, rows)
    monkeypatch.setattr("sys.argv", ["reliability.py", "--part", part, "--output", str(folder)])
    return reliability.main()


def test_parts_add_up_to_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, "damage", counted("mask damaged", 3), counted("table damaged", 4)) == 0
    assert run(monkeypatch, tmp_path, "kills", counted("SIGKILL: fedavg", 5)) == 0
    assert run(monkeypatch, tmp_path, "damage", counted("mask damaged", 30)) == 0
    table = (tmp_path / "README.md").read_text()
    assert "| mask damaged | 30 | 30 as before | 0 |" in table
    assert "| SIGKILL: fedavg | 5 | 5 as before | 0 |" in table
    assert "| **together** | **34** | | **0** |" in table
    assert set(json.loads((tmp_path / "trials.json").read_text())) == {
        "mask damaged", "table damaged", "SIGKILL: fedavg",
    }  # fmt: skip


def test_anything_lost_is_a_failure_until_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "malice", counted("pickles", 2, lost=1)) == 1
    assert "another number" in capsys.readouterr().out
    assert "| pickles | 3 | 2 as before; 1 lost | 1 |" in (tmp_path / "README.md").read_text()
    assert run(monkeypatch, tmp_path, "clients", counted("raises", 2)) == 1
    assert run(monkeypatch, tmp_path, "malice", counted("pickles", 3)) == 0


def test_every_part_has_a_title() -> None:
    assert reliability.TITLES.keys() == reliability.PARTS.keys()
