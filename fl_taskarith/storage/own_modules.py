"""Modules of the user's own that the settings of a run name: by their content it is told whether they have changed."""

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from fl_taskarith.config.fields import rules
from fl_taskarith.config.rule import IMPORTABLE
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError, imported
from fl_taskarith.storage.verified_files import checksum_of_file

OWN_MODULES = "own_modules"  # in run.json: checksums by setting

_read: dict[str, tuple[ModuleSpec | None, str]] = {}  # by module: as it was when it was imported


def own_modules(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each module that a setting names as "module:name", by that setting.

    It covers the module's file and, unless it is installed, the files it imports that lie beside it, directly or
    through one another. It is that of the code in memory: a file that is edited after its import counts once the module
    is imported again.

    Raises:
        ConfigError: one cannot be imported.
    """
    settings = config.to_run_config()
    named = {key: str(settings[key]) for key, rule in rules().items()
             if rule.importable and IMPORTABLE.fullmatch(str(settings[key]))}  # fmt: skip
    return {key: _checksum(key, name) for key, name in named.items()}


def changed_modules(record: Mapping[str, Any] | None, config: Config) -> list[str]:
    """Return the settings whose modules are not as they were when the run of `record`, a run.json, was done.

    Where one cannot be imported, nothing is known of it: [].
    """
    before = (record or {}).get(OWN_MODULES, {})
    try:
        return [key for key, checksum in own_modules(config).items() if before.get(key, checksum) != checksum]
    except ConfigError:
        return []


def _checksum(key: str, name: str) -> str:
    imported(key, name)
    module = name.partition(":")[0]
    spec = importlib.import_module(module).__spec__
    known, checksum = _read.get(module, (None, ""))
    if known is not spec or known is None:
        checksums = [checksum_of_file(file) for file in _files(module)]
        checksum = checksums[0] if len(checksums) == 1 else sha256("".join(checksums).encode()).hexdigest()
        _read[module] = spec, checksum
    return checksum


def _files(module: str) -> list[Path]:
    """Return the files of an imported module and of all it imports from its own package or its own folder.

    Of an installed package, which may be large and is not edited, only the module's own file.
    """
    top = module.partition(".")[0]
    tree = (_file(top) or Path()).parent
    if "site-packages" in tree.parts:
        return [file for file in (_file(module),) if file is not None]
    files: dict[str, Path | None] = {}
    to_read = [module]
    while to_read:
        name = to_read.pop()
        if name not in files:
            files[name] = _file(name)
            tops = {other: other.partition(".")[0] for other in _imports(name)}
            to_read += [other for other, its_top in tops.items() if its_top == top or _is_beside(its_top, tree)]
    return [file for _, file in sorted(files.items()) if file is not None]


def _is_beside(top: str, tree: Path) -> bool:
    file = None if top == __name__.partition(".")[0] else _file(top)
    return file is not None and file.is_relative_to(tree) and "site-packages" not in file.parts


def _file(module: str) -> Path | None:
    """Return the file of a module's source, None where there is no such module or no such file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):  # of a name that is no module, such as a class in one
        return None
    file = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return file if file is not None and file.is_file() else None


def _imports(module: str) -> Iterator[str]:
    """Yield the full names that a module's source imports, among them classes and functions."""
    file = _file(module)
    if file is None or file.suffix != ".py":
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, OSError):  # of a file that has not been imported yet
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: length + 1]) for length in range(len(parts)))
