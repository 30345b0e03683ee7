"""The report: results folders in, report.tex with its figures and references out, and a PDF where there is a TeX."""

import difflib
import logging
import shutil
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fl_taskarith.config import Config
from fl_taskarith.config_rule import Scalar, to_toml
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.files import write_atomically
from fl_taskarith.paths import shipped_file
from fl_taskarith.report.algorithm_questions import is_fine_tuning, is_method, label_skew, strategies
from fl_taskarith.report.comparisons import distinct, trained
from fl_taskarith.report.figures import Figure, figures_of
from fl_taskarith.report.latex import Latex, join, source, tabular
from fl_taskarith.report.mask_questions import sparsity, systems
from fl_taskarith.report.questions import centralized, fedavg_iid, heterogeneous, participation, six_models
from fl_taskarith.report.results import MeasuredArm, StudyFolder, read_studies
from fl_taskarith.report.typeset import find_tex, typeset
from fl_taskarith.report.wording import Section, Status, sentence

log = logging.getLogger("fl_taskarith")

PAGES = 8  # of text, without the references
TITLE = "Federated learning under the lens of task arithmetic"
DATASETS = {"cifar100": "CIFAR-100", "digits": "handwritten digits"}
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


def write_report(root: Path, output: Path, authors: Path | None = None, template: Path | None = None) -> list[Path]:
    """Write the report of the studies in `root` to the folder `output`; returns report.tex and, with a TeX, report.pdf.

    Args:
        root: the folder that holds one folder per study, or a study's own.
        authors: TOML with [[author]] tables (name, id; affiliation, email) and an optional title.
        template: a Jinja2 template of LaTeX in place of the shipped template.tex, of the same variables.

    Raises:
        CheckpointError: results are missing or damaged, or `output` cannot be written.
        ConfigError: `authors` or `template` is wrong.
        ReportError: TeX fails on the result, which is kept.
    """
    studies = read_studies(root)
    title, people = (TITLE, []) if authors is None else read_authors(authors)
    shipped = shipped_file("report/template.tex")
    sections = answer(studies)
    figures = {section.name: figures_of(section.name, studies) for section in sections}
    text = render(template or shipped, context(studies, sections, figures, title, people))
    try:
        shutil.rmtree(output / "figures", ignore_errors=True)
        (output / "figures").mkdir(parents=True)
        for figure in (each for members in figures.values() for each in members):
            shutil.copyfile(figure.source, output / "figures" / f"{figure.name}.pdf")
    except OSError as error:
        raise CheckpointError(f"Cannot write to {output}: {error.strerror or error}.") from error
    write_atomically(output / "references.bib", shipped_file("report/references.bib").read_bytes())
    tex = output / "report.tex"
    write_atomically(tex, text)
    (output / "report.pdf").unlink(missing_ok=True)  # an older one would not be of this source
    program = find_tex()
    if program is None:
        log.warning("No TeX is installed (latexmk, tectonic or pdflatex), so there is no PDF: %s is all.", tex)
        return [tex]
    made = typeset(tex, program, (template or shipped).resolve().parent)
    if made.text_pages is not None and made.text_pages > PAGES:
        log.warning("The text has %d pages, more than %d: give a template with less in it.", made.text_pages, PAGES)
    return [tex, made.path]


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

    # An arm that stands in two tables of a study has its runs once.
    runs = {(arm.study, seed, test, arm.seconds.get(seed, 0.0)) for arm in arms for seed, test in arm.test.items()}

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
        "datasets": join((DATASETS.get(name, name) for name in datasets), last=" and ") if datasets else None,
        "sections": [
            {
                "section": section,
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
        "duration": _duration(sum(seconds for *_, seconds in runs)),
        "searches": _search_words([search for study in studies for search in _searches(study)]),
        "edges": list(dict.fromkeys(arm.label for arm in arms if arm.edge)),
    }


def settings_table(known: Sequence[Mapping[str, Scalar]]) -> Latex:
    """Main settings, and every other one that is not the default somewhere, with the values they take."""
    defaults = Config().to_run_config()
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
    try:
        document = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ConfigError(f"Cannot read the authors {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
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
