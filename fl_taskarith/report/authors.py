"""Title and authors of a report, from the user's authors.toml."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError

TITLE = "Federated learning under the lens of task arithmetic"


@dataclass(frozen=True)
class Author:
    """One author; affiliation and email may be empty."""

    name: str
    id: str
    affiliation: str = ""
    email: str = ""


def read_authors(path: Path) -> tuple[str, list[Author]]:
    """Read the title and the authors of an authors.toml.

    Raises:
        ConfigError: it cannot be read, or lacks a name or id; names the place.
    """
    document = read_toml(path, "authors")
    tables, title = document.pop("author", []), document.pop("title", TITLE)
    for key in document:
        nearest = difflib.get_close_matches(key, ("author", "title"), n=1, cutoff=0.0)
        raise ConfigError(f'{path}: "{key}" is not a key; did you mean "{nearest[0]}"?')
    if not isinstance(title, str) or not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise ConfigError(f'{path}: expected title = "..." and tables that each begin with a line [[author]].')
    known = [field.name for field in fields(Author)]
    for index, table in enumerate(tables, start=1):
        for key, value in table.items():
            if key not in known or not isinstance(value, str):
                raise ConfigError(
                    f"{path}: author {index}: {key} = {value!r}: expected strings under {', '.join(known)}."
                )
        if not table.get("name") or not table.get("id"):
            raise ConfigError(f"{path}: author {index} needs a name and an id.")
    return title, [Author(**table) for table in tables]
