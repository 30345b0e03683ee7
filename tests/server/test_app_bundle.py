"""What `flwr run` sends along: all code and settings files, and so little else that Flower takes it."""

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import FAB_MAX_SIZE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_fab_from_disk(ROOT)


def test_it_is_far_below_what_flower_takes(bundle: bytes) -> None:
    assert len(bundle) < FAB_MAX_SIZE / 2


def test_it_holds_every_module_and_settings_file_and_no_results(bundle: bytes) -> None:
    held = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("py", "toml", "json")
        for path in (ROOT / "fl_taskarith").rglob(f"*.{suffix}")
        if "__pycache__" not in path.parts
    }
    settings = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.toml")}
    assert {"server_app.py", "client_app.py"} | package | settings <= held
    assert not any(name.startswith("results/") for name in held)


def test_a_users_module_travels_too(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("conf/a.toml", "fl_taskarith/a.toml", "fl_taskarith/a.json", "my_rule.py", "mine/rule.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    held = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))).namelist()
    assert {"my_rule.py", "mine/rule.py"} <= set(held)
