"""Kinds of command-line arguments."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def seconds(text: str) -> float:
    """An argument that is a time with its unit, for example 25m."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a time: expected a whole number and s, m or h, such as 25m")
    return float(int(number) * unit)


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


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


def parse_words(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse `arguments`; a command's words may stand before, between and behind its options."""
    parsed, rest = parser.parse_known_args(arguments)
    words = [*getattr(parsed, "displaced", ()), *rest]
    unknown = [word for word in words if word.startswith("-")]
    if unknown or (words and not hasattr(parsed, "words")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or words)}")
    if words:
        parsed.words = [*parsed.words, *words]
    return parsed


NAMES: dict[str, Any] = {"float": float, "int": int, "path": Path, "positive": positive, "seconds": seconds}
"""What `type` in commands.toml names; an `action` is a name of argparse, or "list"."""


def add_arguments(command: argparse.ArgumentParser, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Add arguments by their names, each with the options of `add_argument`."""
    for name, options in table.items():
        kinds = {"type": NAMES[options["type"]]} if "type" in options else {}
        actions = {"action": ListAction} if options.get("action") == "list" else {}
        command.add_argument(name, **{**options, **kinds, **actions})
