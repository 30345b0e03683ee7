"""Text and numbers as LaTeX: what comes from a file is escaped, what is `Latex` already is LaTeX and stays."""

import math
from typing import Any

from markupsafe import Markup

from fl_taskarith.figures.statistics import Paired, Summary

ASCII = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum", "<": "textless", ">": "textgreater",
         "|": "textbar", '"': "textquotedbl", "`": "textasciigrave", "–": "textendash", "—": "textemdash",
         "…": "ldots"}  # fmt: skip
MATHS = {"±": r"\pm", "×": r"\times", "−": "-", "‖": r"\Vert", "≤": r"\le", "≥": r"\ge", "τ": r"\tau", "θ": r"\theta",
         "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "λ": r"\lambda", "μ": r"\mu", "ρ": r"\rho", "η": r"\eta",
         "₀": "_0"}  # fmt: skip
SPECIAL = {
    **{sign: f"\\{name}{{}}" for sign, name in ASCII.items()},
    **{sign: rf"\ensuremath{{{name}}}" for sign, name in MATHS.items()},
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    **{sign: f"{{{sign}}}" for sign in "',-"},  # braces keep two of a kind from becoming another sign
}
TYPESETTABLE = (  # by pdfTeX with T1 fonts: Latin-1 and Latin Extended-A, but for what is no letter or has no glyph
    set(map(chr, range(0xC0, 0x180))) - set("×÷ĦħĨĩĬĭĴĵĸŊŨũŬŭ\u0149\u013f\u0140\u0166\u0167\u017f")
    | set(map(chr, range(0x20, 0x7F)))
)
DIGITS = 2  # of accuracies in percent and of differences in points


class Latex(Markup):
    """LaTeX source. Whatever is added to it, or joined by it, is escaped unless it is LaTeX itself."""

    @classmethod
    def escape(cls, value: Any, /) -> "Latex":
        """Return `value` if it is LaTeX, else its text so that LaTeX prints it.

        White space becomes one space; what the fonts lack becomes its code, [U+4E2D].
        """
        if isinstance(value, Markup):
            return cls(value)
        words = " ".join(str(value).split())
        return cls(
            "".join(SPECIAL.get(sign) or (sign if sign in TYPESETTABLE else f"[U+{ord(sign):04X}]") for sign in words)
        )


escape = Latex.escape
UNKNOWN = Latex("--")  # an en dash for what is not known
NOT_RUN = Latex(r"\notrun{}")  # the visible mark of a missing result; \notrun is defined in numbers.tex


def number(value: float, digits: int = DIGITS, sign: bool = False) -> Latex:
    """Write `value` with `digits` decimals, and with its sign if `sign`; NaN is an en dash."""
    if math.isnan(value):
        return UNKNOWN
    rounded = 0.0 if round(value, digits) == 0 else value  # no -0.00
    text = f"{rounded:{'+' if sign else ''}.{digits}f}"
    return Latex(f"${text}$" if sign or rounded < 0 else text)


def plain(value: float) -> Latex:
    """Write `value` in its shortest form, for settings such as learning rates."""
    return Latex(f"{value:g}" if value >= 0 else f"${value:g}$")


def spread(summary: Summary) -> Latex:
    """Write mean ± standard deviation, only the mean of a single seed, or "not run" for none."""
    if not summary.n:
        return NOT_RUN
    deviation = "" if math.isnan(summary.sd) else rf"\,$\pm$\,{number(summary.sd)}"
    return Latex(number(summary.mean) + Latex(deviation))


def interval(pairs: Paired) -> Latex:
    """Write a mean difference with its 95 % interval, where it has one."""
    mean, low, high = (number(value, sign=True) for value in (pairs.mean, pairs.low, pairs.high))
    return mean if math.isnan(pairs.low) else Latex(f"{mean} [{low},~{high}]")
