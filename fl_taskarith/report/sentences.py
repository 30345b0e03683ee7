"""Words from numbers: every sentence is a macro of sentences.tex, every table one of tables.tex.

A difference is told only where its interval excludes 0.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from fl_taskarith.errors import ConfigError
from fl_taskarith.figures.statistics import Paired
from fl_taskarith.report.contrasts import accuracy, difference, ended_early, gain, surviving_holm, validation, verdict
from fl_taskarith.report.latex import UNKNOWN, Latex, escape, interval, number, plain, spread
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.storage.paths import shipped_file

Status = Literal["told", "undecided", "not run"]


class Claim(NamedTuple):
    """One answer; `detail` is left out of the abstract, the conclusion lists `open_question` if nothing is told."""

    text: Latex
    status: Status
    detail: Latex = Latex()
    open_question: Latex = Latex()


class Table(NamedTuple):
    """A floating table; a `wide` one spans both columns."""

    caption: Latex
    body: Latex
    wide: bool = False


@dataclass
class Section:
    """The answer to a question of the report: claims first, then the paragraphs and tables they rest on."""

    name: str
    paragraphs: list[Latex] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The section's title."""
        return str(wording("SECTIONS")[self.name][0])

    @property
    def question(self) -> str:
        """The question that the section answers."""
        return str(wording("SECTIONS")[self.name][1])

    def say(self, macro: str, *values: object) -> None:
        """Add a paragraph."""
        self.paragraphs.append(say(macro, *values))

    def claim(self, subject: object, pairs: Paired, than: object) -> None:
        """Add "SUBJECT is more accurate than THAN: +1.39 [+0.19, +2.58] points (n = 3)", as far as the data tell."""
        text = say("claim", subject, pairs, than)
        if pairs.n and verdict(pairs) == "undecided":
            self.claims.append(Claim(text, "undecided", say("undecided", pairs), say("whether", subject, than)))
        else:
            self.claims.append(Claim(text, "told" if pairs.n else "not run"))

    def missing(self, key: str, place: object = "") -> None:
        """Say visibly that what `key` stands for in sentences.tex was not run."""
        self.claims.append(Claim(say("missing", key, place), "not run"))


def say(macro: str, *values: object) -> Latex:
    """Fill a macro of sentences.tex."""
    return Latex(" ".join(str(wording(macro)(*values)).split()))


def lay_out(macro: str, *values: object) -> Latex:
    """Fill a macro of tables.tex."""
    return Latex(getattr(_module("tables.tex"), macro)(*values).strip())


def wording(name: str) -> Any:
    """Return a macro or a table of words of sentences.tex."""
    return getattr(_module("sentences.tex"), name)


def render(template: Path, variables: Mapping[str, Any]) -> str:
    r"""Fill a template with \VAR{...}, \BLOCK{...} and \#{...} as Jinja's delimiters; every string is escaped.

    Raises:
        ConfigError: it cannot be read, or is no such template; names the line.
    """
    try:
        return _environment().from_string(template.read_text(encoding="utf-8")).render(variables)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the template {template}: {error}.") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The template {template} is wrong in line {error.lineno}: {error.message}.") from error
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"The template {template} cannot be filled: {error}. Known: {', '.join(variables)}."
        ) from error


def rate(arm: MeasuredArm) -> Latex:
    """Write the learning rate, marked where its search ended at an edge of the grid."""
    return UNKNOWN if arm.rate is None else Latex(plain(arm.rate) + Latex(r"$^\dagger$" if arm.edge else ""))


def tested(arm: MeasuredArm) -> Latex:
    """Write the test accuracy, mean ± sd; how its runs ended where none is done."""
    ended = ended_early(arm)
    return Latex(", ").join(ended) if ended and not arm.test else spread(accuracy(arm))


def sentence(text: str) -> Latex:
    """Write LaTeX with a capital and a full stop."""
    words = " ".join(text.split())
    return Latex(words[:1].upper() + words[1:] + ".")


def _lower_first(text: str) -> Latex:
    words = " ".join(text.split())
    return Latex(words[:1].lower() + words[1:])


def _join(items: Iterable[object], separator: str = ", ") -> Latex:
    return Latex(separator).join(items)  # type: ignore[arg-type]


FILTERS: dict[str, Callable[..., Any]] = {
    "difference": difference, "gain": gain, "validation": validation, "verdict": verdict,
    "surviving_holm": surviving_holm, "interval": interval, "number": number, "spread": spread, "rate": rate,
    "tested": tested, "sentence": sentence, "lower_first": _lower_first, "join": _join, "latex": Latex,
}  # fmt: skip


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        block_start_string="\\BLOCK{",
        block_end_string="}",
        variable_start_string="\\VAR{",
        variable_end_string="}",
        comment_start_string="\\#{",
        comment_end_string="}",
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,  # macros and blocks are markup, and everything else is LaTeX by then:
        finalize=escape,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        loader=jinja2.FileSystemLoader(shipped_file("report/sentences.tex").parent),
    )
    environment.filters |= FILTERS
    return environment


@functools.cache
def _module(name: str) -> Any:
    return _environment().get_template(name).module
