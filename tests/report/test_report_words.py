"""Escaping, comparisons and sentences of the report: what is said follows from the numbers."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from scipy import stats

from fl_taskarith.figures.statistics import Paired, paired
from fl_taskarith.report.conditions import IID, condition, load, setting, words
from fl_taskarith.report.contrasts import (
    best_by_validation,
    distinct,
    enough_rounds,
    find_families,
    first_reaching,
    ranked_by_validation,
    surviving_holm,
    twin,
    verdict,
)
from fl_taskarith.report.document import _headlines
from fl_taskarith.report.latex import Latex, escape, number
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.sentences import Compared, Section, lay_out, say, sentence

ESCAPED = re.compile(  # what TeX may see of a user's text: letters, escaped signs, and our own commands and groups
    r"(?:[^\\{}$&#%_~^<>|\"`]|\\[{}$&#%_]|\\text[a-z]+\{\}|\\ldots\{\}|\\ensuremath\{(?:\\[A-Za-z]+|-|_0)\}|\{[-,']\})*"
)


def arm(tests: dict[int, float], label: str = "arm", **settings: object) -> MeasuredArm:
    kebab = {key.replace("_", "-"): value for key, value in settings.items()}
    return MeasuredArm(label, kebab, 0.1, False, tests)  # type: ignore[arg-type]


def pair(values: list[float]) -> Paired:
    return paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


@given(st.text())
def test_whatever_is_inserted_is_inert(text: str) -> None:
    escaped = escape(text)
    assert ESCAPED.fullmatch(escaped)
    assert "\n\n" not in escaped, "an empty line would end a paragraph"
    assert not re.search(r"--|,,|''|\?`|!`", escaped), "two signs would be set as one"


@given(st.text(alphabet=st.characters(codec="ascii", categories=["L", "N"])))
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert escape(text) == text


def test_escaping_by_hand() -> None:
    assert escape("50 % of a_b & {c} \\d") == r"50 \% of a\_b \& \{c\} \textbackslash{}d"
    assert escape("Fanì, Jégou") == "Fanì{,} Jégou"
    assert escape("‖τ‖ ± 1") == r"\ensuremath{\Vert}\ensuremath{\tau}\ensuremath{\Vert} \ensuremath{\pm} 1"
    assert escape("名") == "[U+540D]", "visible, for the fonts lack it"


def test_words_escape_what_they_are_filled_with_once_and_want_all_of_it() -> None:
    assert say("at", "a_b", Latex("$x$")) == r"a\_b ($x$)"
    assert say("at", say("at", "{}", ""), "") == r"\{\}"
    with pytest.raises(UndefinedError, match="place"):
        say("at", "a_b")
    assert say("enumeration", ["a_b", Latex("$c$"), "d"]) == r"a\_b, $c$ and d"
    assert Latex(", ").join(["a_b", Latex("$c$")]) == r"a\_b, $c$"


def test_numbers_by_hand() -> None:
    assert number(98.70370) == "98.70"
    assert number(-0.001, sign=True) == "$+0.00$", "no -0.00"
    assert number(math.nan) == "--"
    assert say("spread", {0: 1.0, 1: 2.0, 2: 3.0}) == r"2.00\,$\pm$\,1.00"
    assert say("spread", {0: 2.0}) == "2.00", "one seed has no spread"
    assert say("spread", {}) == r"\notrun{}"
    assert say("interval", pair([1.0, 3.0, 2.0])) == "$+2.00$ [$-0.48$,~$+4.48$]"
    assert lay_out("settings", [["x_y", [1, 2]]]).count(r"\\") == 2


@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 3)), min_size=3, max_size=6))
def test_a_difference_is_told_exactly_where_scipys_interval_excludes_zero(values: list[float]) -> None:
    pairs = pair(values)
    if np.std(values) < 1e-6:
        assert verdict(pairs) == "undecided"
        assert pairs.p == 1.0
        return
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    if min(abs(low), abs(high)) > 1e-9:
        assert verdict(pairs) == ("higher" if low > 0 else "lower" if high < 0 else "undecided")
    assert pairs.p == pytest.approx(test.pvalue, abs=1e-12)


@given(st.lists(st.lists(st.floats(-3, 9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_holm_against_its_adjusted_p_values(samples: list[list[float]]) -> None:
    pairs = [pair(sample) for sample in samples]
    ordered = sorted(each.p for each in pairs)
    adjusted = [max((len(ordered) - i) * ordered[i] for i in range(rank + 1)) for rank in range(len(ordered))]
    assert surviving_holm(pairs) == sum(value <= 0.05 for value in adjusted)


@pytest.mark.parametrize(
    ("values", "expected", "status"),
    [
        ([2.0, 2.1, 1.9], r"A is more accurate than B: $+2.00$ [$+1.75$,~$+2.25$] points (n~=~3)", "told"),
        ([-2.0, -2.1, -1.9], r"A is less accurate than B: $-2.00$ [$-2.25$,~$-1.75$] points (n~=~3)", "told"),
        ([2.0, -2.1, 1.9], "the data cannot tell whether A is more or less accurate than B", "undecided"),
        ([0.56, 0.56, 0.56], "more or less accurate than B: all 3 seeds $+0.56$ points", "undecided"),
        ([2.0, 2.1], r"B: $+2.05$ ($+2.00$, $+2.10$) points (n~=~2)", "undecided"),
        ([2.0], r"cannot tell whether A is more or less accurate than B: $+2.00$ points (n~=~1)", "undecided"),
        ([], r"\notrun{}", "not run"),
    ],
)
def test_claims_are_worded_by_the_interval(values: list[float], expected: str, status: str) -> None:
    section = Section("name", "title", "question")
    section.claim("A", pair(values), "B")
    made = section.claims[0]
    assert expected in made.text
    assert made.status == status
    if values == [0.56, 0.56, 0.56]:
        assert "[" not in made.text and not made.detail, "an interval of no width is none"
    if len(values) == 1:
        assert "one seed has no interval" in made.detail
    if len(values) == 2:
        assert "two seeds have no interval" in made.detail


def test_two_seeds_are_told_in_their_section_but_not_in_the_abstract() -> None:
    images = np.random.default_rng(0).random(2000)
    better, worse = (np.stack([images < share] * 3).astype(float) for share in (0.6, 0.5))
    section = Section("strategies", "title", "question")
    for seeds in (2, 3):
        values = [dict(enumerate(100 * each[:seeds].mean(1))) for each in (better, worse)]
        correct = [dict(enumerate(each[:seeds])) for each in (better, worse)]
        section.claim(f"of {seeds}", paired(*values, *correct), "the other")
    assert [claim.status for claim in section.claims] == ["told", "told"]
    assert [text for _, text in _headlines([section])] == [section.claims[1].text]


def test_a_table_has_the_verdict_on_every_difference_and_its_sentence_counts_them() -> None:
    samples = {"a": [1.0, 1.1, 0.9], "b": [-1.0, -1.1, -0.9], "c": [1.0, -1.0, 0.2], "d": [], "e": [0.56] * 3}
    reference = arm(dict.fromkeys(range(3), 50.0), "R")
    arms = {name: arm({seed: 50.0 + value for seed, value in enumerate(values)}) for name, values in samples.items()}
    arms["f"] = dataclasses.replace(arms["a"], edge=True)
    rows = [(Latex(name), each) for name, each in {"R": reference, **arms}.items()]
    section = Section("name", "title", "question")
    assert section.compare("density", [Compared(Latex("place"), rows, reference)]) == "tab:name-1"
    body = dict(re.findall(r"^(\w) & (.*) \\\\$", section.tables[0].body, flags=re.MULTILINE))
    assert body["R"] == r"0.1 & 50.00\,$\pm$\,0.00 & -- & reference"
    assert {name: row.rpartition(" & ")[2] for name, row in body.items() if name != "R"} == {
        "a": "higher", "b": "lower", "c": "undecided", "d": "not run", "e": "undecided", "f": "not tuned"
    }  # fmt: skip
    assert "& all 3 seeds $+0.56$ &" in body["e"] and body["f"].startswith(r"0.1$^\dagger$ & 51.00")
    assert section.paragraphs == [
        r"Table~\ref{tab:name-1} compares densities: 2 of 4 intervals exclude 0, and 2 do when all are judged together "
        "(Holm)."
    ]
    assert sentence(Latex("the data")) == "The data."


def test_where_the_reference_is_not_tuned_no_arm_has_a_verdict() -> None:
    reference = dataclasses.replace(arm({0: 50.0, 1: 51.0}), edge=True)
    other = arm({0: 60.0, 1: 61.1})
    group = Compared(Latex(), [(Latex("R"), reference), (Latex("a"), other)], reference)
    assert [group.verdict(each) for _, each in group.rows] == ["not tuned", ""]
    assert group.judged() == []


def test_an_arm_whose_seeds_diverged_is_chosen_only_where_no_other_is_whole() -> None:
    survivor = MeasuredArm("survivor", {}, test={0: 99.0}, val={0: 99.0},
                           states={0: "done", 1: "diverged", 2: "diverged"})  # fmt: skip
    whole = MeasuredArm("whole", {}, test={0: 90.0, 1: 90.0}, val={0: 90.0, 1: 90.0},
                        states={0: "done", 1: "done"})  # fmt: skip
    better = MeasuredArm("better", {}, test={0: 80.0}, val={0: 91.0}, states={0: "done"})
    assert best_by_validation([survivor, whole, better]) is better
    assert best_by_validation([survivor]) is survivor
    untuned = MeasuredArm("untuned", {}, edge=True, test={0: 99.0}, val={0: 99.0}, states={0: "done"})
    assert ranked_by_validation([survivor, untuned, whole, better]) == [better, whole, untuned, survivor]
    assert best_by_validation([]) is None


def test_families_differ_in_one_setting_alone() -> None:
    arms = [arm({}, local_steps=steps, num_rounds=16 // steps, sharding=sharding, classes_per_client=2, seed=steps)
            for steps in (4, 8) for sharding in ("iid", "classes")]  # fmt: skip
    assert not find_families(arms, "local-steps"), "the number of rounds differs too"
    found = find_families(arms, "local-steps", also=("num-rounds",))
    assert [list(family.members) for family in found] == [[4, 8], [4, 8]]
    assert {family.common["sharding"] for family in found} == {"iid", "classes"}
    masked = arm({}, mask_rule="random", density=0.1, sharding="iid")
    dense = arm({}, mask_rule="none", density=0.5, sharding="iid")
    assert twin(masked, [masked, dense], {"mask-rule": "none"}, also=("density",)) is dense
    assert twin(masked, [masked, dense], {"mask-rule": "none"}) is None


def test_conditions_are_ordered_by_heterogeneity() -> None:
    places = [condition({"sharding": "classes", "classes-per-client": n}) for n in (1, 10, 5)]
    places += [condition({"sharding": "dirichlet", "dirichlet-alpha": alpha}) for alpha in (0.1, 1.0)]
    places += [condition({"sharding": "iid", "classes-per-client": 2}), condition({"strategy": "centralized"})]
    named = [words("condition", place) for place in sorted(places)]
    assert named == ["centralized", "iid", r"$\alpha = 1$", r"$\alpha = 0.1$", "$N_c = 10$", "$N_c = 5$", "$N_c = 1$"]
    assert condition({}) < IID


def test_settings_that_say_one_thing_together() -> None:
    drawn = {"local-steps-min": 1, "local-steps-max": 7, "dropout": 0.2}
    assert setting({"local-steps-min": 0, "local-steps-max": 0}, "load") == "equal J"
    assert setting(drawn, "load") == "J from 1 to 7, dropout 0.2"
    assert words("load", "J from 1 to 7") == "$J$ from 1 to 7"
    assert load({}) is None
    assert words("algorithm", ("fedprox", 0.1)) == r"FedProx with $\mu = 0.1$"
    arms = [arm({seed: 1.0 for seed in range(3)}, strategy=name, proximal_mu=mu)
            for name, mu in (("fedprox", 1.0), ("fedavg", 0.0), ("fedprox", 0.1))]  # fmt: skip
    assert list(find_families(arms, "algorithm")[0].members) == [("fedavg", 0.0), ("fedprox", 0.1), ("fedprox", 1.0)]
    assert len(distinct([*arms, arms[0]])) == 3


def test_enough_epochs_by_hand() -> None:
    curves = {seed: {0: 99.0, 1: 80.0 + seed, 2: 89.5 + seed, 3: 90.0 + seed, 4: 89.9 + seed} for seed in (0, 1)}
    measured = MeasuredArm("a", {}, curves={"val_percent": curves, "test_percent": curves})
    enough = enough_rounds(measured)
    assert enough is not None
    # Means 80.5, 90.0, 90.5, 90.4; the best is 90.5 with standard error (1/√2)/√2 = 0.5: epoch 2 reaches 90.0.
    assert (enough.round, enough.last, enough.val) == (2, 4, 90.0)
    assert enough.lost.mean == pytest.approx(0.4)
    one_seed = MeasuredArm("a", {}, curves={"val_percent": {0: curves[0]}, "test_percent": {0: curves[0]}})
    assert enough_rounds(one_seed) is None, "one seed has no standard error"


def test_the_first_round_that_gets_to_an_accuracy_is_that_of_the_mean_over_seeds() -> None:
    curves = {0: {0: 99.0, 2: 80.0, 4: 90.0}, 1: {0: 99.0, 2: 90.0, 3: 99.0, 4: 92.0}}
    sent = {0: {0: 1.0, 2: 2.0, 4: 3.0}, 1: {0: 1.0, 2: 4.0, 4: 7.0}}
    measured = MeasuredArm("arm", {}, curves={"val_percent": curves, "uplink_megabytes": sent})
    assert first_reaching(measured, 85.0) == (2, 3.0)
    assert first_reaching(measured, 85.0 + 1e-6) == (4, 5.0)
    assert first_reaching(measured, 91.1) is None, "round 0 is untrained, and seed 0 has no round 3"
    reached = first_reaching(MeasuredArm("arm", {}, curves={"val_percent": curves}), 85.0)
    assert reached is not None
    assert reached.round == 2
    assert math.isnan(reached.megabytes)


@pytest.mark.parametrize(("p", "survive"), [([0.04, 0.01, 0.02], 3), ([0.06, 0.01, 0.02], 2), ([0.03, 0.01, 0.03], 1)])
def test_holm_keeps_what_bonferroni_would_not(p: list[float], survive: int) -> None:
    """Of p = 0.01, 0.02, 0.04 all are at most 0.05/3, 0.05/2, 0.05; only the first is at most 0.05/3."""
    assert surviving_holm([Paired(1.0, 1.0, 3, p=each) for each in p]) == survive


def test_runs_that_ended_below_the_head_are_named_with_their_seeds() -> None:
    lost = dataclasses.replace(arm({0: 94.0, (1, 0): 95.0, 2: 97.0}, "A & B"), ridge={0: 95.8, (1, 0): 95.8, 2: 95.8})
    kept = dataclasses.replace(arm({0: 96.0}, "kept"), ridge={0: 95.8})
    section = Section("strategies", "", "")
    section.name_lost([(Latex("iid"), lost.label, lost), (Latex(), kept.label, kept)])
    (text,) = section.paragraphs
    assert text.endswith(r"began with: iid, A \& B (seed 0 and seed 0{,} shard seed 1).")
    section.name_lost([(Latex(), kept.label, kept)])
    assert section.paragraphs == [text]


def test_the_detectable_difference_of_an_undecided_claim_is_scipys() -> None:
    values, section = [2.0, -2.1, 1.9], Section("name", "title", "question")
    section.claim("A", paired(dict(enumerate(values)), dict.fromkeys(range(3), 0.0)), "B")
    expected = stats.sem(values) * (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2))
    assert f"a true difference of {expected:.2f} would be found" in section.claims[0].detail
