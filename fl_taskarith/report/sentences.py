"""Words from numbers: every sentence is a macro of sentences.tex, every table one of tables.tex.

A difference is stated only where its interval excludes 0.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fl_taskarith.config.toml import read_text
from fl_taskarith.errors import ConfigError
from fl_taskarith.figures.setting_words import solved_head_words
from fl_taskarith.figures.statistics import FEWEST, NO_WIDTH, Paired, seed_words, summarise
from fl_taskarith.report.contrasts import Arms, difference, gain, surviving_holm, verdict
from fl_taskarith.report.latex import Latex, escape, number, plain
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.storage.paths import shipped_file

NO_LABEL = Latex()
Status = Literal["told", "undecided", "not run"]


class Claim(NamedTuple):
    """One answer.

    Attributes:
        finding: in words, as the conclusion lists it; `open_question` takes its place where it is undecided.
        points: its numbers. detail: what a reader of them may want to know; not in the abstract.
        table: the label of the table that it rests on, if any.
        headline: whether the abstract may state it: not where it rests on fewer than three seeds.
    """

    finding: Latex
    status: Status
    points: Latex = Latex()
    detail: Latex = Latex()
    open_question: Latex = Latex()
    table: Latex = Latex()
    headline: bool = True

    @property
    def text(self) -> Latex:
        """The finding with its numbers."""
        return Latex(": ").join([each for each in (self.finding, self.points) if each])


class Compared(NamedTuple):
    """Rows of a table, of pairs (name, arm), under a heading.

    The arms are compared with `reference`; where it is None, with the ridge head that each began with.
    """

    heading: Latex
    rows: Sequence[tuple[Latex, MeasuredArm]]
    reference: MeasuredArm | None = None

    def difference(self, arm: MeasuredArm) -> Paired:
        """Return the test accuracy of an arm minus what it is compared with, in points, matched by seed."""
        return gain(arm) if self.reference is None else difference(arm, self.reference)

    def verdict(self, arm: MeasuredArm) -> str:
        """Return what the table says of an arm: "reference", "not tuned", "not run", or the verdict on its interval.

        Empty where it is the reference that is not tuned.
        """
        if arm.edge:
            return "not tuned"
        if arm is self.reference:
            return "reference"
        if self.reference is not None and self.reference.edge:
            return ""
        return verdict(pairs) if (pairs := self.difference(arm)).n else "not run"

    def judged(self) -> list[Paired]:
        """Return the differences that have an interval and a verdict."""
        judged = [self.difference(arm) for _, arm in self.rows
                  if self.verdict(arm) in ("higher", "lower", "undecided")]  # fmt: skip
        return [pairs for pairs in judged if pairs.over]


class Table(NamedTuple):
    """A table; a `wide` one floats, and spans both columns."""

    caption: Latex
    body: Latex
    wide: bool = False


@dataclass
class Section:
    """The answer to a question of the report: claims, and the paragraphs and tables they rest on."""

    name: str
    title: str
    question: str
    paragraphs: list[Latex] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def say(self, macro: str, *values: object) -> None:
        """Add a paragraph."""
        self.paragraphs.append(say(macro, *values))

    def lay_out(self, caption: Latex, macro: str, *values: object, wide: bool = False) -> Latex:
        """Add a table and return its label."""
        self.tables.append(Table(caption, lay_out(macro, *values), wide))
        return say("table_label", self.name, len(self.tables))

    def compare(self, key: str, groups: Sequence[Compared], note: object = "") -> Latex:
        """Add a table of arms, with a paragraph that refers to it and says how many of its intervals exclude 0.

        Args:
            key: of what is compared, as COMPARED in sentences.tex words it.
            note: what else the paragraph says of the comparison.

        Returns:
            The table's label.
        """
        arms = [arm for group in groups for _, arm in group.rows]
        seeds = max(len(arm.test) for arm in arms)
        label = self.lay_out(say("compared_caption", key, arms, seeds), "comparison", groups, seeds)
        self.say("compared", key, note, label, [pairs for group in groups for pairs in group.judged()])
        self.name_lost([(group.heading, name, arm) for group in groups for name, arm in group.rows])
        return label

    def name_lost(self, rows: Iterable[tuple[Latex, str, MeasuredArm]]) -> None:
        """Name the runs that ended below the head they began with, of rows (heading or nothing, name, arm)."""
        if lost := [row for row in rows if row[-1].below_the_head]:
            self.say("below_the_head", lost)

    def claim(self, subject: object, pairs: Paired, than: object, arms: Arms = (), table: Latex = NO_LABEL) -> None:
        """Add "SUBJECT is more accurate than THAN: +1.39 [+0.19, +2.58] points (n = 3)", as far as the data tell.

        Nothing is claimed where the learning rate of one of `arms` is at the edge of its grid: only the table has it.
        """
        if any(arm.edge for arm in arms):
            return
        finding = say("finding", subject, pairs, than)
        if not pairs.n:
            self.claims.append(Claim(finding, "not run"))
        elif verdict(pairs) == "undecided":
            whether = say("whether", subject, than)
            self.claims.append(
                Claim(finding, "undecided", say("points", pairs), say("undecided", pairs), whether, table)
            )
        else:
            told = Claim(finding, "told", say("points", pairs), table=table, headline=pairs.n >= FEWEST)
            self.claims.append(told)

    @property
    def status(self) -> Status:
        """Whether the question is answered: "told" if any claim is, "not run" where there is nothing to make one of."""
        found = {claim.status for claim in self.claims}
        return "told" if "told" in found else "undecided" if "undecided" in found or self.tables else "not run"

    @property
    def discussion(self) -> list[Latex]:
        """The first claim in a sentence, and all others in a second one."""
        made = [claim for claim in self.claims if claim.status != "not run"]
        if not self.claims and self.tables:
            return [say("no_claim", say("table_label", self.name, 1))]
        sentences = [
            [say("referring", claim, len(part) == 1) for claim in part] for part in (made[:1], made[1:]) if part
        ]
        return [sentence(Latex("; ").join(part)) for part in sentences]

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


def same(pairs: Paired) -> bool:
    """Return whether several seeds all differ by the same number, so that an interval has no width."""
    return pairs.n > 1 and not (pairs.high - pairs.low if pairs.over else pairs.sd) > NO_WIDTH


def head(arms: Arms) -> str:
    """Return what the solved heads of the arms are called before training, for example "ridge head"."""
    return solved_head_words([arm.settings for arm in arms])


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
    functions = (difference, gain, verdict, surviving_holm, number, plain, sentence, same, join, head, seed_words)
    environment.filters |= {function.__name__: function for function in functions}
    environment.filters |= {"summary": lambda by_seed: summarise(list(by_seed.values())), "latex": Latex}
    return environment
