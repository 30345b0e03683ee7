"""A one-shot benchmark from its TOML file: tasks, levels of data and training heterogeneity, merging rules, seeds."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config import settings as configuration
from fl_taskarith.config.effects import ONE_BY_ONE, explain, refuse_idle
from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import find_rule, merge_rules
from fl_taskarith.one_shot.finetune import Spread
from fl_taskarith.one_shot.tasks import FAMILIES
from fl_taskarith.study.search import Search
from fl_taskarith.workspace.machine import on_this_machine

KEYS = ("title", "name", "seeds", "methods", "reference", "tasks", "settings", "data", "training", "search")
TASK_KEYS = {"family": str, "number": int, "heads": str, "folders": list}
TRAINING_KEYS = ("steps-spread", "learning-rate-spread", "batch-size-spread")  # in the order of `Spread`
SPLITS = ("train-subset", "test-subset", "validation-size", "calibration-size")  # of the data set
USED = frozenset(  # by fine-tuning, which does all else in one way only
    {"dataset", "data-dir", "download", "augmentation", "model", "weights", "input-size", "trainable-blocks", *SPLITS}
    | {"local-steps", "batch-size", "learning-rate", "momentum", "weight-decay", "dampening", "nesterov", "clip-norm"}
    | {"clients-at-once", "device", "threads", "precision", "optimizer-kernels"}
)
SETTINGS = {"mask-rule": "none", "trainable": "backbone", "strategy": "centralized"}  # what fine-tuning needs
SHARED_HEAD = ("class-groups", "superclasses")  # families whose tasks' labels mean the same


@dataclass(frozen=True)
class Cell:
    """One level of each heterogeneity, with one seed: tasks, models and merges of its own."""

    data: str
    overlap: float
    training: str
    spread: Spread
    seed: int


@dataclass(frozen=True)
class OneShot:
    """A benchmark. The first level of each heterogeneity is its lowest, the last its highest.

    Attributes:
        settings: of `Config`, for data, model and optimizer; local-steps is the mean over tasks.
        family, number, shared_head, folders: of the tasks.
        data: overlap by level; training: spread by level.
        methods: rules to merge by; reference: the one that others are compared with.
        rates: learning rates to choose from, on validation; empty if the settings give one.
    """

    title: str
    name: str
    source: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    family: str
    number: int
    shared_head: bool
    folders: tuple[str, ...]
    data: Mapping[str, float]
    training: Mapping[str, Spread]
    methods: tuple[str, ...]
    reference: str
    rates: tuple[float, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        """Every data level × training level × seed, seed by seed."""
        return [
            Cell(data, overlap, training, spread, seed)
            for seed in self.seeds
            for data, overlap in self.data.items()
            for training, spread in self.training.items()
        ]

    def config(self, seed: int = 0) -> Config:
        """Return the settings of fine-tuning."""
        return on_this_machine(configuration.from_mapping({**self.settings, **SETTINGS, "seed": seed}))

    def at_rate(self, rate: float) -> "OneShot":
        """Return the benchmark at another learning rate."""
        return dataclasses.replace(self, settings={**self.settings, "learning-rate": rate})

    def fingerprint(self, cell: Cell) -> str:
        """Return eight hexadecimal digits of all that decides a cell's numbers, but for its methods."""
        identity = [self.config(cell.seed).fingerprint(), self.family, self.number, self.shared_head, self.folders,
                    cell.overlap, asdict(cell.spread), cell.seed]  # fmt: skip
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]


def load_one_shot(path: Path, overrides: Mapping[str, Any] | None = None) -> OneShot:
    """Read and check a benchmark's file.

    Args:
        overrides: settings that take the place of those in [settings].

    Raises:
        ConfigError: names the file, the place, what was expected.
    """
    document = read_toml(path, "benchmark")
    try:
        return _one_shot(document, path, overrides or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _one_shot(document: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]) -> OneShot:
    _check_keys(document, KEYS, "benchmark")
    name, seeds = document.get("name"), document.get("seeds")
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}", name)
    _require(plain, f"name = {name!r}: expected a plain folder name.")
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    _require(whole, f"seeds = {seeds!r}: expected a list of whole numbers from 0.")
    methods, reference = document.get("methods", list(merge_rules())), document.get("reference", "task-arithmetic")
    listed = isinstance(methods, list) and reference in methods
    _require(listed, f"methods = {methods!r}, reference = {reference!r}: expected a list, the reference in it.")
    for method in methods:
        find_rule(str(method))
    tasks = _tasks(_table(document, "tasks"))
    settings = {**_table(document, "settings", {}), **overrides}
    given = {kebab(key) for key in settings}
    fixed, unread = sorted(given & (rules().keys() - USED)), sorted(given & set(SPLITS))
    _require(not fixed, f"[settings] {', '.join(fixed)}: the benchmark decides that itself; leave it out.")
    if tasks["folders"] and unread:
        raise ConfigError(f'[settings] {", ".join(unread)} has no effect under family = "folders": leave it out.')
    one_shot = OneShot(
        title=str(document.get("title", name)),
        name=str(name),
        source=path.name if path.is_absolute() else path.as_posix(),
        seeds=tuple(dict.fromkeys(document["seeds"])),
        settings=settings,
        **tasks,
        data={level: _overlap(table, place) for level, place, table in _levels(document, "data")},
        training={level: _spread(table, place) for level, place, table in _levels(document, "training")},
        methods=tuple(methods),
        reference=reference,
        rates=_rates(document, settings),
    )
    known = one_shot.rates or one_shot.config().learning_rate != AUTO
    _require(known, "give [settings] a learning-rate, or a [search] that chooses it on validation.")
    for rate in one_shot.rates or [one_shot.config().peak_rate]:
        one_shot.at_rate(rate).config()
    _refuse_idle(one_shot.config(), given)
    return one_shot


def _refuse_idle(config: Config, given: set[str]) -> None:
    """Refuse what fine-tuning would use under other settings; clients-at-once are tasks, and there are no clients."""
    refuse_idle(config, given & {"dampening"})
    one_by_one = next((idle for idle in ONE_BY_ONE if idle.holds(config)), None)
    if "clients-at-once" in given and config.clients_at_once != 1 and one_by_one is not None:
        raise ConfigError(explain(config, "clients-at-once", one_by_one))


def _rates(document: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the grid of [search], if there is one: as in a study, at least four decades."""
    if "search" not in document:
        return ()
    table = _table(document, "search")
    _check_keys(table, ("from", "to", "per-decade"), "[search]")
    contradiction = "[settings] learning-rate contradicts [search], which chooses it: leave one out."
    _require("learning-rate" not in settings, contradiction)
    try:
        return Search(float(table["from"]), float(table["to"]), table.get("per-decade", 2), (1,), 1, 0).rates
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"[search] needs the numbers from and to, and perhaps per-decade ({error!r}).") from error


def _tasks(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of `OneShot` that [tasks] gives."""
    _check_keys(table, TASK_KEYS, "[tasks]")
    for key, value in table.items():
        expected = TASK_KEYS[key]
        _require(type(value) is expected, f"[tasks] {key} = {value!r}: expected a {expected.__name__}.")
    family, folders = table.get("family", ""), tuple(table.get("folders", ()))
    _require(family in FAMILIES, f"[tasks] family = {family!r}: expected one of {', '.join(FAMILIES)}.")
    in_folders = family == "folders"
    _require(bool(folders) == in_folders, '[tasks] folders belong to family = "folders", which needs them.')
    number = len(folders) or table.get("number", 0)
    _require(number >= 2, f"[tasks] number = {number}: expected at least 2 tasks.")
    heads = table.get("heads", "shared" if family in SHARED_HEAD else "own")
    possible = ("own",) if in_folders else ("shared", "own")
    _require(heads in possible, f'[tasks] heads = {heads!r}: expected "shared" or "own" (folders: "own").')
    return {"family": family, "number": number, "shared_head": heads == "shared", "folders": folders}


def _levels(document: Mapping[str, Any], kind: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return name, place in the file and table of every level of one heterogeneity."""
    tables = document.get(kind)
    given = isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)
    _require(given, f"[[{kind}]]: expected at least one level, each with a name.")
    names = [table.get("name") for table in document[kind]]
    distinct = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
    _require(distinct, f"[[{kind}]] names = {names!r}: expected a different one for each level.")
    return [(name, f'[[{kind}]] "{name}"', table) for name, table in zip(names, document[kind], strict=True)]


def _overlap(table: Mapping[str, Any], place: str) -> float:
    _check_keys(table, ("name", "overlap"), place)
    return _number(table.get("overlap"), f"{place} overlap", 0, 1, "a number from 0 to 1")


def _spread(table: Mapping[str, Any], place: str) -> Spread:
    _check_keys(table, ("name", *TRAINING_KEYS), place)
    expected = "a number from 1 (the same for all) to 1000"
    values = (_number(table.get(key, 1.0), f"{place} {key}", 1, 1000, expected) for key in TRAINING_KEYS)
    return Spread(*values)


def _number(value: Any, place: str, low: float, high: float, expected: str) -> float:
    allowed = type(value) in (int, float) and low <= value <= high
    _require(allowed, f"{place} = {value!r}: expected {expected}.")
    return float(value)


def _table(document: Mapping[str, Any], key: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    table = document.get(key, default)
    _require(isinstance(table, dict), f"[{key}]: expected a table.")
    return dict(table or {})


def _check_keys(table: Mapping[str, Any], known: Collection[str], place: str) -> None:
    for key in table:
        _require(key in known, f'{place}: "{key}" is not known here; expected {", ".join(known)}.')


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ConfigError(message)
