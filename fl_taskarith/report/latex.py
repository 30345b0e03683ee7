"""Text and numbers as LaTeX. Whatever comes from a file is escaped; what is `Latex` already is LaTeX and stays."""

import math
from collections.abc import Iterable, Sequence

from fl_taskarith.figures.statistics import Paired, Summary

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": "{'}",
    "`": r"\textasciigrave{}",
    "-": "{-}",  # braces keep two of a kind from becoming another sign
    ",": "{,}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "−": r"\ensuremath{-}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "…": r"\ldots{}",
    "‖": r"\ensuremath{\Vert}",
    "≤": r"\ensuremath{\le}",
    "≥": r"\ensuremath{\ge}",
    "τ": r"\ensuremath{\tau}",
    "θ": r"\ensuremath{\theta}",
    "α": r"\ensuremath{\alpha}",
    "β": r"\ensuremath{\beta}",
    "γ": r"\ensuremath{\gamma}",
    "λ": r"\ensuremath{\lambda}",
    "μ": r"\ensuremath{\mu}",
    "ρ": r"\ensuremath{\rho}",
    "η": r"\ensuremath{\eta}",
    "₀": r"\ensuremath{_0}",
}
TYPESETTABLE = (  # by pdfTeX with T1 fonts: Latin-1 and Latin Extended-A, but for what is no letter or has no glyph
    set(map(chr, range(0xC0, 0x180))) - set("×÷ĦħĨĩĬĭĴĵĸŊŨũŬŭ\u0149\u013f\u0140\u0166\u0167\u017f")
    | set(map(chr, range(0x20, 0x7F)))
)
DIGITS = 2  # of accuracies in percent and of differences in points
NOT_RUN = "not run"


class Latex(str):
    """LaTeX source. `Latex("{} of {}").fill(a, b)` escapes its arguments, unless they are Latex themselves."""

    def fill(self, *arguments: object) -> "Latex":
        """The template with each {} replaced; every other brace is LaTeX's own."""
        parts = self.split("{}")
        if len(parts) != len(arguments) + 1:
            raise ValueError(f"{len(arguments)} arguments for {len(parts) - 1} places in {self!r}")
        filled = (part + source(value) for part, value in zip(parts, [*arguments, Latex()], strict=True))
        return Latex("".join(filled))


def source(value: object) -> Latex:
    """`value` as LaTeX source: itself if it is that already, else its escaped text."""
    return value if isinstance(value, Latex) else escape(str(value))


def escape(text: str) -> Latex:
    """`text` so that LaTeX prints it. White space becomes one space; what the fonts lack becomes its code, [U+4E2D]."""
    words = " ".join(text.split())
    return Latex(
        "".join(SPECIAL.get(sign) or (sign if sign in TYPESETTABLE else f"[U+{ord(sign):04X}]") for sign in words)
    )


def join(items: Iterable[object], separator: str = ", ", last: str | None = None) -> Latex:
    """The items with separators between; `last` before the last of several, for example " and "."""
    sources = [source(item) for item in items]
    if last is None or len(sources) < 2:
        return Latex(separator.join(sources))
    return Latex(separator.join(sources[:-1]) + last + sources[-1])


def number(value: float, digits: int = DIGITS, sign: bool = False) -> Latex:
    """With so many decimals; an en dash for what is not known."""
    if math.isnan(value):
        return Latex("--")
    rounded = 0.0 if round(value, digits) == 0 else value  # no -0.00
    text = f"{rounded:{'+' if sign else ''}.{digits}f}"
    return Latex(f"${text}$" if sign or rounded < 0 else text)


def plain(value: float) -> Latex:
    """In its shortest form, for settings such as learning rates."""
    return Latex(f"{value:g}") if value >= 0 else Latex(f"${value:g}$")


def spread(summary: Summary, digits: int = DIGITS) -> Latex:
    """Mean ± standard deviation; only the mean of a single seed; "not run" of none."""
    if not summary.n:
        return not_run()
    if math.isnan(summary.sd):
        return number(summary.mean, digits)
    return Latex(r"{}\,$\pm$\,{}").fill(number(summary.mean, digits), number(summary.sd, digits))


def interval(paired: Paired) -> Latex:
    """Mean difference with its 95 % interval, where it has one."""
    mean = number(paired.mean, sign=True)
    if math.isnan(paired.low):
        return mean
    return Latex("{} [{},~{}]").fill(mean, number(paired.low, sign=True), number(paired.high, sign=True))


def not_run(what: str = "") -> Latex:
    r"""The visible mark of a missing result; \notrun is the template's."""
    return Latex(r"\notrun{{}}").fill(what) if what else Latex(r"\notrun{}")


def tabular(header: Sequence[object], rows: Sequence[Sequence[object]], widest: int = 0) -> Latex:
    """A booktabs table as wide as its text: the cells of column `widest` wrap, the first is flush left."""
    kinds = ["l", *"c" * (len(header) - 1)]
    kinds[widest] = r">{\raggedright\arraybackslash}X"
    columns = "".join(kinds)
    lines = [r"\begin{tabularx}{\linewidth}{@{}" + columns + "@{}}", r"\toprule"]
    lines += [join(header, " & ") + r" \\", r"\midrule"]
    lines += [join(row, " & ") + r" \\" for row in rows]
    return Latex("\n".join([*lines, r"\bottomrule", r"\end{tabularx}"]))
