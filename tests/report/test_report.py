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
    CONDITIONS,
    DEFAULTS,
    DENSE,
    MIXED,
    SEEDS,
    STUDIES,
    Settings,
    plausible,
    write_studies,
    write_study,
)
from scipy import stats

from fl_taskarith.cli.command import main
from fl_taskarith.errors import CheckpointError, ConfigError, ReportError
from fl_taskarith.report.authors import read_authors
from fl_taskarith.report.document import PAGES, write_report
from fl_taskarith.report.typeset import find_tex, typeset
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.study.study_file import load_study

TEX = find_tex()
AUTHORS = '[[author]]\nname = "Ada Lovelace"\nid = "s_123"\naffiliation = "R&D"\n[[author]]\nname = "Ōno"\nid = "7"\n'


@pytest.fixture(autouse=True)
def _no_tex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typesetting takes seconds: only tests marked `slow` do it."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.report.document.find_tex", lambda: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven studies."""
    return write_studies(tmp_path_factory.mktemp("digits"))


def report(root: Path, output: Path, **options: Path) -> str:
    """What TeX makes of main.tex."""
    return expanded(write_report(root, output, **options)[0])


def expanded(main: Path) -> str:
    """A main.tex with what it inputs in its place, and the macros of numbers.tex replaced by what they stand for."""
    text = main.read_text(encoding="utf-8").replace(r"\input{numbers}", "")
    numbers = (main.parent / "numbers.tex").read_text(encoding="utf-8")
    skew = r"\1" if r"\reportLabelSkewtrue" in numbers else ""
    text = re.sub(r"\\ifreportLabelSkew\n(.*?)\\fi\n", skew, text, flags=re.DOTALL)
    text = re.sub(r"\\input\{(\w[\w/-]+)\}", lambda found: (main.parent / f"{found[1]}.tex").read_text("utf-8"), text)
    own_text = re.compile(r"\\reportOwnText\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{#1\}")
    for found in re.finditer(r"\\newcommand\{(\\report\w+)\}(?:\[\d\])?\{", numbers):
        body = group(numbers, found.end())
        macro = re.escape(found[1]) + r"(\{\}|(?![A-Za-z]))"
        while (place := re.search(macro, text)) is not None:
            end, own = place.end(), ""
            if "[1]" in found[0]:
                own = re.sub(r"%.*\n", "", group(text, end + 1))
                end += len(group(text, end + 1)) + 2
            filled = own_text.sub(lambda asked, own=own: own or f"[Your text: {asked[1]}]", body)
            text = text[: place.start()] + filled.replace("#1", own) + text[end:]
    assert r"\report" not in text and r"\input" not in text
    return "\n".join(line for line in text.splitlines() if not line.startswith("%"))


def group(text: str, start: int) -> str:
    """What stands from `start` up to the brace that closes the one before it."""
    depth, end = 1, start
    while depth:
        depth += 0 if text[end - 1] == "\\" else {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def prose(tex: str) -> str:
    """On one line, as a reader would search it, without the tables and figures that a sentence refers to."""
    return re.sub(r" \((?:Table|Figures?)~\\ref\{[^()]*\}\)", "", " ".join(tex.split()))


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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


def test_questions_are_answered_by_the_numbers(tmp_path: Path) -> None:
    def accuracy(settings: Settings, seed: int) -> float:
        iid = settings["sharding"] == "iid"
        skew = 0.0 if iid else 10.0 / int(settings["classes-per-client"]) + 0.5 * int(settings["local-steps"])
        return 95 - skew + 0.01 * seed * (iid + int(settings["num-rounds"]))

    write_studies(tmp_path, ["heterogeneity"], accuracy)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert "Training at $N_c = 1$ ($J = 4$) is less accurate than on iid shards: $-12.01$ [" in tex
    assert "at equal numbers of steps in all" in tex
    assert "$J = 16$ ($N_c = 1$) is less accurate than $J = 4$: $-6.30$ [" in tex


def test_algorithms_and_methods_are_compared_where_the_data_are_least_alike(tmp_path: Path) -> None:
    def accuracy(settings: Settings, seed: int) -> float:
        alone = settings["classes-per-client"] == 1 and settings["sharding"] == "classes"
        method = {"scaffold": -2.0, "fedadam": 3.0 if settings["server-lr"] == 0.1 else 1.0}
        better = method.get(str(settings["strategy"]), 0.0) + 4.0 * (settings["local-loss"] == "squared")
        return 98.0 - 5.0 * alone + better * alone + (0.1 + 0.1 * better * alone) * seed

    write_studies(tmp_path, ["strategies", "extension"], accuracy)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert "FedAdam ($N_c = 1$, chosen on validation) is more accurate than FedAvg: $+3.30$" in tex, (
        "at the chosen step"
    )
    assert re.search(r"SCAFFOLD & 0\.0316 & 90\.90[^&]*& \$-2\.20\$[^&]*& lower", tex)
    chosen = "Squared loss ($N_c = 1$, the method that validation chooses)"
    assert f"{chosen} is more accurate than the ridge head alone: $+1.69$" in tex
    assert f"{chosen} is more accurate than masked FedAvg, the best control on validation: $+4.40$" in tex
    share = r"Squared loss has 73.80\,\% of the gain, and 99.39\,\% of the accuracy, of the best arm on iid shards"
    assert f"{share} (masked FedAvg, chosen on validation)" in tex
    goal = r"the best validation accuracy of masked FedAvg (92.68\,\%, after 16 rounds and 8.0~MB sent up)"
    assert f"Squared loss has {goal} after 2 rounds and 1.0~MB." in tex
    assert re.search(r"masked FedAvg & 98\.10[^&]*& 93\.10[^&]*& [^&]*& \$-118\.34\$ & 16 & 8\.0 ", tex)
    assert re.search(r"squared loss & 98\.10[^&]*& 97\.50[^&]*& [^&]*& 73\.80 & 2 & 1\.0 ", tex)
    assert "Ridge in the loop" in tex, "methods are described where they have results"


def test_methods_are_found_in_a_study_of_another_name(tmp_path: Path) -> None:
    write_study(tmp_path / "cpu", STUDIES["extension"])
    write_study(tmp_path / "strategies", STUDIES["strategies"])
    tex = prose(report(tmp_path, tmp_path / "report"))
    table = tex[tex.index("Against label skew, and controls") :]
    assert "squared loss &" in table
    assert "FedAdam" not in table[: table.index("bottomrule")], "controls are those of the methods' own study"


def test_a_gap_of_one_study_is_not_filled_from_another_that_differs_in_more(tmp_path: Path) -> None:
    arms = [(f"{place}, J = {steps}", DENSE | CONDITIONS[place] | {"local-steps": steps, "num-rounds": 160 // steps})
            for place in ("Nc = 1", "iid") for steps in (4, 8)]  # fmt: skip
    write_study(tmp_path / "a", arms[:3], lambda settings, seed: 81.0 + 0.1 * seed)
    write_study(tmp_path / "b", [(name, settings | {"precision": "bf16"}) for name, settings in arms],
                lambda settings, seed: 91.0 + 0.1 * seed)  # fmt: skip
    tex = prose(report(tmp_path, tmp_path / "report"))
    groups = re.findall(r"multicolumn\{5\}.*?(?=addlinespace|bottomrule)", tex)
    assert len(groups) > 4
    assert all(("81.1" in rows) != ("91.1" in rows) for rows in groups)


def test_a_bad_run_over_iid_clients_is_not_rewarded(tmp_path: Path) -> None:
    """A method that fails over iid clients is held against the arm that does best there, not against itself."""

    def accuracy(settings: Settings, seed: int) -> float:
        if settings["sharding"] == "iid":
            return 60.0 if settings["local-loss"] == "squared" else 97.81 + 0.01 * (seed - 1)
        return 96.81 + 0.01 * (seed - 1) if settings["local-loss"] == "squared" else 90.0

    write_study(tmp_path / "extension", STUDIES["extension"], accuracy)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert r"Squared loss has 50.00\,\% of the gain, and 98.98\,\% of the accuracy, of the best arm" in tex


def test_the_table_of_methods_is_of_the_one_study_that_has_most_of_their_runs(tmp_path: Path) -> None:
    write_study(tmp_path / "begun", STUDIES["extension"], lambda settings, seed: 11.0 + 0.1 * seed)
    write_study(tmp_path / "more", STUDIES["extension"] + [("iid | squared loss, half", {"sharding": "iid",
                "local-loss": "squared", "density": 0.5})], lambda settings, seed: 77.0 + 0.1 * seed)  # fmt: skip
    write_study(tmp_path / "nothing", STUDIES["fedavg-iid"])
    tex = prose(report(tmp_path, tmp_path / "report"))
    table = tex[tex.index("Against label skew, and controls") :]
    table = table[: table.index("bottomrule")]
    assert len(re.findall(r"squared loss &.*", table)) == 1
    assert "77.1" in table and "11.1" not in table
    rows = [row for row in table.split(r"\\") if " & " in row]
    assert len(rows) > 4 and len({row.count("&") for row in rows}) == 1, "every row has the header's columns"


def test_fine_tuning_is_not_asked_of_starts_heads_or_methods_where_a_study_has_all_of_them(tmp_path: Path) -> None:
    def accuracy(settings: Settings, seed: int) -> float:
        if settings["learning-rate"] == 0.0:
            return 50.0
        if settings["trainable"] == "head":
            return 99.0 + 0.1 * seed  # the best of all, so that whatever is chosen by validation would be this
        if settings["local-loss"] == "squared":
            return 98.0 + 0.1 * seed
        cost = 0.0 if settings["sharding"] == "iid" else 8.0 / int(settings["classes-per-client"])
        return 90.0 - cost * (1 + 0.01 * seed) - int(settings["local-steps"]) / 4 + 2.0 * (settings["density"] == 0.5)

    write_study(tmp_path / "cpu", MIXED, accuracy)
    settings = tmp_path / "cpu" / "settings.json"
    record = json.loads(settings.read_text())
    record["search"] = {"rates": [1e-5, 10.0], "rounds": [3, 20], "keep": 2, "seed": 0}
    record["arms"][2]["search"] = record["search"] | {"rates": [1e-6, 1.0], "keep": 1}
    settings.write_text(json.dumps(record))
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert "FedAvg on iid shards & 0.0316 & 89.00" in tex
    cost = tex[tex.index("data and local work}") : tex.index(r"\subsection{Masks}")]
    assert "raining at $N_c = 1$ (dense) is less accurate than on iid shards: $-8.08$" in tex
    assert "num-rounds" not in cost, "nothing but the mask tells the families apart"
    assert not re.search(r"9[89]\.\d\d|50\.00", cost)
    assert "2 rates from 1e-05 to 10, 3 then 20 rounds, the best 2 kept; 2 rates from 1e-06 to 1, 3" in tex.replace(
        "{-}", "-").replace("{,}", ",")  # fmt: skip
    for place, rounds in enumerate(([4, 20], [12, 30], [12, 40])):
        record["arms"][place]["search"] = {"rates": [1e-6, 1e-3, 1.0], "rounds": rounds, "keep": 2, "seed": 0}
    settings.write_text(json.dumps(record))
    many = prose(report(tmp_path, tmp_path / "report")).replace("{-}", "-").replace("{,}", ",")
    assert (
        "4 grids of 2 to 3 rates, from 1e-06 to 1e-05 up to 1 to 10, 3 to 12 then 20 to 40 rounds, the best 2" in many
    )
    skew = tex[tex.index("Against label skew, and controls") :]
    assert all(f"{name} &" in skew for name in ("ridge head", "head alone", "dense", "squared loss"))


@pytest.mark.parametrize(
    ("margin", "told"),
    [
        (
            1.0,
            r"Random \(\$N_c = 1\$, chosen on validation\) is more accurate than the next rule, least\{-\}sensitive: ",
        ),
        (0.1, r"The data cannot tell whether random \(.*\) is more or less accurate than the next rule, least"),
    ],
)
def test_a_rule_wins_only_beyond_the_noise_of_the_seeds(margin: float, told: str, tmp_path: Path) -> None:
    noise = {("random", 0): 0.3, ("random", 1): -0.3, ("least-sensitive", 2): 0.2}

    def accuracy(settings: Settings, seed: int) -> float:
        rule = str(settings["mask-rule"])
        return 90 + margin * (rule == "random") + noise.get((rule, seed), 0.0)

    write_studies(tmp_path, ["sparsity"], accuracy)
    tex = prose(report(tmp_path, tmp_path / "report"))
    assert re.search(told, tex)
    assert re.search(r"random & 0\.0316 & [^&]*& -- & reference", tex)


def even(settings: Settings, seed: int) -> float:
    """No arm is better than another."""
    return 90.0 + seed


def sentences_of(tex: str) -> list[str]:
    """What is printed of the abstract, sentence by sentence."""
    abstract = tex[tex.index(r"\begin{abstract}") + len(r"\begin{abstract}") : tex.index(r"\end{abstract}")]
    return [each for each in re.split(r"(?<=[.!?])\s+(?=[A-Z])", abstract.strip()) if each]


@pytest.mark.parametrize("results", ["committed", "made up", "undecided"])
def test_the_abstract_has_five_sentences_at_most_and_room_for_one(results: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "results" / "digits"
    if results != "committed":
        studies, accuracy = (["six-models"], plausible) if results == "made up" else (["participation"], even)
        root = write_studies(tmp_path / "studies", studies, accuracy)
    said = sentences_of(report(root, tmp_path / "report"))
    assert len(said) == 4
    assert all(each.endswith(".") for each in said)
    expected = {"undecided": "No difference that was asked for exceeds"}.get(
        results, "accurate than training all weights"
    )
    assert expected in said[-1]


@pytest.mark.parametrize(
    ("study", "chosen"),
    [
        ("centralized", ["alidation chooses constant, weight decay 0 at"]),
        ("sparsity", [r"least\{-\}sensitive \(\$N_c = 1\$, chosen on validation\) is less accurate than the next rule",
                      r"a mask of \$d = 0.1\$ \(chosen on validation\) is less accurate than all weights",
                      r"calibration in \$R = 4\$ \(chosen on validation\) is less accurate than \$R = 1\$"]),
        ("systems", [r"FedNova \(chosen on validation\) is more accurate than FedAvg: \$\+1\.01"]),
        ("strategies", [r"FedAdam \(\$N_c = 1\$, chosen on validation\) is more accurate than FedAvg: \$\+1\.01"]),
        ("extension", ["quared loss .* is more accurate than masked FedAvg, the best control on validation"]),
        ("fedavg-iid", [r"FedAvg on iid shards & 0\.0316 & 60\.00"]),
    ],
)  # fmt: skip
def test_the_best_is_chosen_on_validation_where_test_has_the_opposite_order(
    study: str, chosen: list[str], tmp_path: Path
) -> None:
    arms = [*STUDIES[study], *([("longer", DENSE | {"sharding": "iid", "local-steps": 8})] * (study == "fedavg-iid"))]
    order = [DEFAULTS | own for _, own in arms]
    write_study(tmp_path / study, arms, lambda settings, seed: 60 + order.index(dict(settings)) * (1 + 0.01 * seed),
                validation=lambda value: 100 - value)  # fmt: skip
    tex = prose(report(tmp_path, tmp_path / "report"))
    for words in chosen:
        assert re.search(words, tex, flags=re.IGNORECASE), words


def test_an_arm_that_is_not_tuned_stands_in_tables_alone(tmp_path: Path) -> None:
    """Without the untuned arms, each of which would be the best or the last, another arm is in every claim."""
    untuned = {
        "sparsity": ["random, Nc = 1", "density = 0.5", "R = 8"],
        "heterogeneity": ["Nc = 1, local-steps = 4", "Nc = 1, local-steps = 16"],
        "extension": ["Nc = 1 | squared loss"],
        "systems": ["fedavg"],
    }
    best = [DEFAULTS | dict(STUDIES[study])[label] for study in untuned for label in untuned[study]]
    for study, labels in untuned.items():
        write_study(tmp_path / study, STUDIES[study],
                    lambda settings, seed: 80 + 9 * (settings in best) + 0.1 * seed * (1 + (settings in best)),
                    untuned=labels)  # fmt: skip
    write_report(tmp_path, tmp_path / "report")
    numbers = prose((tmp_path / "report" / "numbers.tex").read_text())
    tables = prose("".join(path.read_text() for path in (tmp_path / "report" / "tables").glob("*.tex")))
    claimed = [text for text in numbers.split(r"\newcommand") if "reportParagraphs" not in text]
    names = ("andom ($N_c = 1$", "$d = 0.5$", "$R = 8$", "$J = 16$", "quared loss", "training at $N_c = 1$", "FedNova")
    for name in names:
        assert not any(name in text for text in claimed), name
    assert "at $N_c = 2$ ($J = 4$)" in numbers and "Too few of the learning rates are tuned" in numbers
    assert len(re.findall(r"\$\^\\dagger\$ & 89[^&]*& [^&]*& not tuned", tables)) > 4
    assert "squared loss & 80.10" in tables and r"89.20\,$\pm$\,0.20$^\dagger$" in tables


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
