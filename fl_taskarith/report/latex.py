"""Text and numbers as LaTeX: what comes from a file is escaped, what is `Latex` already is LaTeX and stays."""

import math
from typing import Any

from markupsafe import Markup

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


def listed(*parts: object) -> Latex:
    """Write those of `parts` that are not empty, with commas between them."""
    return Latex(", ").join([escape(part) for part in parts if part])


UNKNOWN = Latex("--")  # an en dash for what is not known


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
