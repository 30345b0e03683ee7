"""Words from numbers: every sentence is a macro of sentences.tex, every table one of tables.tex.

A difference is stated only where its interval excludes 0.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fl_taskarith.config.toml import read_text
from fl_taskarith.errors import ConfigError
from fl_taskarith.figures.statistics import Paired, summarise
from fl_taskarith.report.contrasts import difference, gain, surviving_holm, verdict
from fl_taskarith.report.latex import Latex, escape, number, plain
from fl_taskarith.storage.paths import shipped_file

Status = Literal["told", "undecided", "not run"]


class Claim(NamedTuple):
    """One answer; `detail` is left out of the abstract, the conclusion lists `open_question` where it is undecided."""

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
    title: str
    question: str
    paragraphs: list[Latex] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def say(self, macro: str, *values: object) -> None:
        """Add a paragraph."""
        self.paragraphs.append(say(macro, *values))

    def lay_out(self, caption: Latex, macro: str, *values: object, wide: bool = False) -> None:
        """Add a table."""
        self.tables.append(Table(caption, lay_out(macro, *values), wide))

    def claim(self, subject: object, pairs: Paired, than: object) -> None:
        """Add "SUBJECT is more accurate than THAN: +1.39 [+0.19, +2.58] points (n = 3)", as far as the data tell."""
        text = say("claim", subject, pairs, than)
        if pairs.n and verdict(pairs) == "undecided":
            self.claims.append(Claim(text, "undecided", say("undecided", pairs), say("whether", subject, than)))
        else:
            self.claims.append(Claim(text, "told" if pairs.n else "not run"))

    def missing(self, key: str, what: object = "") -> None:
        """Say visibly that what `key` stands for in sentences.tex was not run."""
        self.claims.append(Claim(say("missing", key, what), "not run"))


def say(macro: str, *values: object) -> Latex:
    """Fill a macro of sentences.tex; white space of any kind is one space."""
    return Latex(" ".join(str(wording(macro)(*values)).split()))


def lay_out(macro: str, *values: object) -> Latex:
    """Fill a macro of tables.tex."""
    return Latex(wording(macro, "tables.tex")(*values).strip())


@functools.cache
def wording(name: str, template: str = "sentences.tex") -> Any:
    """Return a macro or a table of words of a template."""
    return getattr(_environment().get_template(template).module, name)


def render(template: Path, variables: Mapping[str, Any]) -> str:
    r"""Fill a template with \VAR{...}, \BLOCK{...} and \#{...} as Jinja's delimiters; every string is escaped.

    A template is text and no program: it reaches its variables, and nothing of Python behind them.

    Raises:
        ConfigError: it cannot be read, or is no such template, or fails on the variables; names the line where known.
    """
    compiled = compiled_template(template)
    try:
        return compiled.render(variables)
    except Exception as error:  # whatever an expression of the template can raise
        said = str(error)[:300] or type(error).__name__
        raise ConfigError(
            f"The template {template} cannot be filled: {said}. Known: {', '.join(variables)}."
        ) from error


def compiled_template(template: Path) -> jinja2.Template:
    """Read a template.

    Raises:
        ConfigError: it cannot be read, or is none; names the line.
    """
    try:
        return _environment().from_string(read_text(template))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the template {template}: {error}.") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The template {template} is wrong in line {error.lineno}: {error.message}.") from error
    except (jinja2.TemplateError, RecursionError) as error:
        raise ConfigError(f"The template {template} is wrong: {error}.") from error


def sentence(text: str) -> Latex:
    """Write LaTeX with a capital and a full stop."""
    words = " ".join(text.split())
    return Latex(words[:1].upper() + words[1:] + ".")


def join(items: Iterable[Any], separator: str = ", ") -> Latex:
    """Write the items with LaTeX between them."""
    return Latex(separator).join(items)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
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
    functions = (difference, gain, verdict, surviving_holm, number, plain, sentence, join)
    environment.filters |= {function.__name__: function for function in functions}
    environment.filters |= {"summary": lambda by_seed: summarise(list(by_seed.values())), "latex": Latex}
    return environment
