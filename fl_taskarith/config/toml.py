"""The one reader of TOML files: settings, studies, benchmarks, authors, and the tables that the package ships."""

import codecs
import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.rule import Rule, shown
from fl_taskarith.errors import ConfigError

Kind = Rule | type[dict[str, Any]] | list[Any]
"""What a key holds: by its rule, any table (`dict`), or a list of one of these, for example [Rule(int, "a seed")]."""

DEEPEST = 12  # tables and lists in one another; no file of ours needs half as many
UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\0")
KINDS = {  # of files: what one is called, the command that takes it, and keys by which it is told
    "configuration": ("a settings file", "simulate", frozenset(rules())),
    "study": ("a study file", "study", frozenset({"arm", "grid", "group"})),
    "benchmark": ("a one-shot benchmark", "one-shot", frozenset({"tasks", "data", "training", "methods"})),
    "authors": ("a file of authors", "report --authors", frozenset({"author"})),
}


def read_toml(path: Path | str, what: str = "file") -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without a byte order mark and with the line ends of any system.

    Args:
        what: the kind of file, for the message of an error; one of `KINDS` must be of that kind.

    Raises:
        ConfigError: names the file, and the line that is not TOML.
    """
    named = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        document = tomllib.loads(read_text(path))
    except RecursionError:
        raise ConfigError(f"{named} is not valid TOML: it is nested too deeply.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{named} is not valid TOML: {error}.") from error
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {what} {named}: {_where(Path(path).expanduser())}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Cannot read the {what} {named}: {error}.") from error
    if _depth(document) > DEEPEST:
        raise ConfigError(f"{named} has tables or lists nested more than {DEEPEST} deep: expected no more than 4.")
    if what in KINDS:
        _refuse_other_kinds(document, what, named)
    return document


def _where(path: Path) -> str:
    """Return what is spelt most like `path`, beside it or below conf/, as a question, or else where a path begins."""
    for files in (sorted(path.parent.glob("*.toml")), sorted(Path("conf").rglob("*.toml"))):
        name = path.name.removesuffix(".toml")[:100]
        if near := difflib.get_close_matches(name, {each.stem for each in files}, n=1):
            return f"did you mean {' or '.join(str(each) for each in files if each.stem == near[0])}?"
    return f"a relative path begins in {Path.cwd()}."


def read_text(path: Path | str) -> str:
    """Return the text of a file in UTF-8 with or without a byte order mark.

    Raises:
        OSError, ValueError, RuntimeError: it cannot be read, or is in another encoding, which the message says.
    """
    content = Path(path).expanduser().read_bytes()
    if content.startswith(UTF_16_OR_32) or b"\0" in content[1:4]:
        raise ValueError("it is in UTF-16 or UTF-32: save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"it is not in UTF-8 in line {line} (byte {content[error.start]:#x}): save it so") from error


def place_of(path: Path | str, key: str) -> str:
    """Name the line of the file in which a top-level key, in kebab- or snake-case, is given: "FILE, line 3"."""
    given = re.compile(rf"\s*[\"']?{'[-_]'.join(map(re.escape, re.split('[-_]', key)))}[\"']?\s*=")
    lines = read_text(path).splitlines()
    number = next((number for number, line in enumerate(lines, start=1) if given.match(line)), None)
    return f"{path}, line {number}" if number else str(path)


def read_table(
    table: Mapping[str, Any], kinds: Mapping[str, Kind], place: str, required: Collection[str] = ()
) -> dict[str, Any]:
    """Return a table of a file, each of its keys checked by its kind; keys that it lacks stay away.

    Raises:
        ConfigError: a key is not known, is missing, or is not of its kind; names `place` and the key.
    """
    for key in table:
        if key not in kinds:
            raise ConfigError(f"{place}: {shown(key)} is not a key; {nearest(key, kinds)}")
    checked = {key: _checked(value, kinds[key], f"{place}: {key}") for key, value in table.items()}
    for key in required:
        if key not in table:
            raise ConfigError(f"{place}: {key} is missing; expected {_expected(kinds[key])}.")
    return checked


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is spelt like `word`, as a question, or else all of them."""
    names = list(known)
    near = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else "known keys: " + ", ".join(names)


def _checked(value: Any, kind: Kind, place: str) -> Any:
    if isinstance(kind, Rule):
        return kind.check(place, value)
    if not isinstance(value, list if isinstance(kind, list) else dict):
        raise ConfigError(f"{place} = {shown(value)}: expected {_expected(kind)}.")
    if isinstance(kind, list):
        return [_checked(each, kind[0], f"{place}, number {number}") for number, each in enumerate(value, start=1)]
    return value


def _expected(kind: Kind) -> str:
    if isinstance(kind, Rule):
        return kind.expected()
    if isinstance(kind, list):
        return "tables" if kind[0] is dict else f"a list, each of it {_expected(kind[0])}"
    return "a table"


def _depth(value: Any) -> int:
    """Return how deep tables and lists are nested, without recursion."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level, depth = [value for values in inner for value in values], depth + 1
    return depth


def _refuse_other_kinds(document: Mapping[str, Any], what: str, named: str) -> None:
    wanted, _, own = KINDS[what]
    keys = {kebab(key) for key in document}
    if keys & own:
        return
    if "tool" in keys:
        raise ConfigError(
            f"{named} has its settings in a table for Flower: {wanted} has them at the top, without the line "
            "[tool.flwr.app.config]."
        )
    for kind, command, marks in KINDS.values():
        if keys & marks:
            raise ConfigError(f"{named} is {kind}, not {wanted}: give it to fl-taskarith {command}.")
