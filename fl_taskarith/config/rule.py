"""What one configuration key may hold, and how a value is checked and shown."""

import contextlib
import dataclasses
import json
import math
import numbers
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_taskarith.errors import ConfigError

Scalar = bool | int | float | str

AUTO = "auto"
IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:name
LARGEST_INT = 2**53  # of any whole number: beyond it floats have gaps
LARGEST = 1e6  # of any step size, penalty or scale: beyond it float32 overflows
LONGEST = 4096  # characters of a string: a longer one is no path


@dataclass(frozen=True)
class Rule:
    """What one key may hold, and how people write it.

    Attributes:
        kind: bool, int, float or str.
        low, high: of a number; of a string, the fewest and the most characters.
        auto: whether the word "auto" is accepted beside a number.
        importable: whether an object of the user's own, as "module:name", is accepted beside the choices.
        heading: one of `fields.HEADINGS`.
        symbol: of the field, in Unicode, for example Nc or β₁; empty where there is none.
        words: how a label writes a value, for example "density {}"; empty where it is "symbol = {}" or "key = {}".
        names: how a text writes those of the choices that are proper names.
    """

    kind: type
    about: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    auto: bool = False
    exclusive_low: bool = False
    importable: bool = False
    heading: str = ""
    symbol: str = ""
    words: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def label(self, key: str, value: object) -> str:
        """Write a value of `key` for the legend of a plot: "J = 4", "density 0.1", "fedavg"."""
        return (self.words or f"{self.symbol or key} = {{}}").format(value)

    def formula(self) -> str:
        r"""Write `symbol` in LaTeX's math mode: N_c, \alpha, \beta_1, \Delta_{min}; empty where there is none."""
        if not self.symbol:
            return ""
        name = unicodedata.name(self.symbol[0])
        letter = "\\" + (name.split()[-1].title() if "CAPITAL" in name else name.split()[-1].lower())
        below = unicodedata.normalize("NFKD", self.symbol[1:].strip("_"))
        index = f"_{{{below}}}" if len(below) > 1 else below and f"_{below}"
        return (letter if name.startswith("GREEK") else self.symbol[0]) + index

    def expected(self) -> str:
        """The accepted values in words, for error messages and the key reference."""
        if self.choices:
            named = ", ".join(f'"{choice}"' for choice in self.choices)
            return f"one of {named}" + (', or "module:name" of your own' if self.importable else "")
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[self.kind]
        if self.kind is str:
            return words + (f" of {max(self.low, 0):g} to {self.high:g} characters" if self.high < math.inf else "")
        if self.low > -math.inf:
            words += f" {'above' if self.exclusive_low else 'from'} {self.low:g}"
        if self.high < math.inf:
            words += f" up to {self.high:g}"
        return words + (' or "auto"' if self.auto else "")

    def check(self, key: str, value: object) -> Scalar:
        """Return `value` as the rule's kind, or raise ConfigError naming the key, the value and what is accepted."""
        if self.auto and isinstance(value, str) and value == AUTO:
            return AUTO
        if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
            with contextlib.suppress(OverflowError):  # a fraction beyond all floats: left as it is, and refused below
                value = int(value) if isinstance(value, numbers.Integral) else float(value)  # numpy's come from sweeps
        if self.kind is float and type(value) is int and abs(value) <= LARGEST_INT:
            value = float(value)
        if not isinstance(value, (bool, int, float, str)) or type(value) is not self.kind or not self._in_range(value):
            raise ConfigError(f"{key} = {shown(value)} is not accepted: expected {self.expected()}{self._but(value)}.")
        return value

    def read(self, text: str) -> object:
        """Return what a word of the command line means for this key; what means nothing is returned as it is.

        Quotes of TOML are taken off. A number is read in any usual way of writing it, 10.0 for a whole one too, and
        capitals and underscores are as good as others in one of the choices.
        """
        with contextlib.suppress(ValueError, RecursionError):
            parsed = tomllib.loads(f"value = {text}")
            text = parsed["value"] if len(parsed) == 1 and isinstance(parsed["value"], str) else text
        if self.choices:
            spelt = text.strip().lower().replace("_", "-")
            return next((choice for choice in self.choices if choice == spelt), text)
        if self.kind is bool:
            return {"true": True, "false": False}.get(text.strip().lower(), text)
        if self.kind in (int, float) and len(text) < LONGEST:
            for number in (int, lambda digits: int(digits, 0), float):
                with contextlib.suppress(ValueError):
                    return self.cast(number(text))
        return text

    def cast(self, value: object) -> object:
        """Return a value that was typed by its looks, as Flower's run-config is, as the rule's kind.

        Only what surely means the same: 10.0 as a whole number, 123 as a string, "10" as a number.
        """
        if self.kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.kind is not str:
            return self.read(value) if isinstance(value, str) else value
        return str(value) if type(value) is int and abs(value) <= LARGEST_INT else value

    def _but(self, value: object) -> str:
        """Say what is wrong with a string beside its characters' number, or how a number becomes one."""
        if self.kind is not str or self.choices:
            return ""
        if not isinstance(value, str):
            return ", in quotes" if isinstance(value, (bool, int, float)) else ""
        if len(value) > LONGEST:
            return f" of at most {LONGEST} characters"
        return "" if value.isprintable() else " without line breaks and other characters that cannot be printed"

    def _in_range(self, value: Scalar) -> bool:
        if isinstance(value, str):
            known = not self.choices or value in self.choices
            fits = self.low <= len(value) <= min(self.high, LONGEST)
            return fits and (known or (self.importable and bool(IMPORTABLE.fullmatch(value)))) and value.isprintable()
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if type(value) is int and abs(value) > LARGEST_INT:
            return False
        return self.low <= value <= self.high and not (self.exclusive_low and value == self.low)


TEXT, NAME = Rule(str, "", 0, 300), Rule(str, "", 1, 200)  # of what a file of studies calls things


def key(heading: str, default: Scalar, accepted: str | Sequence[str] | None, about: str, **more: Any) -> Any:
    """Return a dataclass field with its rule.

    Args:
        heading: the heading of the reference under which the key stands.
        default: gives the kind; "auto" with an interval is a number or "auto", and so it is with auto=True.
        accepted: an interval, for example "(0, 1]" or "[1, inf)", or the choices: "off | float16", or a sequence.
        about: what the key means, in a line.
        more: other attributes of the rule.
    """
    if isinstance(accepted, str) and accepted[0] in "([":
        low, high = accepted[1:-1].split(",")
        more |= {"low": float(low), "high": float(high), "exclusive_low": accepted[0] == "("}
        more.setdefault("auto", default == AUTO)
    elif accepted is not None:
        more["choices"] = tuple(accepted.split(" | ") if isinstance(accepted, str) else accepted)
    rule = Rule(float if default == AUTO and more.get("auto") else type(default), about, heading=heading, **more)
    return dataclasses.field(default=default, metadata={"rule": rule})


def to_toml(value: object) -> str:
    """`value` as the user would write it in TOML, whose strings are escaped as JSON's are."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def shown(value: object) -> str:
    """`value` on one line, short, with what is unprintable escaped."""
    try:
        text = f'"{value}"' if isinstance(value, str) else to_toml(value) if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4,300 digits
        return f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
