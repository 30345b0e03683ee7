"""Kinds of command-line arguments."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.hints import hint, is_known
from fl_taskarith.config.rule import LARGEST_INT, Rule, shown
from fl_taskarith.errors import ConfigError

ASSIGNMENT = re.compile(r"[^=./\\]*=")  # key=value, and not a path that contains =
LONGEST_TIME = 10**6


def by_rule(rule: Rule) -> Callable[[str], Any]:
    """Return the kind of argument that a rule accepts."""

    def read(text: str) -> Any:
        try:
            return rule.check("", rule.read(text))
        except ConfigError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {rule.expected()}") from None

    return read


def seconds(text: str) -> float:
    """An argument that is a time with its unit, for example 25m."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or len(number) > 9 or not 1 <= int(number) <= LONGEST_TIME:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a time: expected a whole number up to {LONGEST_TIME} and s, m or h, such as 25m"
        )
    return float(int(number) * unit)


def path(text: str) -> Path:
    """An argument that is the path of a file or folder."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path")
    return Path(text)


def numbers(text: str) -> list[float]:
    """An argument that is one number or several, in one word."""
    return [float(each) for each in text.split()]


class ListAction(argparse.Action):
    """`--list` ("groups") or `--list all` ("all"); any other word behind it is one of the command's own words."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", metavar="all", **kwargs)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        """Argparse's hook."""
        setattr(namespace, self.dest, "all" if value == "all" else "groups")
        if value not in (None, "all"):
            namespace.displaced = [*getattr(namespace, "displaced", ()), value]


class LateParser(argparse.ArgumentParser):
    """A parser that calls `fill(parser, arguments)` once its command is chosen, for options that need slow imports."""

    fill: Callable[[argparse.ArgumentParser, Sequence[str]], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, all options added."""
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self, args)
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Argparse's check of a word against choices, a command's name for one, with the nearest of them."""
        if action.choices is None or value in action.choices:
            return
        names = [str(name) for name in action.choices]
        near = difflib.get_close_matches(str(value)[:100], names, n=1)
        said = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
        if isinstance(action, argparse._SubParsersAction) and re.search(r"=|\.toml$", str(value)):
            said = f"name a command before it, for example simulate {shown(value).strip(chr(34))}"
        raise argparse.ArgumentError(action, f"{shown(value)} is none; {said}")


def parse_words(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse `arguments`; a command's words may stand before, between and behind its options."""
    parsed, rest = parser.parse_known_args(arguments)
    words = [*getattr(parsed, "displaced", ()), *rest]
    unknown = [word for word in words if word.startswith("-")]
    if hasattr(parsed, "words"):
        said = _settings_among(unknown, sys.argv[1:] if arguments is None else arguments)
        if said:
            parser.error(f"settings are given without dashes, as key=value: {'; '.join(said)}")
    if unknown or (words and not hasattr(parsed, "words")):
        parser.error(f"unrecognized arguments: {' '.join(map(shown, unknown or words))}; COMMAND --help lists them all")
    if words:
        parsed.words = [*parsed.words, *words]
    return parsed


def _settings_among(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return how those of the unknown options are written that are settings, or what settings are called elsewhere."""
    said = []
    for option in options:
        name, equals, value = option.lstrip("-").partition("=")
        if not equals:
            behind = [*arguments[arguments.index(option) + 1 :], "-"][0]
            value = "VALUE" if behind.startswith("-") or ASSIGNMENT.match(behind) else behind
        if is_known(kebab(name)):
            said.append(shown(f"{kebab(name)}={value}").strip('"') if kebab(name) in rules() else hint(kebab(name)))
    return said


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files among a command's words, and its key=value words.

    Raises:
        ConfigError: a word is a setting's name, without its value.
    """
    files = [word for word in words if not ASSIGNMENT.match(word)]
    for word in files:
        if kebab(word) in rules():
            raise ConfigError(f"{word} is a setting: expected {kebab(word)}=VALUE, in one word.")
    return files, [word for word in words if ASSIGNMENT.match(word)]


NAMES: dict[str, Callable[[str], Any]] = {
    "path": path,
    "number": float,
    "numbers": numbers,
    "whole": int,
    "positive": by_rule(Rule(int, "", 1, LARGEST_INT)),
    "jobs": by_rule(Rule(int, "", 1, 1024)),
    "rate": by_rule(Rule(float, "", 0, rules()["learning-rate"].high, exclusive_low=True)),
    "seed": by_rule(rules()["seed"]),
    "seconds": seconds,
}
"""What `type` in commands.toml names; an `action` is a name of argparse, or "list"."""


def add_arguments(command: argparse.ArgumentParser, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Add arguments by their names, each with the options of `add_argument`."""
    for name, options in table.items():
        kinds = {"type": NAMES[options["type"]]} if "type" in options else {}
        actions = {"action": ListAction} if options.get("action") == "list" else {}
        command.add_argument(name, **{**options, **kinds, **actions})
