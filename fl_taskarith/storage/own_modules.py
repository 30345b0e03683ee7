"""Modules of the user's own that the settings of a run name: by their content it is told whether they have changed."""

import importlib
import importlib.util
from collections.abc import Mapping
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
    """Return the SHA-256 of the file of each module that a setting names as "module:name", by that setting.

    It is that of the code in memory: a file that is edited after its import counts once it is imported again. Modules
    that these import are not covered.

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
        file = Path(spec.origin) if spec is not None and spec.origin is not None else None
        checksum = checksum_of_file(file) if file is not None and file.is_file() else ""
        _read[module] = spec, checksum
    return checksum
