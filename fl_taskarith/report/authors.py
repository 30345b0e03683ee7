"""Title and authors of a report, from the user's authors.toml."""

from dataclasses import dataclass
from pathlib import Path

from fl_taskarith.config.rule import Rule
from fl_taskarith.config.toml import read_table, read_toml
from fl_taskarith.errors import ConfigError

TITLE = "Federated learning under the lens of task arithmetic"
NEEDED, TEXT = Rule(str, "", 1, 500), Rule(str, "", 0, 500)
KINDS = {"name": NEEDED, "id": NEEDED, "affiliation": TEXT, "email": TEXT}


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
    try:
        table = read_table(document, {"title": TEXT, "author": [dict]}, "authors")
        authors = [
            Author(**read_table(each, KINDS, f"author {number}", ("name", "id")))
            for number, each in enumerate(table.get("author", ()), start=1)
        ]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return table.get("title", TITLE), authors
