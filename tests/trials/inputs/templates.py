"""Templates of a report that reach for Python, fail in any way, or are fine."""

import random
from pathlib import Path

from fl_taskarith.report.latex import Latex
from fl_taskarith.report.sentences import Section, render

FAULT = "templates of a report"
FINE = (
    r"\VAR{title}", r"\BLOCK{for each in sections}\VAR{each.title}\BLOCK{endfor}", "% plain TeX $x_1$",
    r"\VAR{seeds | join}", r"\VAR{title | upper}", r"\#{ a comment }", r"\BLOCK{set x = 3}\VAR{x + 1}",
    r"\VAR{seeds[0]}",
)  # fmt: skip
OTHER = (
    r"\VAR{''.__class__.__mro__[1].__subclasses__()}", r"\VAR{title.__init__.__globals__}",
    r"\VAR{sections[0].__class__}", r"\VAR{sections[0].say.__func__.__globals__['Path']}",
    r"\VAR{cycler.__init__.__globals__.os.popen('id').read()}", r"\VAR{lipsum.__globals__['os'].system('touch made')}",
    r"\VAR{(title | attr('__class__'))}", r"\VAR{seeds.append(1)}", r"\VAR{self.__init__.__globals__}",
    r"\VAR{'%s' | format(title.__class__)}", r"\VAR{'{0.__class__}'.format(title)}",
    r"\VAR{'{a.__class__}'.format_map({'a': title})}",
    r"\BLOCK{include '/etc/hostname'}", r"\BLOCK{import 'os' as os}", r"\VAR{1/0}", r"\BLOCK{include '../errors.py'}",
    r"\VAR{missing}", r"\VAR{", r"\BLOCK{for}", r"\BLOCK{endif}", r"\VAR{title()}", r"\VAR{range(10**9) | list}",
    r"\VAR{seeds + 1}", r"\VAR{title | nothing}", r"\VAR{" + "(" * 500, r"\VAR{sections[9]}",
    r"\BLOCK{macro m()}\VAR{m()}\BLOCK{endmacro}\VAR{m()}", r"\VAR{title | int | difference}",
    r"\BLOCK{do seeds.pop()}", "\0", "\udcff",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Nothing is shared."""


def attempt(prepared: None, drawn: random.Random, folder: Path) -> str:
    parts = drawn.choices(FINE, k=drawn.randint(0, 3)) + drawn.choices(OTHER, k=drawn.choice([0, 1, 1, 2]))
    drawn.shuffle(parts)
    path, seeds = folder / "mine.tex", [0, 1]
    path.write_bytes("\n".join(parts).encode("utf-8", "surrogateescape"))
    try:
        filled = render(path, {"title": "A & B", "seeds": seeds, "sections": [Section("one", Latex("One"), "?")]})
    finally:
        assert seeds == [0, 1], "a template changed what it was given"
        assert not list(Path().glob("made")), "a template ran a program"
    reached = [word for word in ("class '", "function ", "module", "uid=", "object at") if word in filled]
    assert not reached, f"{reached}: {filled}"
    return "filled"
