"""`fl-taskarith init`: a project whose commands can be typed as they stand, from a checkout and from a wheel."""

import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from fl_taskarith.cli.arguments import parse_words, split_words
from fl_taskarith.cli.command import _parser, main
from fl_taskarith.config.settings import load, parse_overrides
from fl_taskarith.report.authors import read_authors
from fl_taskarith.storage import paths
from fl_taskarith.study import project
from fl_taskarith.study.project import PARTS, init_project
from fl_taskarith.study.study_file import load_study

ROOT = Path(__file__).parents[2]


@pytest.fixture
def laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert main(["init", str(tmp_path / "mine")]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def commands(folder: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line.replace("$PWD", str(folder))) for block in blocks for line in block.splitlines()]


def test_every_command_of_its_readme_parses_and_finds_its_files(laid: Path) -> None:
    typed = commands(laid)
    assert [words[0] for words in typed] == ["fl-taskarith"] * len(typed)
    named = set()
    for _, *words in typed:
        parsed = parse_words(_parser(), words)
        if words[0] == "study":
            (file,) = parsed.words
            assert Path(parsed.results_dir) == laid / "results"
            assert load_study(Path(file)).arms if "digits/fedavg-iid" in file else Path(file).is_file()
            named.add(Path(file))
        elif words[0] in ("simulate", "search"):
            files, assignments = split_words(parsed.words)
            load(files[0] if files else None, parse_overrides(assignments))
    assert named == {Path(f"conf/study/{name}.toml") for parts in PARTS.values() for name in parts.values()}
    assert {words[1] for words in typed} == {"study", "search", "simulate", "results", "report", "shards", "mask"}


def test_the_shortest_part_is_listed_in_it(laid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = next(words[1:] for words in commands(laid) if words[2].endswith("fedavg-iid.toml"))
    assert main([*words, "--list"]) == 0
    assert f"{laid / 'results' / 'digits' / 'fedavg-iid'}" in capsys.readouterr().out


def test_its_files_are_those_of_conf_and_the_authors_can_be_read(laid: Path) -> None:
    for path in (laid / "conf").rglob("*.toml"):
        assert path.read_bytes() == (ROOT / path.relative_to(laid)).read_bytes()
    title, authors = read_authors(laid / "authors.toml")
    assert title and [author.name for author in authors] == ["Your name"]
    for name in PARTS["digits"].values():
        folder = tomllib.loads((laid / "conf" / "study" / f"{name}.toml").read_text())["name"]
        assert f"`results/{folder}/README.md`" in (laid / "README.md").read_text()


def test_a_folder_with_anything_else_is_refused_and_stays_as_it_is(
    laid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(laid)]) == 0, "what is there is what would be written"
    (laid / "authors.toml").write_text("mine")
    before = {path: path.read_bytes() for path in laid.rglob("*") if path.is_file()}
    assert main(["init", str(laid)]) == 1
    assert "authors.toml is no file of a new project. Name a new one" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in laid.rglob("*") if path.is_file()} == before
    assert main(["init", str(laid / "authors.toml")]) == 1
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["init", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize("kill", [False, True])
def test_an_interrupted_call_is_completed_by_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    written, whole = project.write_atomically, init_project(tmp_path / "whole")

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "authors.toml":
            if kill:  # as SIGKILL leaves it: a temporary file whose process is gone
                left = path.parent / f".{path.name}.{2**22 + 1}-00000000.fl-taskarith.tmp"
                left.write_bytes(content[:5])
                left.with_name(f"{left.name}.lock").touch()
            raise KeyboardInterrupt
        written(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(project, "write_atomically", interrupted)
        assert main(["init", str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut" / "conf").exists()
    assert main(["init", str(tmp_path / "cut")]) == 0
    there = {path.relative_to(tmp_path / "cut") for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    assert there == {path.relative_to(tmp_path / "whole") for path in whole}


def test_conf_comes_with_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"conf": "fl_taskarith_conf/conf"}
    (tmp_path / "fl_taskarith_conf").mkdir()
    (tmp_path / "fl_taskarith_conf" / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setattr(paths, "checkout", lambda: None)
    monkeypatch.setattr(metadata.PathDistribution, "locate_file", lambda _, name: tmp_path / name)
    assert paths.conf_file("digits/six-models") == tmp_path / "fl_taskarith_conf/conf/study/digits/six-models.toml"
    assert paths.conf_file("conf/fedavg-iid.toml").is_file()
    assert len(init_project(tmp_path / "mine")) == 20
