"""The web page: everything in one file, with the numbers of the tables, and drawn by a real browser."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from PIL import Image

from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.report.page import write_page
from fl_taskarith.report.page_parts import by_round, comparison, table
from fl_taskarith.report.read_results import read_study

SHIPPED = Path(__file__).parents[2] / "results" / "digits"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A study of the project's own."""
    shutil.copytree(SHIPPED / "six-models", tmp_path / "results" / "six-models")
    return tmp_path / "results"


def addresses(page: str) -> list[str | None]:
    """What the page would fetch."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value for name, value in attrs if name in ("src", "href"))

    Reader().feed(page)
    return found


def test_the_page_holds_every_arm_and_needs_no_other_file(results: Path, tmp_path: Path) -> None:
    page = write_page(results, tmp_path / "page").read_text(encoding="utf-8")
    for study in results.iterdir():
        for arm in read_study(study).arms:
            assert arm.label in page
    assert addresses(page) == []
    assert str(tmp_path) not in page, "no path of the machine"
    write_page(results, tmp_path / "page")
    with pytest.raises(ConfigError, match=r"index\.html"):
        write_page(results, tmp_path / "page", overwrite=False)
    (tmp_path / "page" / "index.html").write_text("<html>my own page</html>")
    with pytest.raises(ConfigError, match=r"index\.html was not written by fl-taskarith report: move it"):
        write_page(results, tmp_path / "page")
    assert "my own page" in (tmp_path / "page" / "index.html").read_text()


def test_a_table_has_the_numbers_of_table_csv(results: Path) -> None:
    folder = results / "six-models"
    rows = pandas.read_csv(folder / "table.csv")
    shown = table(comparison(rows), "comparison").source.data
    assert list(shown["arm"]) == list(rows["arm"])
    assert list(shown["test %"]) == list(rows["test_percent"])
    assert list(shown["learning rate"]) == list(rows["learning_rate"])


def test_curves_are_means_over_seeds_in_the_rounds_that_all_have() -> None:
    assert by_round({0: {0: 1.0, 5: 2.0}, 1: {0: 3.0, 5: 4.0, 6: 5.0}}) == {0: [1.0, 3.0], 5: [2.0, 4.0]}
    assert by_round({}) == {}


def test_without_results_it_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"table\.csv"):
        write_page(tmp_path, tmp_path / "page")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "table.csv").write_text("group,arm\nx")
    with pytest.raises(CheckpointError, match="study"):
        write_page(tmp_path, tmp_path / "page")


@pytest.mark.parametrize(("column", "value"), [("arm", None), ("test_percent", "many"), ("n", "-1")])
def test_a_damaged_table_is_named(column: str, value: str | None, results: Path, tmp_path: Path) -> None:
    path = results / "six-models" / "table.csv"
    frame = pandas.read_csv(path)
    frame = frame.drop(columns=column) if value is None else frame.assign(**{column: value})
    frame.to_csv(path, index=False)
    with pytest.raises(CheckpointError, match=rf"table\.csv.*{column}"):
        write_page(results, tmp_path / "page")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_it(results: Path, tmp_path: Path) -> None:
    page, picture = write_page(results, tmp_path / "page"), tmp_path / "page.png"
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [str(CHROMIUM), *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
               "--window-size=1100,2400", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    pixels = Image.open(picture).convert("RGB")
    colours = {colour for number, colour in pixels.getcolors(2**24) or [] if number > 30}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours, "the lines of three arms"
    assert sum(number for number, colour in pixels.getcolors(2**24) or [] if sum(colour) < 200) > 2000, "text"


@pytest.mark.parametrize(("name", "old", "new", "told"), [
    ("settings.json", '"num-rounds": 40', '"num-rounds": 41', "another num-rounds than table.csv"),
    ("settings.json", '"strategy": "fedavg"', '"strategy": "scaffold"', "another strategy than table.csv"),
])  # fmt: skip
def test_files_of_another_study_are_told(name: str, old: str, new: str, told: str, results: Path) -> None:
    path = results / "six-models" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match=told):
        read_study(path.parent)


def test_seeds_that_ended_below_the_head_are_named(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "strategies", tmp_path / "results" / "strategies")
    page = write_page(tmp_path / "results", tmp_path / "page").read_text(encoding="utf-8")
    runs = pandas.read_csv(SHIPPED / "strategies" / "runs.csv")
    lost = runs[runs["test_percent"] < runs["ridge_test_percent"]].sort_values("seed").groupby(["group", "arm"])
    assert 0 < len(lost) == page.count("ended below the head it began with")
    for (_, arm), rows in lost:
        ends = ", ".join(f"seed {row.seed} at {row.test_percent:.2f} %" for row in rows.itertuples())
        assert f"{arm}: {ends} ended below the head" in page
