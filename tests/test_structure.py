"""The house is as `fl_taskarith/README.md` draws it."""

from pathlib import Path

import pytest
from structure import MOST_ROOMS, Structure, measure


@pytest.fixture(scope="module")
def found() -> Structure:
    return measure()


@pytest.mark.parametrize(
    "fault",
    [
        "root_modules",
        "unknown_rooms",
        "room_circles",
        "arrows_back_up",
        "stems_twice",
        "without_docstring",
        "file_circles",
        "long_functions",
        "without_shapes",
    ],
)
def test_the_package_has_none(fault: str, found: Structure) -> None:
    assert getattr(found, fault) == []


def test_there_are_few_rooms(found: Structure) -> None:
    assert len(found.lines) <= MOST_ROOMS


def test_faults_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "fl_taskarith"
    for name, text in {
        "astray.py": "",
        "config/one.py": "from fl_taskarith.config import two\nfrom fl_taskarith.study import three\n",
        "config/two.py": "def f():\n    from fl_taskarith.config.one import g\n",
        "study/three.py": 'def f(x: "Tensor") -> None:\n    """Take x."""\n' + "    x\n" * 60,
        "study/two.py": 'def f(x: "Tensor") -> None:\n    """Take x, [n, d]."""\n',
    }.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    seen = measure(package)
    assert seen.root_modules == ["astray"]
    assert seen.file_circles == [["config.one", "config.two"]]
    assert seen.arrows_back_up == ["config.one -> study.three"]
    assert seen.stems_twice == ["two"]
    assert seen.long_functions == ["study.three:f (62)"]
    assert seen.without_docstring == ["config.two:f"]
    assert seen.without_shapes == ["study.three:f"]
    assert seen.tensor_functions == 2
