"""The one reader of TOML files: settings, studies, benchmarks, authors, and the tables that the package ships."""

import re
import tomllib
from pathlib import Path
from typing import Any

from fl_taskarith.errors import ConfigError


def read_toml(path: Path | str, what: str = "file") -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without a byte order mark and with the line ends of any system.

    Args:
        what: the kind of file, for the message of an error.

    Raises:
        ConfigError: names the file, and the line that is not TOML.
    """
    try:
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        named = str(path) if str(path).isprintable() else ascii(str(path))
        raise ConfigError(f"Cannot read the {what} {named}: {error}.") from error


def place_of(path: Path | str, key: str) -> str:
    """Name the line of the file in which a top-level key, in kebab- or snake-case, is given: "FILE, line 3"."""
    given = re.compile(rf"\s*[\"']?{'[-_]'.join(map(re.escape, re.split('[-_]', key)))}[\"']?\s*=")
    lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    number = next((number for number, line in enumerate(lines, start=1) if given.match(line)), None)
    return f"{path}, line {number}" if number else str(path)
