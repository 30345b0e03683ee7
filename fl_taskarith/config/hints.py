"""What is said about a name that is no setting: what people call the settings elsewhere, then how it is spelt.

`other_names.toml` is the table of the names.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fl_taskarith.config.fields import rules
from fl_taskarith.config.toml import nearest, read_toml


def hint(name: str) -> str:
    """Return what to write in place of `name`, a word in kebab-case that is no setting."""
    table = other_names()
    return table.get(name) or table.get(name.lower()) or nearest(name, rules())


def is_known(name: str) -> bool:
    """Whether `name`, in kebab-case, is a setting, or what one is called elsewhere."""
    return name in rules() or name in other_names() or name.lower() in other_names()


@cache
def other_names() -> Mapping[str, str]:
    """Return what to write in place of each name that is known from elsewhere, or from a paper's symbols."""
    document = read_toml(Path(__file__).with_name("other_names.toml"))
    named: dict[str, list[str]] = {}
    for key, rule in rules().items():
        for name in (rule.symbol, *document["same"].get(key, ())):
            named.setdefault(name, []).append(f'"{key}"')
    table = {name: f"did you mean {' or '.join(keys)}?" for name, keys in named.items() if name}
    return table | {name: each["instead"] for each in document["other"] for name in each["names"]}
