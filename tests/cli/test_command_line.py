"""What people type: misspelt commands, dashes, files in any place, and output that cannot be written."""

import io
import sys
from pathlib import Path

import pytest

from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config

SETTINGS = "num-rounds = 3\nlearning-rate = 0.1\n"


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that `simulate` was called with; nothing is run."""
    configs: list[Config] = []
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", configs.append)
    return configs


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said where the words are refused, by us or as wrong usage."""
    try:
        assert main(words) == 1
    except SystemExit as ended:
        assert ended.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("simulat", "did you mean simulate?"),
        ("bench rond", "did you mean round?"),
        ("settings.toml", "name a command before it, for example simulate settings.toml"),
        ("simulate --learning-rate 0.1", "without dashes, as key=value: learning-rate=0.1\n"),
        ("simulate --nesterov seed=1 --num_rounds=3", "as key=value: nesterov=VALUE; num-rounds=3\n"),
        ("simulate --lr=0.1", 'without dashes, as key=value: did you mean "learning-rate"?'),
        ("simulate num-rounds = 5", "num-rounds is a setting: expected num-rounds=VALUE, in one word"),
        ("simulate a.toml b.toml", 'Several settings files, "a.toml" and "b.toml": expected one'),
        ("one-shot seed=1", "Name a benchmark before the settings"),
        ("search --from nan", '"nan" is not a number above 0'),
        ("search --keep 1e400", "is not a whole number from 1"),
        ("study --jobs 99999999999", "is not a whole number from 1 up to 1024"),
        ("study --budget " + "9" * 400 + "h", "is not a time"),
        ("plot " + "x" * 300, "File name too long"),
        ("merge --nothing", "unrecognized arguments"),
    ],
)
def test_wrong_usage_says_what_to_type(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(line.split(" "), capsys)
    assert expected in said or (line.startswith("merge") and "required" in said)
    assert "Traceback" not in said


def test_a_settings_file_may_stand_anywhere_on_the_line(tmp_path: Path, simulated: list[Config]) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "mine.toml").write_text(SETTINGS)
    for words in (
        ["seed=4", str(folder / "mine.toml"), "run-name=7"],
        [str(folder / "mine.toml"), "run-name=7", "seed=4"],
    ):
        assert main(["simulate", *words]) == 0
    assert {(config.num_rounds, config.seed, config.run_name) for config in simulated} == {(3, 4, "7")}


def test_a_shipped_settings_file_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated: list[Config]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("conf/fedavg-iid.toml", "fedavg-iid"):
        assert main(["simulate", name, "learning-rate=0.1"]) == 0
    assert [(config.dataset, config.sharding) for config in simulated] == 2 * [("cifar100", "iid")]


def test_files_of_another_kind_are_sent_to_their_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text(SETTINGS)
    for command in ("study", "one-shot"):
        assert "is a settings file" in refused([command, str(tmp_path / "mine.toml")], capsys)
    (tmp_path / "study.toml").write_text('name = "x"\nseeds = [0]\n[[arm]]\nname = "a"\n')
    assert "give it to fl-taskarith study" in refused(["search", str(tmp_path / "study.toml")], capsys)


@pytest.mark.parametrize("command", ["study", "search", "one-shot", "fed-em", "simulate"])
def test_a_results_folder_that_is_a_file_is_refused_before_the_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "study.toml").write_text('name = "x"\nseeds = [0]\n[[arm]]\nname = "a"\n')
    (tmp_path / "one-shot.toml").write_text(
        'name = "b"\nseeds = [0]\n[tasks]\nfamily = "inversions"\nnumber = 2\n[settings]\nlearning-rate = 0.1\n'
        '[[data]]\nname = "d"\noverlap = 1\n[[training]]\nname = "t"\n'
    )
    where = [f"results-dir={tmp_path / 'file'}"] if command == "simulate" else ["--results-dir", str(tmp_path / "file")]
    files = [str(path) for path in (tmp_path / f"{command}.toml",) if path.exists()]
    assert "is a file: expected a folder" in refused([command, *files, *where], capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(), 0), (OSError(28, "No space left on device"), 1)])
def test_output_that_cannot_be_written_ends_nothing(
    error: OSError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    done: list[str] = []
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", lambda _: (print("a line"), done.append("all")))
    monkeypatch.setattr(sys, "stdout", Lost())
    assert main(["simulate", "seed=1"]) == status
    assert done == ["all"]


def test_help_is_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--help"])
    assert ended.value.code == 0 and b"\\u03b7" in printed.getvalue()
