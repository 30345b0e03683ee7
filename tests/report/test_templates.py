"""A template of the user's own is text: it reaches its variables, and no program."""

from pathlib import Path

import pytest

from fl_taskarith.errors import ConfigError
from fl_taskarith.report import document
from fl_taskarith.report.document import write_report
from fl_taskarith.report.sentences import render


@pytest.mark.parametrize(
    "code",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "lipsum.__globals__['os'].system('touch made')",
        "cycler.__init__.__globals__.os.popen('touch made').read()",
        "title | attr('__class__')",
        "'{0.__class__}'.format(title)",
        "seeds.append(2)",
        "1 / 0",
        "range(10 ** 9) | list",
        "title + 1",
        "(" * 300,
    ],
)
def test_a_template_that_reaches_for_python_or_fails_is_refused(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.tex").write_text(rf"\VAR{{title}} \VAR{{{code}}}")
    seeds = [0, 1]
    with pytest.raises(ConfigError, match=r"The template .*mine\.tex"):
        render(tmp_path / "mine.tex", {"title": "A", "seeds": seeds})
    assert seeds == [0, 1] and not (tmp_path / "made").exists()


def test_template_and_authors_are_read_before_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unneeded(*_: object) -> None:
        pytest.fail("the results were read")

    monkeypatch.setattr(document, "read_studies", unneeded)
    (tmp_path / "mine.tex").write_text("\\BLOCK{if}")
    with pytest.raises(ConfigError, match="line 1"):
        write_report(tmp_path, tmp_path / "out", template=tmp_path / "mine.tex")
    (tmp_path / "authors.toml").write_bytes("title = 'A'".encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        write_report(tmp_path, tmp_path / "out", authors=tmp_path / "authors.toml")
