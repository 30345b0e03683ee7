"""Inputs drawn at random, by kind: each is refused by an error that a user can read, or taken, and then it works."""

import importlib
import pkgutil
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import inputs
from trials import Tally

from fl_taskarith.errors import FlTaskarithError

LONGEST_MESSAGE = 3000


def kinds() -> list[ModuleType]:
    """The modules of `inputs`.

    Each has FAULT, what is drawn in a few words; `prepare(folder)`, which makes once what all attempts share; and
    `attempt(prepared, drawn, folder)`, which draws one input from `drawn`, gives it to the package in the new folder
    `folder`, asserts that what was accepted is right, and returns in a word or two how it ended.
    """
    return [importlib.import_module(f"inputs.{module.name}") for module in pkgutil.iter_modules(inputs.__path__)]


def bad_inputs(cases: int, folder: Path, start: int = 0, only: str = "") -> Iterator[Tally]:
    """`cases` attempts of each kind whose name ends with `only`, drawn from `Random(f"{start}-{number}")`."""
    for kind in (kind for kind in kinds() if kind.__name__.endswith(only)):
        tally, shared = Tally(kind.FAULT), folder / kind.__name__
        shared.mkdir(parents=True)
        prepared = kind.prepare(shared)
        for number in range(cases):
            here = folder / "attempt"
            here.mkdir()
            _attempt(tally, kind, prepared, f"{start}-{number}", here)
            shutil.rmtree(here)
        yield tally


def _attempt(tally: Tally, kind: ModuleType, prepared: object, name: str, folder: Path) -> None:
    try:
        tally.note(kind.attempt(prepared, random.Random(name), folder))
    except FlTaskarithError as error:
        message = str(error)
        if "\x1b" in message or "Traceback" in message or not 0 < len(message) < LONGEST_MESSAGE:
            tally.lose(f"{name}: {type(error).__name__} of {len(message)} characters: {message[:200]!r}")
        else:
            tally.note(f"refused: {type(error).__name__}")
    except SystemExit as ended:  # wrong usage, as argparse tells it
        if ended.code == 2:
            tally.note("refused: usage")
        else:
            tally.lose(f"{name}: SystemExit {ended.code}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.lose(f"{name}: {type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":  # python tests/trials/bad_inputs.py KIND CASES: one kind, for whoever writes it
    sys.path.insert(0, str(Path(__file__).parents[1]))  # shared fixtures
    with tempfile.TemporaryDirectory() as drawn_folder:
        for each in bad_inputs(int(sys.argv[2]), Path(drawn_folder), only=sys.argv[1]):
            print(each.fault, dict(each.outcomes), *each.lost[:20], sep="\n  ")
