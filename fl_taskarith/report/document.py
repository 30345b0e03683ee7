"""The report: results folders in; out come main.tex, the parts of it that follow from results, and, with TeX, a PDF."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import RECORDED_DEFAULTS
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.setting_words import solved_head_words
from fl_taskarith.report import label_skew, questions
from fl_taskarith.report.authors import TITLE, Author, read_authors
from fl_taskarith.report.contrasts import Arms, distinct
from fl_taskarith.report.figure_files import Figure, figures_of
from fl_taskarith.report.generated import write_generated, write_product, write_unless_there
from fl_taskarith.report.latex import Latex, escape
from fl_taskarith.report.primary import primary
from fl_taskarith.report.read_results import StudyFolder, read_studies
from fl_taskarith.report.sentences import Section, Status, compiled_template, lay_out, render, say, sentence, wording
from fl_taskarith.report.typeset import find_tex, typeset
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.study.shipped import origin_words

log = logging.getLogger("fl_taskarith")

MAIN, PDF = "main.tex", "main.pdf"
OWN_REFERENCES = """% Your own references, for main.tex to cite. This file is yours: fl-taskarith report wrote it once.
"""
PAGES = 8  # of text, without the references
STATED_KEYS = (
    "dataset", "model", "weights", "input-size", "trainable", "head", "num-clients", "participation", "num-rounds",
    "local-steps", "batch-size", "momentum", "weight-decay", "schedule", "density", "calibration-rounds", "soft-zero",
    "validation-size", "calibration-size",
)  # fmt: skip
MANY = 6  # values of a setting that are listed; of more, the least and the largest
LISTED_SEARCHES = 3  # of more, only what they have in common is described


def write_report(
    root: Path, output: Path, authors: Path | None = None, template: Path | None = None, shipped: bool = False
) -> list[Path]:
    """Write the report of the studies in `root` to the folder `output`; return main.tex and, with a TeX, main.pdf.

    Generated, and rebuilt each time: numbers.tex (prose and numbers as macros), tables/, figures/, references.bib. The
    user's: main.tex, which inputs those and has room for text, and own.bib; they are written where they are missing,
    and never again. A generated file that somebody changed since, or that was there before, is not overwritten: all
    such are named, and nothing is written. Generated figures and tables that are not of the results any more are
    removed, unless they were changed. A main.pdf that somebody else made is renamed. No other file is touched.

    Args:
        root: the folder that holds one folder per study, or a study's own.
        authors: TOML with [[author]] tables (name, id; affiliation, email) and an optional title.
        template: a Jinja2 template of main.tex in place of the shipped template.tex, of the same variables. It replaces
            a main.tex that was not changed since it was written, and may hold the numbers themselves.
        shipped: whether `authors` may stand above runs that were shipped with the project; the text then says so.

    Raises:
        CheckpointError: results are missing or damaged, or `output` cannot be written.
        ConfigError: `authors` or `template` is wrong; authors for shipped runs, and not `shipped`; or a file in
            `output` would be lost.
        ReportError: TeX fails on the result, which is kept.
    """
    tex = output / MAIN
    if template is not None and template.resolve() == tex.resolve():
        raise ConfigError(
            f"--template {template} is the {MAIN} that it would fill: give a copy of it, or leave it out."
        )
    title, people = (TITLE, []) if authors is None else read_authors(authors)
    filled = template or shipped_file("report/template.tex")
    compiled_template(filled)
    studies = read_studies(root)
    if people and not shipped:
        _refuse_shipped(root, studies)
    sections = answer(studies)
    figures = {section.name: figures_of(section.name, root, studies) for section in sections}
    variables = context(studies, sections, figures, title, people)
    main = render(filled, variables).encode()
    write_generated(output, _generated(sections, figures, variables) | ({} if template is None else {MAIN: main}))
    write_unless_there(output, MAIN, main)
    write_unless_there(output, "own.bib", OWN_REFERENCES.encode())
    _warn_of_text(tex, variables)
    program = find_tex()
    if program is None:
        log.warning("No TeX is installed (latexmk, tectonic or pdflatex), so no PDF is made: %s is all.", tex)
        return [tex]
    result = typeset(tex, program, filled.resolve().parent)
    write_product(output, PDF, result.content)
    if result.text_pages is not None and result.text_pages > PAGES:
        log.warning("The text has %d pages, more than %d: take something out of %s.", result.text_pages, PAGES, tex)
    return [tex, output / PDF]


def _generated(
    sections: Sequence[Section], figures: Mapping[str, Sequence[Figure]], variables: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return the generated files, by names relative to the report's folder."""
    floats = {"tables/settings": lay_out("settings_float", variables["settings"])}
    for section in sections:
        floats[f"tables/{section.name}"] = lay_out("table_floats", section)
        floats[f"figures/{section.name}"] = lay_out("figure_floats", figures[section.name])
    contents = {f"{name}.tex": f"{text}\n".encode() for name, text in floats.items()}
    contents["numbers.tex"] = render(shipped_file("report/numbers.tex"), variables).encode()
    contents["references.bib"] = shipped_file("report/references.bib").read_bytes()
    return contents | {f"figures/{figure.name}.pdf": figure.pdf for each in figures.values() for figure in each}


def _refuse_shipped(root: Path, studies: Sequence[StudyFolder]) -> None:
    runs = [run for study in studies for run in study.finished]
    number = sum(run.shipped for run in runs)
    if number:
        raise ConfigError(
            f"{number} of the {len(runs)} finished runs in {root} were shipped with fl_taskarith and run by its "
            "authors, so a report of them is not --authors' own work. Leave --authors out; or run the studies yourself "
            "(study --results-dir FOLDER); or give --shipped-results, and the report says in its text whose they are."
        )


def _warn_of_text(tex: Path, variables: Mapping[str, Any]) -> None:
    """Warn about a main.tex that does not say what the results are, or has them from a time before."""
    try:
        text = tex.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"Cannot read {tex}: {error.strerror}.") from error
    if "{numbers}" not in text and "{numbers.tex}" not in text:
        log.warning(r"%s does not \input{numbers}: numbers in it stay those of the template it was filled from.", tex)
    if variables["origin"] and r"\reportOrigin" not in text and escape(variables["origin"]) not in text:
        log.warning(r"%s does not say that runs were shipped with fl_taskarith: add \reportOrigin to its text.", tex)


def answer(studies: Sequence[StudyFolder]) -> list[Section]:
    """Answer the questions in the report's order; each from the study of its name, else from whatever arms there are.

    What is asked of fine-tuning is not answered from heads alone, or from methods against label skew, where there is
    anything else; and never from arms that do not train.
    """
    everything = [arm for study in studies for arm in study.arms]
    fine_tuned = [arm for arm in everything if label_skew.is_fine_tuning(arm)] or everything
    answers: dict[str, Callable[[Section, Arms], None]] = {
        "centralized": questions.centralized,
        "fedavg-iid": partial(questions.fedavg_iid, everything=everything),
        "heterogeneity": questions.heterogeneity,
        "sparsity": questions.sparsity,
        "six-models": questions.six_models,
        "participation": questions.participation,
        "systems": questions.systems,
        "strategies": label_skew.strategies,
        "extension": label_skew.label_skew,
    }
    # One study's, for another's arms of the same names are other runs: the one with the most runs of methods.
    methods = [[arm for arm in study.arms if label_skew.is_method(arm)] for study in studies]
    most = max(range(len(studies)), key=lambda index: sum(len(arm.test) for arm in methods[index]))
    others = {
        "systems": [arm for arm in everything if arm.settings["local-steps-max"]],
        "strategies": [],  # not from other studies' arms, which differ in more
        "extension": studies[most].arms if methods[most] else [],
    }
    named = {study.name: study.arms for study in studies}
    named_before = Section("primary", *wording("SECTIONS")["primary"])
    primary(named_before, studies)
    sections = [Section(name, *wording("SECTIONS")[name]) for name in answers]
    for section, question in zip(sections, answers.values(), strict=True):
        arms = named.get(section.name) or others.get(section.name, fine_tuned)
        question(section, distinct([arm for arm in arms if section.name in others or arm.trained]))
    return [*([named_before] if named_before.tables else []), *sections]


def context(
    studies: Sequence[StudyFolder],
    sections: Sequence[Section],
    figures: Mapping[str, Sequence[Figure]],
    title: str,
    authors: Sequence[Author],
) -> dict[str, Any]:
    """Return the template's variables; README.md describes them. Strings are escaped where they are inserted."""
    from fl_taskarith.data.datasets import dataset_words  # imports torch, which the command line does without

    records = [study.record for study in studies]
    settings = [arm["settings"] for record in records for arm in record["arms"]]
    datasets = dict.fromkeys(str(each["dataset"]) for each in settings)
    runs = [run for study in studies for run in study.finished]
    searches = [each["search"] for record in records for each in (record, *record["arms"]) if each.get("search")]

    def claims(status: Status) -> list[tuple[str, Latex]]:
        texts = {section.title: [say("listed", each) for each in section.claims if each.status == status]
                 for section in sections}  # fmt: skip
        return [(title, Latex("; ").join(members)) for title, members in texts.items() if members]

    return {
        "title": title,
        "authors": list(authors),
        "datasets": say("enumeration", [dataset_words(name) for name in datasets]),
        "sections": [
            {
                "section": section,
                "file": Latex(section.name),
                "macro": Latex("".join(word.capitalize() for word in section.name.split("-"))),
                "answers": [sentence(each.text + each.detail) for each in section.claims if each.status != "not run"],
                "missing": [sentence(each.text) for each in section.claims if each.status == "not run"],
                "figures": figures[section.name],
                "evidence": _evidence(section, figures[section.name]),
            }
            for section in sections
        ],
        "told": claims("told"),
        "undecided": claims("undecided"),
        "not_run": claims("not run"),
        "headlines": _headlines(sections),
        "answered": {status: sum(section.status == status for section in sections) for status in get_args(Status)},
        "settings": settings_table(settings),
        "seeds": sorted({seed for record in records for seed in record["seeds"]}),
        "shard_seeds": sorted({seed for record in records for seed in record.get("shard_seeds", ())}),
        "criteria": sorted({search.get("by", "accuracy") for search in searches}) or ["accuracy"],
        "heads": sorted({solved_head_words([each]) for each in settings} - {"ridge head"}),
        "over": {"images" if arm.correct else "seeds" for study in studies for arm in study.arms if arm.test},
        "machines": list(dict.fromkeys(name for record in records for name in record["machines"])),
        "runs": len(runs),
        "duration": say("duration", sum(run.seconds for run in runs)),
        "origin": origin_words(sum(run.shipped for run in runs), len(runs)),
        "searches": _search_words(searches),
        "edges": list(dict.fromkeys(arm.label for study in studies for arm in study.arms if arm.edge)),
    }  # fmt: skip


def _headlines(sections: Sequence[Section]) -> list[tuple[str, Latex]]:
    """Return the titles and texts of the few findings that the abstract has room for."""
    order = {name: place for place, name in enumerate(wording("HEADLINE_ORDER"))}
    ordered = sorted(sections, key=lambda section: order[section.name])
    told = [(section.title, claim.text) for section in ordered for claim in section.claims
            if claim.status == "told" and claim.headline]  # fmt: skip
    first = {title: text for title, text in reversed(told)}  # of each section
    return [(title, first[title]) for title in dict.fromkeys(title for title, _ in told)][: wording("HEADLINES")]


def _evidence(section: Section, figures: Sequence[Figure]) -> Latex:
    """Refer to the figures of a section or, where it has none, to its first table."""
    tables = [say("table_label", section.name, number) for number in range(1, len(section.tables) + 1)]
    return say("evidence", [Latex(f"fig:{figure.name}") for figure in figures], tables)


def settings_table(settings: Sequence[Mapping[str, Scalar]]) -> Latex:
    """Lay out the main settings, and every other one that is not the default somewhere, with the values they take."""
    rows = {}
    for key, default in RECORDED_DEFAULTS.items():
        values = sorted({each[key] for each in settings if key in each}, key=lambda value: (str(type(value)), value))
        if values and (key in STATED_KEYS or values != [default]):
            rows[key] = values if len(values) <= MANY else [values[0], "...", values[-1]]
    return lay_out("settings", rows.items())


def _search_words(searches: Sequence[Mapping[str, Any]]) -> list[Latex]:
    """Describe each search of learning rates that differs from the others or, of many, what they have in common."""
    words = list(dict.fromkeys(say("search", search) for search in searches))
    if len(words) <= LISTED_SEARCHES:
        return words
    rungs = itertools.zip_longest(*(search["rounds"] for search in searches))
    spans = [[rounds for rounds in rung if rounds is not None] for rung in rungs]
    return [say("searches", len(words), searches, spans)]
