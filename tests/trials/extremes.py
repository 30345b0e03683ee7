"""Values that a TOML file may hold anywhere, and files of them: shared by the kinds that read such files."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

DEEP: Any = None
for _ in range(400):
    DEEP = [DEEP] if DEEP is not None else []
VALUES = (
    -1, 0, 1, 2, 3, 10**6, 2**53, 2**53 + 1, -(2**63), 10**400, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), True, False, "", " ", "x", "auto", "0.1", "=HYPERLINK(1)", "a|b", "a\nb", "\x1b[31m",
    "\x7f", "..", "../out", "a/b/c", "module:name", "os:system", "$x^", "$\\frac{$", "`", "é中", "x" * 250, "x" * 5000,
    [], [1], [0, 0], [0.5], ["a"], ["a", 1], [[]], [{}], {}, {"a": 1}, {"name": "x"}, {"seed": 1}, list(range(5000)),
    DEEP,
)  # fmt: skip
WORDS = (  # that any name may be
    "x", "=HYPERLINK(1)", "+1", "-", "@a", "'=", "a|b", "a\\|b", "\\", "$x^", "$\\frac{$", "`", "é中", "a, b = 3",
    "<b>", "*", "#", "[x](y)", "{{ 1 }}", "%s", "x" * 150, "1e5", "true",
)  # fmt: skip


def toml(document: dict[str, Any]) -> str:
    """The document as TOML: inline tables below the first level."""
    return "\n".join(f"{json.dumps(key)} = {_value(value)}" for key, value in document.items()) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        if value is DEEP:
            return "[" * 400 + "]" * 400
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def disturb(document: dict[str, Any], drawn: random.Random, keys: tuple[str, ...]) -> None:
    """Put a value of `VALUES` in one place of the document, take one away, or add one under a known key."""
    holder, key = drawn.choice(list(_places(document)))
    change: Callable[[], Any] = drawn.choice(
        [
            lambda: holder.__setitem__(key, drawn.choice(VALUES)),
            lambda: holder.__setitem__(key, drawn.choice(VALUES)),
            lambda: holder.pop(key),
            lambda: _add(holder, drawn.choice(keys), drawn.choice(VALUES)),
        ]
    )
    change()


def _add(holder: Any, key: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[key] = value
    else:
        holder.append(value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(each, (dict, list)) and each is not DEEP:
            yield from _places(each)


def file_of(document: dict[str, Any], drawn: random.Random) -> bytes:
    """The bytes of the file, now and then in an odd encoding, cut short or with deep nesting at its end."""
    text = toml(document)
    text += drawn.choice(["", "", "", "", "", "", "x = " + "[" * 5000, "\n[" + ".".join("a" * 5000) + "]", "= ", "\0"])
    content = text.encode(drawn.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"]), "replace")
    return content[: drawn.choice([len(content)] * 9 + [drawn.randrange(len(content) + 1)])]
