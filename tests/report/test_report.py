"""The report of studies: every number from their files, missing parts visible, sound LaTeX, a PDF where TeX is."""

import csv
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from report_studies import (
    DENSE,
    SEEDS,
    STUDIES,
    Settings,
    plausible,
    write_studies,
    write_study,
)
from report_text import expanded, lines, prose, report
from scipy import stats

from fl_taskarith.cli.command import main
from fl_taskarith.errors import CheckpointError, ConfigError, ReportError
from fl_taskarith.report.authors import read_authors
from fl_taskarith.report.document import PAGES, write_report
from fl_taskarith.report.typeset import find_tex, typeset
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.study.study_file import load_study

pytestmark = pytest.mark.usefixtures("no_tex")

TEX = find_tex()
AUTHORS = '[[author]]\nname = "Ada Lovelace"\nid = "s_123"\naffiliation = "R&D"\n[[author]]\nname = "Ōno"\nid = "7"\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven studies."""
    return write_studies(tmp_path_factory.mktemp("digits"))


def computed(root: Path, studies: Iterable[str] = STUDIES) -> set[str]:
    """Every number with two decimals that may be said of the results in `root`, by scipy, without a sign."""
    samples: dict[str, np.ndarray] = {}
    values: list[float] = []
    for study in studies:
        for line in lines(root / study / "runs.csv"):
            for column in ("test_percent", "val_percent", "ridge_test_percent"):
                key = f"{study} {line['group']} {line['arm']} {column}"
                samples[key] = np.append(samples.get(key, []), float(line[column]))
        for line in lines(root / study / "curves.csv"):
            for column in ("test_percent", "val_percent"):
                key = f"{study} {line['group']} {line['arm']} {column} {line['round']}"
                samples[key] = np.append(samples.get(key, []), float(line[column]))
        values += [float(line[name]) for line in lines(root / study / "table.csv")
                   for name in ("test_percent", "test_percent_sd")]  # fmt: skip
    groups = [[name for name in samples if part in name] for part in ("test_percent", "val_percent")]
    stacked = np.array([*(np.array([samples[a] - samples[b] for b in samples]) for a in groups[0])])
    means, errors = stacked.mean(-1), stacked.std(-1, ddof=1) / np.sqrt(len(SEEDS))
    quantile, power = stats.t.ppf([0.975, 0.8], len(SEEDS) - 1)
    values += [*means.ravel(), *(means - quantile * errors).ravel(), *(means + quantile * errors).ravel()]
    values += [*(errors * (quantile + power)).ravel()]
    tests = np.array([samples[name].mean() for name in samples if name.endswith("test_percent")])
    arms = [name for name in samples if name.startswith("extension") and name.endswith(" test_percent")]
    gains = np.array([(samples[name] - samples[name.replace(" test", " ridge_test")]).mean() for name in arms])
    for each in (tests, gains):
        values += [*(100 * each[:, None] / each).ravel()]
    for sample in samples.values():
        values += [sample.mean(), sample.std(ddof=1)]
    return {f"{abs(value):.2f}" for value in values}


def test_every_difference_is_printed_with_its_own_interval(whole: Path, tmp_path: Path) -> None:
    tex = report(whole, tmp_path / "report")
    samples: dict[tuple[object, ...], list[float]] = {}
    for study in STUDIES:
        for table, columns in (("runs", ("test_percent", "ridge_test_percent")), ("curves", ("test_percent",))):
            for line in lines(whole / study / f"{table}.csv"):
                for column in columns:
                    key = (study, table, line["group"], line["arm"], column, line.get("round"))
                    samples.setdefault(key, []).append(float(line[column]))
    values = np.array(list(samples.values()))
    away = (values[:, None] - values[None]).reshape(-1, values.shape[1])
    half = stats.t.ppf(0.975, 2) * stats.sem(away, axis=1)
    rows = np.stack([away.mean(1), away.mean(1) - half, away.mean(1) + half], 1).round(2)
    triples = {tuple(f"{each + 0.0:+.2f}".replace("-0.00", "+0.00") for each in row) for row in rows}
    said = re.findall(r"\$([+-]\d+\.\d\d)\$ \[\$([+-]\d+\.\d\d)\$,~\$([+-]\d+\.\d\d)\$\]", tex)
    assert len(said) > 50 and set(said) <= triples


def test_every_number_comes_from_the_results(whole: Path, tmp_path: Path) -> None:
    tex = report(whole, tmp_path / "report")
    static = set(re.findall(r"\d+\.\d+", shipped_file("report/template.tex").read_text()))
    static |= {"0.3", "0.85"}  # sizes of figures
    settings = {str(value) for study in STUDIES
                for each in json.loads((whole / study / "settings.json").read_text())["arms"]
                for value in each["settings"].values()}  # fmt: skip
    rates = {line["learning_rate"] for study in STUDIES for line in lines(whole / study / "table.csv")}
    sent = {f"{float(line['uplink_megabytes']):.1f}" for line in lines(whole / "extension" / "curves.csv")}
    allowed = computed(whole) | sent
    said = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", tex)) - static
    assert len(said) > 100
    assert said - settings - rates <= allowed
    runs = len(SEEDS) * sum(len(arms) for arms in STUDIES.values())
    assert f"Reported are {runs} finished runs, {runs * 11 / 60:.0f} minutes" in prose(tex)


def test_a_changed_result_changes_the_report_and_nothing_stays(whole: Path, tmp_path: Path) -> None:
    first = report(whole, tmp_path / "first")
    other = write_studies(tmp_path / "other", accuracy=lambda settings, seed: 7.0 + plausible(settings, seed) / 2)
    second = report(other, tmp_path / "second")
    measured = re.compile(r"\d\d\.\d\d\\,\$\\pm\$\\,\d\.\d\d")
    assert measured.search(first)
    assert not set(measured.findall(first)) & set(measured.findall(second))


@pytest.mark.parametrize("missing", STUDIES)
def test_a_part_that_was_not_run_says_so_and_invents_nothing(missing: str, tmp_path: Path) -> None:
    # Alone, so that no other study can answer for it: all weights, centralized where that is not what is missing.
    only: Settings = DENSE | {"strategy": "fedavg" if missing in ("centralized", "systems") else "centralized"}
    write_study(tmp_path / "other", [("one arm", only)])
    tex = prose(report(tmp_path, tmp_path / "report"))
    expected = {
        "centralized": "centralized training: schedules",
        "fedavg-iid": "FedAvg on iid shards",
        "heterogeneity": "whether more local work hurts",
        "sparsity": "which mask rule wins at equal density",
        "six-models": "the six models",
        "participation": "the share of clients per round",
        "systems": "FedNova and FedProx under systems heterogeneity",
        "strategies": "aggregation algorithms side by side",
        "extension": "methods against label skew",
    }[missing]
    assert re.search(rf"\\notrun\{{{expected}", tex)
    said = set(re.findall(r"\d+\.\d\d(?!\d)", tex[tex.index(r"\section{Experiments}") :]))
    assert said <= computed(tmp_path, ["other"])


def test_runs_that_are_missing_or_diverged_are_named(tmp_path: Path) -> None:
    arms = [("dense", DENSE | {"sharding": "iid"}), ("gone", DENSE), ("diverged", DENSE | {"classes-per-client": 1})]
    write_study(tmp_path / "heterogeneity", arms)
    kept = [line for line in lines(tmp_path / "heterogeneity" / "runs.csv") if line["arm"] != "gone"]
    for line in kept:
        if line["arm"] == "diverged":
            line |= {"state": "diverged", "test_percent": "", "val_percent": ""}
    with open(tmp_path / "heterogeneity" / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert r"$N_c = 2$ & 0.0316 & \notrun{} & -- & not run" in tex
    assert "$N_c = 1$ & 0.0316 & diverged & -- & not run" in tex


def test_the_discussion_asks_for_a_text_until_there_is_one_and_names_the_figure(tmp_path: Path) -> None:
    root = write_studies(tmp_path / "studies", ["sparsity", "six-models"])
    (root / "sparsity" / "density.pdf").write_bytes(b"%PDF-1.4 /MediaBox [ 0 0 200 249 ]")
    (root / "masks" / "mine").mkdir(parents=True)
    (root / "masks" / "mine" / "sensitivity.pdf").write_bytes(b"%PDF-1.4 /MediaBox [ 0 0 200 249 ]")
    tex = report(root, tmp_path / "report")
    figures = r"Figures~\ref{fig:sparsity-density} and~\ref{fig:sparsity-sensitivity}"
    asked = f"[Your text: why is that so? Motivate it with {figures}.]"
    assert asked in tex and r"{figures/sparsity-sensitivity.pdf}" in tex
    main_tex = tmp_path / "report" / "main.tex"
    stub = f"% Your text: why is that so? ({figures})\n"
    assert main_tex.read_text().count("% Your text: why is that so?") == 9, "a place for every question"
    assert r"\textbf{Participation and scale.}" not in tex, "a question without an answer is not discussed"
    own = main_tex.read_text().replace(stub, f"{stub}Small {{weights}} matter less.\n\n% a note\nSo they do.\n")
    main_tex.write_text(own)
    tex = report(root, tmp_path / "report")
    assert main_tex.read_text() == own
    discussion = tex[tex.index(r"\section{Discussion}") :]
    assert asked not in tex and "Small {weights} matter less.\n\nSo they do." in discussion
    assert r"[Your text: why is that so? Motivate it with Table~\ref{tab:six-models-1}.]" in discussion


def test_unequal_work_is_said_to_be_unequal(tmp_path: Path) -> None:
    arms = [(f"J = {steps}", DENSE | {"local-steps": steps, "num-rounds": 10}) for steps in (4, 8)]
    write_study(tmp_path / "heterogeneity", arms)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert "at unequal numbers of steps in all" in tex
    assert "Ridge in the loop" not in tex


def test_results_without_settings_are_refused(tmp_path: Path) -> None:
    write_study(tmp_path / "old", STUDIES["centralized"])
    (tmp_path / "old" / "settings.json").unlink()
    with pytest.raises(CheckpointError, match=r"settings\.json.*fl-taskarith study \.\.\. --tables"):
        report(tmp_path / "old", tmp_path / "report")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A study and authors whose words mean something to TeX."""
    arms = [(label, DENSE | {"strategy": "centralized", "weight-decay": index / 10, "schedule": "x_{}$%&#~^\\"})
            for index, label in enumerate(["50% of $x_1$ & {more}", "\\end{document}", "名 ‖τ‖ <<a>>"])]  # fmt: skip
    write_study(tmp_path / "centralized", arms)
    (tmp_path / "authors.toml").write_text('title = "100 % {of} \\\\this"\n' + AUTHORS)
    return tmp_path


def test_braces_and_environments_are_balanced_whatever_labels_say(hostile: Path) -> None:
    tex = report(hostile, hostile / "report", authors=hostile / "authors.toml")
    bare = re.sub(r"\\[{}\\]", "", tex)
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(sign, 0) for sign in bare))
    assert min(depth) == 0 and depth[-1] == 0
    begun, ended = re.findall(r"\\begin\{(\w+\*?)\}", tex), re.findall(r"\\end\{(\w+\*?)\}", tex)
    assert sorted(begun) == sorted(ended)
    assert r"\title{100 \% \{of\} \textbackslash{}this" in tex
    assert r"Ada Lovelace (s\_123)" in tex and r"R\&D" in tex
    assert ended.count("document") == 1


def test_figures_of_the_studies_are_copied_and_old_ones_go(whole: Path, tmp_path: Path) -> None:
    root = write_studies(tmp_path / "digits", ["sparsity"])
    (root / "sparsity" / "accuracy-five rules_.pdf").write_bytes(b"%PDF-1.4 /MediaBox [ 0 0 453 249 ]")
    tex = report(root, tmp_path / "report")
    figures = tmp_path / "report" / "figures"
    assert [path.name for path in figures.glob("*.pdf")] == ["sparsity-accuracy-five-rules.pdf"]
    assert "{figures/sparsity-accuracy-five-rules.pdf}" in tex
    assert r"\begin{figure*}" in tex, "6.3 inches do not fit a column"
    for name in ("accuracy-a", "accuracy-b", "densities"):
        (root / "sparsity" / f"{name}-rule.pdf").write_bytes(b"%PDF-1.4 /MediaBox [ 0 0 200 249 ]")
    tex = report(root, tmp_path / "report")
    assert len(list(figures.glob("*.pdf"))) == 2
    assert r"\def\@captype{figure}" in tex


def test_the_users_template_is_filled_and_its_mistakes_are_named(whole: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.tex"
    template.write_text(r"\BLOCK{for part in sections}\VAR{part.section.title};\BLOCK{endfor}")
    main_tex = write_report(whole, tmp_path / "report", template=template)[0]
    assert main_tex.read_text().startswith("Centralized training;")
    for text, expected in ((r"\VAR{titel}", "'titel' is undefined"), ("\n\\BLOCK{if}", "line 2")):
        template.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            report(whole, tmp_path / "report", template=template)
    with pytest.raises(ConfigError, match=r"none\.tex"):
        report(whole, tmp_path / "report", template=tmp_path / "none.tex")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[author", "not valid TOML"),
        ('[[author]]\nname = "A"', "author 1: id is missing"),
        (AUTHORS + "[[author]]\nname = 3", "author 3: name = 3"),
        (AUTHORS + '[[author]]\nnamen = "A"', 'author 3: "namen" is not a key; did you mean "name"'),
        ('[[autor]]\nname = "A"\nid = "1"', 'did you mean "author"'),
        ("title = 3", "title = 3 is not accepted: expected a string"),
    ],
)
def test_bad_authors_are_named(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "authors.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        read_authors(tmp_path / "authors.toml")


def test_a_folder_without_results_and_damaged_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no results of a study" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 1
    write_study(tmp_path / "centralized", STUDIES["centralized"])
    for name, text in (("settings.json", "{"), ("runs.csv", "group,arm\n,x\n"), ("table.csv", "arm,group\n1\n")):
        path = tmp_path / "centralized" / name
        kept = path.read_text()
        path.write_text(text)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            report(tmp_path, tmp_path / "report")
        path.write_text(kept)


def test_the_command_prints_what_it_wrote_and_says_that_there_is_no_tex(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "authors.toml").write_text(AUTHORS)
    words = ["report", str(whole), "--output", str(tmp_path / "out"), "--authors", str(tmp_path / "authors.toml")]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "main.tex")  # the log may come before
    written = {"main.tex", "own.bib", "numbers.tex", "references.bib", "tables", "figures", ".generated.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    cited = set(re.findall(r"\\cite\{(\w+)\}", expanded(tmp_path / "out" / "main.tex")))
    listed = set(re.findall(r"@\w+\{(\w+),", (tmp_path / "out" / "references.bib").read_text()))
    assert cited == listed


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="no TeX is installed")
def test_tex_sets_the_report_within_eight_pages_and_equal_bytes(whole: Path, tmp_path: Path) -> None:
    paths = [write_report(whole, tmp_path / name) for name in ("first", "second")]
    assert TEX is not None
    pages = typeset(paths[0][0], TEX, tmp_path).text_pages
    assert pages is not None and 3 <= pages <= PAGES
    assert paths[0][1].read_bytes().startswith(b"%PDF")
    assert paths[0][1].read_bytes() == paths[1][1].read_bytes()
    assert not (tmp_path / "first" / "report.aux").exists()


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="no TeX is installed")
def test_tex_sets_hostile_words_too(hostile: Path) -> None:
    assert len(write_report(hostile, hostile / "report", authors=hostile / "authors.toml")) == 2


@pytest.mark.slow
@pytest.mark.skipif(TEX is None, reason="no TeX is installed")
def test_what_tex_complains_of_is_quoted(whole: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.tex"
    template.write_text(r"\documentclass{article}\begin{document}\nothing\end{document}")
    with pytest.raises(ReportError, match="Undefined control sequence"):
        write_report(whole, tmp_path / "report", template=template)
    assert (tmp_path / "report" / "main.tex").exists()


def test_writing_a_report_needs_no_torch() -> None:
    code = "import sys, fl_taskarith.report.document; sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_studies_answer_every_question(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "conf" / "study"
    studies = [
        load_study(file) for file in sorted(folder.glob("digits*/*.toml")) + sorted(folder.glob("digits-*.toml"))
    ]
    for study in studies:
        arms = [(f"{arm.group} | {arm.label}", arm.settings) for arm in study.arms]
        write_study(tmp_path / study.name.removeprefix("digits/"), arms)
    tex = report(tmp_path, tmp_path / "report")
    body = tex[tex.index(r"\section{Experiments}") :]
    assert {study.name.removeprefix("digits/") for study in studies} == set(STUDIES)
    assert r"\notrun" not in body
    schedules = ("exponential", "plateau", "weight decay 0.01")
    cells = ("$N_c = 5$", "$J = 16$", "$d = 0.01$", "$R = 8$", "$K = 100$", "$C = 0.05$")
    algorithms = ("FedNova", r"FedProx with $\mu = 0.1$", "equal $J$", "dropout 0.2")
    for asked in (*schedules, *cells, *algorithms):
        assert asked in body, asked
