"""The report: results folders in; out come main.tex, the parts of it that follow from results, and, with TeX, a PDF."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fl_taskarith.config.rule import Scalar, to_toml
from fl_taskarith.config.settings import RECORDED_DEFAULTS
from fl_taskarith.config.toml import read_toml
from fl_taskarith.data.datasets import dataset_words
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.report.algorithm_questions import is_fine_tuning, is_method, label_skew, strategies
from fl_taskarith.report.contrasts import distinct, trained
from fl_taskarith.report.figure_files import Figure, figures_of
from fl_taskarith.report.floats import figure_floats, settings_float, table_floats
from fl_taskarith.report.generated import write_generated, write_product, write_unless_there
from fl_taskarith.report.latex import Latex, join, source, tabular
from fl_taskarith.report.mask_questions import sparsity, systems
from fl_taskarith.report.questions import centralized, fedavg_iid, heterogeneous, participation, six_models
from fl_taskarith.report.read_results import MeasuredArm, StudyFolder, read_studies
from fl_taskarith.report.typeset import find_tex, typeset
from fl_taskarith.report.wording import Section, Status, sentence
from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.study.shipped import origin_words

log = logging.getLogger("fl_taskarith")

MAIN, PDF = "main.tex", "main.pdf"
OWN_REFERENCES = """% Your own references, for main.tex to cite. This file is yours: fl-taskarith report wrote it once.
"""
PAGES = 8  # of text, without the references
TITLE = "Federated learning under the lens of task arithmetic"
STATED_KEYS = (
    "dataset", "model", "weights", "input-size", "trainable", "head", "num-clients", "participation", "num-rounds",
    "local-steps", "batch-size", "momentum", "weight-decay", "schedule", "density", "calibration-rounds", "soft-zero",
    "validation-size", "calibration-size",
)  # fmt: skip
MANY = 6  # values of a setting that are listed; of more, the least and the largest
LISTED_SEARCHES = 3  # of more only what they have in common is told


@dataclass(frozen=True)
class Author:
    """One author of authors.toml; affiliation and email may be empty."""

    name: str
    id: str
    affiliation: str = ""
    email: str = ""


def write_report(
    root: Path, output: Path, authors: Path | None = None, template: Path | None = None, shipped: bool = False
) -> list[Path]:
    """Write the report of the studies in `root` to the folder `output`; returns main.tex and, with a TeX, main.pdf.

    Generated, and anew each time: numbers.tex (prose and numbers as macros), tables/, figures/, references.bib. The
    user's: main.tex, which inputs those and has room for text, and own.bib; they are written where they are missing,
    and never again. A generated file that somebody changed since, or that was there before, is not overwritten: all
    such are named, and nothing is written. Generated figures and tables that are not of the results any more are
    removed, unless they were changed. A main.pdf of somebody else's making is renamed. No other file is touched.

    Args:
        root: the folder that holds one folder per study, or a study's own.
        authors: TOML with [[author]] tables (name, id; affiliation, email) and an optional title.
        template: a Jinja2 template of main.tex in place of the shipped template.tex, of the same variables. It replaces
            a main.tex that was not changed since it was written, and may hold the numbers themselves.
        shipped: whether `authors` may stand above runs that were shipped with the project; the text tells of them.

    Raises:
        CheckpointError: results are missing or damaged, or `output` cannot be written.
        ConfigError: `authors` or `template` is wrong; authors for shipped runs, and not `shipped`; or a file in
            `output` would be lost.
        ReportError: TeX fails on the result, which is kept.
    """
    if template is not None and template.resolve() == (output / MAIN).resolve():
        raise ConfigError(
            f"--template {template} is the {MAIN} that it would fill: give a copy of it, or leave it out."
        )
    studies = read_studies(root)
    title, people = (TITLE, []) if authors is None else read_authors(authors)
    if people and not shipped:
        _refuse_shipped(root, studies)
    default = shipped_file("report/template.tex")
    sections = answer(studies)
    figures = {section.name: figures_of(section.name, studies) for section in sections}
    variables = context(studies, sections, figures, title, people)
    main = render(template or default, variables).encode()
    generated = _generated(sections, figures, variables)
    write_generated(output, generated if template is None else generated | {MAIN: main})
    write_unless_there(output, MAIN, main)
    write_unless_there(output, "own.bib", OWN_REFERENCES.encode())
    tex = output / MAIN
    _warn_of_text(tex, variables)
    program = find_tex()
    if program is None:
        log.warning("No TeX is installed (latexmk, tectonic or pdflatex), so no PDF is made: %s is all.", tex)
        return [tex]
    made = typeset(tex, program, (template or default).resolve().parent)
    write_product(output, PDF, made.content)
    if made.text_pages is not None and made.text_pages > PAGES:
        log.warning("The text has %d pages, more than %d: take something out of %s.", made.text_pages, PAGES, tex)
    return [tex, output / PDF]


def _generated(
    sections: Sequence[Section], figures: Mapping[str, Sequence[Figure]], variables: Mapping[str, Any]
) -> dict[str, bytes]:
    """The generated files, by names relative to the report's folder."""
    files = {
        "numbers.tex": render(shipped_file("report/numbers.tex"), variables),
        "tables/settings.tex": settings_float(variables["settings"]),
    }
    for section in sections:
        files[f"tables/{section.name}.tex"] = table_floats(section)
        files[f"figures/{section.name}.tex"] = figure_floats(figures[section.name])
    contents = {name: text.encode() for name, text in files.items()}
    contents["references.bib"] = shipped_file("report/references.bib").read_bytes()
    for figure in (each for members in figures.values() for each in members):
        try:
            contents[f"figures/{figure.name}.pdf"] = figure.source.read_bytes()
        except OSError as error:
            raise CheckpointError(f"Cannot read the figure {figure.source}: {error.strerror}.") from error
    return contents


def _refuse_shipped(root: Path, studies: Sequence[StudyFolder]) -> None:
    runs = _finished(studies)
    number = sum(shipped for *_, shipped in runs)
    if number:
        raise ConfigError(
            f"{number} of the {len(runs)} finished runs in {root} were shipped with fl_taskarith and run by its "
            "authors, so a report of them is not --authors' own work. Leave --authors out; or run the studies yourself "
            "(study --results-dir FOLDER); or give --shipped-results, and the report says in its text whose they are."
        )


def _warn_of_text(tex: Path, variables: Mapping[str, Any]) -> None:
    """Of a main.tex that does not say what the results are, or has them from a time before."""
    try:
        text = tex.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"Cannot read {tex}: {error.strerror}.") from error
    if "{numbers}" not in text and "{numbers.tex}" not in text:
        log.warning(r"%s does not \input{numbers}: numbers in it stay those of the template it was filled from.", tex)
    if variables["origin"] and r"\reportOrigin" not in text and source(variables["origin"]) not in text:
        log.warning(r"%s does not say that runs were shipped with fl_taskarith: add \reportOrigin to its text.", tex)


def _finished(studies: Sequence[StudyFolder]) -> set[tuple[str, int, float, float, bool]]:
    """Finished runs, each with whether it was shipped; an arm that a study has in two tables counts once."""
    return {
        (arm.study, seed, test, arm.seconds.get(seed, 0.0), seed in arm.shipped)
        for study in studies for arm in study.arms for seed, test in arm.test.items()
    }  # fmt: skip


def answer(studies: Sequence[StudyFolder]) -> list[Section]:
    """The questions in the report's order; each from the study of its name, else from whatever arms there are.

    What is asked of fine-tuning is not answered from heads alone, or from methods against label skew, where there is
    anything else; and never from arms that do not train.
    """
    everything = [arm for study in studies for arm in study.arms]
    named = {study.name: list(study.arms) for study in studies}
    fine_tuned = [arm for arm in everything if is_fine_tuning(arm)]

    def arms(name: str) -> list[MeasuredArm]:
        return distinct([arm for arm in named.get(name) or fine_tuned or everything if trained(arm)])

    # One study's, for another's arms of the same names are other runs: the one with the most runs of methods.
    with_methods = max(studies, key=lambda study: sum(len(arm.test) for arm in study.arms if is_method(arm))).arms
    with_methods = with_methods if any(map(is_method, with_methods)) else ()
    unequal = [arm for arm in everything if arm.settings.get("local-steps-max")]
    return [
        centralized(arms("centralized")),
        fedavg_iid(arms("fedavg-iid"), everything),
        heterogeneous(arms("heterogeneity")),
        sparsity(arms("sparsity")),
        six_models(arms("six-models")),
        participation(arms("participation")),
        systems(distinct(named.get("systems") or unequal)),
        strategies(distinct(named.get("strategies") or ())),  # not from other studies' arms, which differ in more
        label_skew(distinct(named.get("extension") or with_methods)),
    ]


def context(
    studies: Sequence[StudyFolder],
    sections: Sequence[Section],
    figures: Mapping[str, Sequence[Figure]],
    title: str,
    authors: Sequence[Author],
) -> dict[str, Any]:
    """The template's variables; README.md describes them. Strings are escaped where they are inserted."""
    arms = [arm for study in studies for arm in study.arms]
    settings = [study.record["arms"] for study in studies if study.record]
    known = [arm["settings"] for each in settings for arm in each]
    datasets = list(dict.fromkeys(str(each["dataset"]) for each in known if "dataset" in each))

    runs = _finished(studies)

    def claims(status: Status) -> list[tuple[str, Latex]]:
        found: dict[str, list[Latex]] = {}
        for section in sections:
            for claim in section.claims:
                if claim.status is status:
                    found.setdefault(section.title, []).append(claim.open_question or claim.text)
        return [(title, join(texts, "; ")) for title, texts in found.items()]

    return {
        "title": title,
        "authors": list(authors),
        "datasets": join((dataset_words(name) for name in datasets), last=" and ") if datasets else None,
        "sections": [
            {
                "section": section,
                "file": Latex(section.name),
                "macro": Latex("".join(word.capitalize() for word in section.name.split("-"))),
                "answers": [sentence(Latex(claim.text + claim.detail)) for claim in section.claims],
                "figures": figures[section.name],
            }
            for section in sections
        ],
        "told": claims(Status.TOLD),
        "undecided": claims(Status.UNDECIDED),
        "not_run": claims(Status.NOT_RUN),
        "headlines": [(section.title, sentence(section.claims[0].text)) for section in sections if section.claims],
        "settings": settings_table(known) if known else None,
        "seeds": sorted({seed for study in studies for seed in study.record.get("seeds", [])}),
        "machines": list(dict.fromkeys(name for study in studies for name in study.record.get("machines", []))),
        "runs": len(runs),
        "duration": _duration(sum(seconds for *_, seconds, _ in runs)),
        "origin": origin_words(sum(shipped for *_, shipped in runs), len(runs)),
        "searches": _search_words([search for study in studies for search in _searches(study)]),
        "edges": list(dict.fromkeys(arm.label for arm in arms if arm.edge)),
    }


def settings_table(known: Sequence[Mapping[str, Scalar]]) -> Latex:
    """Main settings, and every other one that is not the default somewhere, with the values they take."""
    defaults = RECORDED_DEFAULTS
    keys = [key for key in defaults
            if key in STATED_KEYS or any(each.get(key, defaults[key]) != defaults[key] for each in known)]  # fmt: skip
    rows = []
    for key in keys:
        values = sorted({each[key] for each in known if key in each}, key=lambda value: (str(type(value)), value))
        shown = values if len(values) <= MANY else [values[0], "...", values[-1]]
        if shown:
            rows.append([key, join(_shown(value) for value in shown)])
    return tabular(["setting", "values in the studies"], rows, widest=1)


def render(template: Path, variables: Mapping[str, Any]) -> str:
    r"""The template with \VAR{...}, \BLOCK{...} and \#{...} as Jinja's delimiters; every string is escaped.

    Raises:
        ConfigError: it cannot be read, or is no such template; names the line.
    """
    environment = jinja2.Environment(
        block_start_string="\\BLOCK{",
        block_end_string="}",
        variable_start_string="\\VAR{",
        variable_end_string="}",
        comment_start_string="\\#{",
        comment_end_string="}",
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        finalize=source,
        keep_trailing_newline=True,
    )
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(variables)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the template {template}: {error}.") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The template {template} is wrong in line {error.lineno}: {error.message}.") from error
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"The template {template} cannot be filled: {error}. Known: {', '.join(variables)}."
        ) from error


def read_authors(path: Path) -> tuple[str, list[Author]]:
    """Title and authors of an authors.toml.

    Raises:
        ConfigError: it cannot be read, or lacks a name or id; names the place.
    """
    document = read_toml(path, "authors")
    tables = document.pop("author", [])
    title = document.pop("title", TITLE)
    if document:
        nearest = difflib.get_close_matches(next(iter(document)), ("author", "title"), n=1, cutoff=0.0)
        raise ConfigError(f'{path}: "{next(iter(document))}" is not a key; did you mean "{nearest[0]}"?')
    if not isinstance(title, str) or not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise ConfigError(f'{path}: expected title = "..." and tables that each begin with a line [[author]].')
    known = [field for field in Author.__dataclass_fields__]
    for index, table in enumerate(tables, start=1):
        for key, value in table.items():
            if key not in known or not isinstance(value, str):
                raise ConfigError(
                    f"{path}: author {index}: {key} = {value!r}: expected strings under {', '.join(known)}."
                )
        if not table.get("name") or not table.get("id"):
            raise ConfigError(f"{path}: author {index} needs a name and an id.")
    return title, [Author(**table) for table in tables]


def _shown(value: Scalar) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else to_toml(value)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _searches(study: StudyFolder) -> list[Mapping[str, Any]]:
    """The study's own search of learning rates, and those of arms that have one of their own."""
    return [each["search"] for each in (study.record, *study.record.get("arms", ())) if each.get("search")]


def _search_words(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each search that differs from the others or, of many, what they have in common."""
    words = list(dict.fromkeys(map(_search, searches)))
    if len(words) <= LISTED_SEARCHES:
        return words

    def span(values: Iterable[float]) -> str:
        found = sorted(set(values))
        return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

    rates = [search["rates"] for search in searches]
    rungs = " then ".join(
        span(search["rounds"][rung] for search in searches if len(search["rounds"]) > rung)
        for rung in range(max(len(search["rounds"]) for search in searches))
    )
    ends = f"from {span(each[0] for each in rates)} up to {span(each[-1] for each in rates)}"
    kept = span(search["keep"] for search in searches)
    return [f"{len(words)} grids of {span(map(len, rates))} rates, {ends}, {rungs} rounds, the best {kept} kept"]


def _search(search: Mapping[str, Any]) -> str:
    rates = search["rates"]
    rungs = " then ".join(str(rounds) for rounds in search["rounds"])
    return f"{len(rates)} rates from {rates[0]:g} to {rates[-1]:g}, {rungs} rounds, the best {search['keep']} kept"
