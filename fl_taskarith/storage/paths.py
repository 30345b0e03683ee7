"""Where things lie. Never the working directory: Flower starts the app from wherever its SuperLink was started."""

import contextlib
import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from fl_taskarith.errors import ConfigError


def checkout() -> Path | None:
    """Return the folder of the editable install (PEP 610 `direct_url.json`), or None for any other kind of install.

    Flower runs a copy of this package, so `__file__` would point into Flower's own store.
    """
    try:
        record = metadata.distribution("fl-taskarith").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if record is None:
        return None
    source = json.loads(record)
    if not source.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlparse(source["url"]).path))


def resolve(path: str, key: str) -> Path:
    """Make `path` absolute: `~` is the home folder, a relative path lies in the installed checkout.

    Raises:
        ConfigError: a relative path, and the package is not installed with `pip install -e`; names `key`.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who is not a user here
        raise ConfigError(f'{key} = "{path}": {error}.') from error
    if given.is_absolute():
        return given
    root = checkout()
    if root is None:
        raise ConfigError(
            f'{key} = "{path}" is relative, and fl-taskarith is not installed from a checkout (pip install -e .), '
            f"so there is nothing it could be relative to: give {key} as an absolute path."
        )
    return root / given


def portable(path: Path) -> str:
    """Write an absolute path as a setting that also holds in another checkout: relative where it lies in this one."""
    root = checkout()
    return path.relative_to(root).as_posix() if root is not None and path.is_relative_to(root) else str(path)


def conf_folder() -> Path:
    """Return the folder of the settings files: conf/ of the checkout, or the copy that came with a wheel."""
    root = checkout() or _installed("fl_taskarith_conf")
    return (root if root is not None and (root / "conf").exists() else Path(__file__).parents[2]) / "conf"


def conf_file(name: Path | str) -> Path:
    """Return the file that a settings, study or benchmark file's path or name means.

    A path that is there is itself. Else it is sought beside `conf_folder`, and a name without ending below it: for
    example "fedavg-noniid" or "digits/six-models". One that is nowhere is returned as it is, for its reader to refuse.
    """
    path, root = Path(name), conf_folder().parent
    if path.exists():
        return path
    places = [root / path, *(root / folder / f"{name}.toml" for folder in ("conf", "conf/study", "conf/one-shot"))]
    return next((place for place in places if place.exists()), path)


def results_root(results_dir: str) -> Path:
    """Return the folder that holds all runs: `results-dir`, or `results/` of the checkout when it is empty.

    Raises:
        ConfigError: it is a file, or as `resolve`.
    """
    root = resolve(results_dir or "results", "results-dir")
    with contextlib.suppress(OSError):  # a path that cannot be: whoever writes there says so
        if root.is_file():
            raise ConfigError(f'results-dir = "{root}" is a file: expected a folder, which is made if need be.')
    return root


def shipped_file(relative: str) -> Path:
    """Return the path of a data file of this package, for example "models/vit_glyph.safetensors".

    Flower's app bundle carries source and text files only and runs a copy of the package without its weights, so a file
    missing beside this module is looked up in the installed package.
    """
    beside = Path(__file__).parents[1] / relative
    if beside.exists():
        return beside
    root = checkout()
    return root / "fl_taskarith" / relative if root is not None else _installed(f"fl_taskarith/{relative}") or beside


def _installed(relative: str) -> Path | None:
    """Return where an installed wheel has a file; None where the package is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return Path(str(metadata.distribution("fl-taskarith").locate_file(relative)))
    return None
