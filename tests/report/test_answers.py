"""The answers of the report: each from the arms that its question is about, chosen on validation, within the noise."""

import json
import re
from pathlib import Path

import pytest
from report_studies import (
    CONDITIONS,
    DEFAULTS,
    DENSE,
    MIXED,
    STUDIES,
    Settings,
    plausible,
    write_studies,
    write_study,
)
from report_text import prose, report

from fl_taskarith.report.document import write_report

pytestmark = pytest.mark.usefixtures("no_tex")


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
