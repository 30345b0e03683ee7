"""A report's folder is written into again and again, and a user's own work in it stays; shipped results are told of."""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from report_studies import STUDIES, committed_results, write_studies, write_study

from fl_taskarith.cli.command import main
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.report.document import write_report
from fl_taskarith.report.generated import MANIFEST
from fl_taskarith.report.read_results import read_study
from fl_taskarith.report.typeset import Typeset, find_tex

pytestmark = pytest.mark.usefixtures("no_tex")

TEX = find_tex()
FIGURE = b"%PDF-1.4 /MediaBox [ 0 0 200 249 ]"
AUTHORS = '[[author]]\nname = "Ada Lovelace"\nid = "1"\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A study with a figure."""
    write_studies(tmp_path / "digits", ["sparsity"])
    (tmp_path / "digits" / "sparsity" / "density.pdf").write_bytes(FIGURE)
    return tmp_path / "digits"


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    """The folder of a report of it."""
    write_report(root, tmp_path / "out")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_results(root: Path, accuracy: float = 77.0) -> None:
    shutil.rmtree(root / "sparsity")
    write_study(root / "sparsity", STUDIES["sparsity"], lambda settings, seed: accuracy + 0.1 * seed)
    (root / "sparsity" / "density.pdf").write_bytes(FIGURE)


def test_what_a_user_wrote_stays_while_numbers_follow_the_results(root: Path, out: Path) -> None:
    own = {
        "main.tex": (out / "main.tex").read_text().replace("% Your text: why", "We expected more.\n% why").encode(),
        "own.bib": b"@misc{mine, title = {Mine}}",
        "notes.txt": b"a note",
        "figures/mine.pdf": b"my figure",
        "tables/mine.tex": b"my table",
        "tables/deeper/mine.tex": b"my table",
        "report.tex": b"of an earlier version",
        "report.pdf": b"of an earlier version",
        "main.pdf": b"my own print",
    }
    (out / "tables" / "deeper").mkdir()
    for name, content in own.items():
        (out / name).write_bytes(content)
    before = contents(out)
    change_results(root)
    write_report(root, out)
    after = contents(out)
    assert {name: after[name] for name in own} == own
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed >= {"numbers.tex", "tables/sparsity.tex", MANIFEST}
    assert all(name.startswith("tables/") for name in changed - {"numbers.tex", MANIFEST})
    assert b"77.10" in after["tables/sparsity.tex"] and b"77.10" not in before["tables/sparsity.tex"]


@pytest.mark.parametrize(
    "name",
    ["numbers.tex", "references.bib", "tables/sparsity.tex", "figures/sparsity.tex", "figures/sparsity-density.pdf"],
)
def test_a_generated_file_that_was_edited_is_named_and_nothing_is_written(
    name: str, root: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / name).write_bytes((out / name).read_bytes() + b"% mine")
    before = contents(out)
    change_results(root)
    assert main(["report", str(root), "--output", str(out)]) == 1
    said = capsys.readouterr().err
    assert name in said and "changed since" in said
    assert contents(out) == before
    (out / name).rename(out / "mine")
    write_report(root, out)
    assert (out / "mine").read_bytes() == before[name]
    assert b"% mine" not in (out / name).read_bytes()


def test_files_that_were_there_first_are_not_overwritten_unless_they_are_the_same(root: Path, out: Path) -> None:
    old = out.parent / "old"
    for name in ("references.bib", "figures/sparsity-density.pdf"):  # as an earlier version left them
        (old / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(out / name, old / name)
    (old / "report.tex").write_text("old")
    write_report(root, old)
    assert (old / "report.tex").read_text() == "old"
    for name in ("references.bib", "figures/sparsity-density.pdf", "numbers.tex", "tables/sparsity.tex"):
        folder = out.parent / f"foreign-{Path(name).stem}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"mine")
        with pytest.raises(ConfigError, match=re.escape(name)):
            write_report(root, folder)
        assert contents(folder) == {name: b"mine"}
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ConfigError, match=re.escape(name)):
        write_report(root, folder)


def test_a_figure_that_is_not_of_the_results_any_more_goes_unless_it_was_edited(root: Path, out: Path) -> None:
    for number in range(2):
        (out / "figures" / "mine.pdf").write_bytes(FIGURE)
        if number:
            (root / "sparsity" / "density.pdf").write_bytes(FIGURE)
            write_report(root, out)
            (out / "figures" / "sparsity-density.pdf").write_bytes(b"with my marks")
        (root / "sparsity" / "density.pdf").unlink()
        write_report(root, out)
        assert (out / "figures" / "mine.pdf").exists()
        assert (out / "figures" / "sparsity-density.pdf").exists() == bool(number)


@pytest.mark.parametrize("writes", (0, 1, 5, 13, 24))
def test_a_command_that_dies_while_it_writes_is_run_again(
    writes: int, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_taskarith.storage.files import write_atomically

    left = [writes]

    def write(path: Path, content: bytes | str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write_atomically(path, content)

    write_report(root, out.parent / "first")
    for folder in (out, out.parent / "new"):
        change_results(root, 80.0)
        left[0] = writes
        monkeypatch.setattr("fl_taskarith.report.generated.write_atomically", write)
        with contextlib.suppress(KeyboardInterrupt):
            write_report(root, folder)
        monkeypatch.setattr("fl_taskarith.report.generated.write_atomically", write_atomically)
        change_results(root)
        write_report(root, folder)
        assert b"77.10" in (folder / "tables" / "sparsity.tex").read_bytes()


def test_a_template_replaces_main_tex_only_while_nobody_has_changed_it(
    root: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = out.parent / "mine.tex"
    template.write_text(r"\VAR{title} \VAR{runs}")
    write_report(root, out, template=template)
    assert (out / "main.tex").read_text().startswith("Federated learning under")
    template.write_text(r"\VAR{runs} runs")
    write_report(root, out, template=template)
    assert re.fullmatch(r"\d+ runs", (out / "main.tex").read_text())
    caplog.clear()
    write_report(root, out)
    assert r"does not \input{numbers}" in caplog.text
    (out / "main.tex").write_text("my thesis")
    with pytest.raises(ConfigError, match=r"main\.tex"):
        write_report(root, out, template=template)
    with pytest.raises(ConfigError, match=r"main\.tex"):
        write_report(root, out, template=out / "main.tex")
    assert (out / "main.tex").read_text() == "my thesis"


# What the main.tex of the version before takes from generated files.
PARTS = ("Centralized", "FedavgIid", "Heterogeneity", "Sparsity", "SixModels", "Participation", "Systems", "Strategies",
         "Extension")  # fmt: skip
OLD_MAIN = r"""\documentclass[10pt,twocolumn]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp}
\usepackage[a4paper,margin=16mm,columnsep=7mm]{geometry}
\usepackage{amsmath,amssymb,graphicx,booktabs,tabularx,array}
\usepackage[hidelinks]{hyperref}
\input{numbers}
\title{\reportTitle\\\large \reportDatasets}
\author{\reportAuthors}
\begin{document}
\maketitle
\reportTold{} of \reportAsked{}; \reportUndecided{}, \reportNotRun{}. \reportHeadlines
\ifreportLabelSkew Skew.\fi
\reportSearches \reportSeeds \reportRuns{} \reportDuration{} \reportMachines. \reportOrigin{}
\input{tables/settings}
""" + "".join(
    rf"""\reportAnswers{part}
\input{{tables/{name}}}
\reportParagraphs{part}
\input{{figures/{name}}}
"""
    for part in PARTS for name in [re.sub("(?<=.)([A-Z])", r"-\1", part).lower()]
) + r"""\reportFindings
My own conclusion.
\cite{mcmahan2017}
\bibliographystyle{plain}
\bibliography{references,own}
\end{document}
"""  # fmt: skip


def test_a_main_tex_of_the_version_before_has_all_that_it_takes_from_generated_files(root: Path, out: Path) -> None:
    (out / "main.tex").write_text(OLD_MAIN)
    write_report(root, out)
    assert (out / "main.tex").read_text() == OLD_MAIN
    inputs = re.findall(r"\\input\{([^}]*)\}", OLD_MAIN)
    assert len(inputs) == 20 and all((out / f"{name}.tex").exists() for name in inputs)
    numbers = (out / "numbers.tex").read_text()
    assert all(f"\\newcommand{{{name}}}{{" in numbers for name in re.findall(r"\\report\w+", OLD_MAIN))


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="no TeX is installed")
def test_tex_sets_a_main_tex_of_the_version_before(tmp_path: Path) -> None:
    write_studies(tmp_path / "studies")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "main.tex").write_text(OLD_MAIN)
    assert len(write_report(tmp_path / "studies", tmp_path / "out")) == 2


def test_a_pdf_of_somebody_elses_making_is_renamed(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [b"first", b"second", b"third", b"fourth"]
    monkeypatch.setattr("fl_taskarith.report.document.find_tex", lambda: "latexmk")
    monkeypatch.setattr("fl_taskarith.report.document.typeset", lambda *_: Typeset(made.pop(0), 1))
    for _ in range(2):
        assert write_report(root, out) == [out / "main.tex", out / "main.pdf"]
    assert {path.name: path.read_bytes() for path in out.glob("*.pdf")} == {"main.pdf": b"second"}
    for _ in range(2):
        (out / "main.pdf").write_bytes(b"mine")
        write_report(root, out)
    expected = {"main.pdf": b"fourth", "main-1.pdf": b"mine", "main-2.pdf": b"mine"}
    assert {path.name: path.read_bytes() for path in out.glob("*.pdf")} == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"numbers.tex": 3}', '{"../../notes.txt": ["x"]}'])
def test_a_damaged_manifest_endangers_nothing(text: str, root: Path, out: Path) -> None:
    (out.parent / "notes.txt").write_text("mine")
    (out / MANIFEST).write_text(text)
    change_results(root)
    before = contents(out)
    with pytest.raises((CheckpointError, ConfigError)):
        write_report(root, out)
    assert contents(out) == before
    assert (out.parent / "notes.txt").exists()


# shipped results


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {line["run"] for path in folder.rglob("runs.csv") for line in csv.DictReader(path.open(newline=""))}
    monkeypatch.setattr("fl_taskarith.report.read_results.line_is_shipped", lambda line: line["run"] in names)


def test_a_report_of_ones_own_runs_has_ones_name_and_says_nothing_of_shipped_ones(root: Path, out: Path) -> None:
    (out.parent / "me.toml").write_text(AUTHORS)
    assert main(["report", str(root), "--output", str(out), "--authors", str(out.parent / "me.toml")]) == 0
    numbers = (out / "numbers.tex").read_text()
    assert "Ada Lovelace" in numbers and r"\newcommand{\reportOrigin}{}" in numbers


def test_shipped_runs_are_told_of_and_nobody_elses_name_stands_above_them_unless_they_say_so(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ship(root, monkeypatch)
    (out.parent / "me.toml").write_text(AUTHORS)
    before = contents(out)
    words = ["report", str(root), "--output", str(out), "--authors", str(out.parent / "me.toml")]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "were shipped with fl_taskarith" in said and "--shipped-results" in said and "Leave --authors out" in said
    assert contents(out) == before
    assert main([*words, "--shipped-results"]) == 0
    runs = 3 * len(STUDIES["sparsity"])
    sentence = rf"All {runs} finished runs were shipped with fl\_taskarith and run by its authors."
    numbers = (out / "numbers.tex").read_text()
    assert sentence in numbers and "Ada Lovelace" in numbers
    assert r"\reportOrigin" in (out / "main.tex").read_text()
    assert main(words[:-2]) == 0, "without authors there is nobody to be misled about"
    assert sentence in (out / "numbers.tex").read_text()
    write_study(root / "six-models", STUDIES["six-models"])
    assert main(words) == 1
    assert main([*words, "--shipped-results"]) == 0
    both = runs + 3 * len(STUDIES["six-models"])
    assert f"{runs} of the {both} finished runs were shipped" in (out / "numbers.tex").read_text()


def test_a_text_that_keeps_silent_about_shipped_runs_is_warned_of(
    root: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ship(root, monkeypatch)
    write_report(root, out)
    assert "shipped" not in caplog.text
    template = out.parent / "template.tex"
    for text, silent in ((r"\VAR{origin} \input{numbers}", False), (r"\VAR{runs} \input{numbers}", True)):
        caplog.clear()
        template.write_text(text)
        write_report(root, out, template=template)
        assert (r"add \reportOrigin" in caplog.text) is silent


@pytest.mark.parametrize("results", ["digits", "cifar100/h100"])
def test_the_committed_reports_are_what_the_command_writes(results: str, tmp_path: Path) -> None:
    shipped_folder = committed_results() / results
    for name in ("here", "copy"):
        folder = shipped_folder
        if name == "copy":
            folder = Path(shutil.copytree(folder, tmp_path / Path(results).name))
            shutil.rmtree(folder / "report")
        write_report(folder, tmp_path / name)
    committed = contents(shipped_folder / "report")
    written = contents(tmp_path / "here")
    assert {name: committed[name] for name in written if name != MANIFEST} == {
        name: content for name, content in written.items() if name != MANIFEST
    }
    assert set(committed) - set(written) == {"main.pdf"}
    assert contents(tmp_path / "copy") == written, "wherever the results lie"
    (tmp_path / "me.toml").write_text(AUTHORS)
    assert main(["report", str(shipped_folder), "--output", str(tmp_path / "mine"),
                 "--authors", str(tmp_path / "me.toml")]) == 1  # fmt: skip
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("other", ["sparsity", "participation", "heterogeneity", ""])
def test_curves_of_other_runs_than_the_tables_are_told(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = committed_results() / "digits"
    folder = shutil.copytree(results / "heterogeneity", tmp_path / "study")
    head, *lines = (results / (other or "heterogeneity") / "curves.csv").read_text().splitlines()
    lines = lines if other else [f"{line.rpartition(',')[0]},50.0" for line in lines]
    (folder / "curves.csv").write_text("\n".join([head, *lines]) + "\n")
    read_study(folder)
    assert ("curves.csv is not of the runs in the tables" in caplog.text) == (other != "heterogeneity")


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="no TeX is installed")
def test_tex_sets_a_users_text_references_and_figures(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (root / "sparsity" / "density.pdf").unlink()
    assert write_report(root, out) == [out / "main.tex", out / "main.pdf"]
    plain = (out / "main.pdf").read_bytes()
    (out / "chapters").mkdir()
    (out / "chapters" / "mine.tex").write_text(
        r"As shown~\cite{mine}, masks help (\reportRuns{} runs). \includegraphics{pictures/mine}"
    )
    (out / "pictures").mkdir()
    (out / "pictures" / "mine.pdf").write_bytes(plain)
    (out / "own.bib").write_text("@misc{mine, title = {Mine}, author = {Ada Lovelace}, year = {1843}}")
    text = (out / "main.tex").read_text().replace("% Your text: why", "\\input{chapters/mine}\n% why")
    (out / "main.tex").write_text(text)
    (out / "broken").symlink_to(tmp_path / "nowhere")
    assert json.loads((out / MANIFEST).read_text()).keys() >= {"main.pdf", "numbers.tex"}
    write_report(root, out)
    assert (out / "main.pdf").read_bytes() != plain
    assert (out / "pictures" / "mine.pdf").read_bytes() == plain
    assert not list(out.glob("main-*.pdf")) and not list(out.glob("*.aux"))
