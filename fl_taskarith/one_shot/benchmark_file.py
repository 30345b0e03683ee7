"""A one-shot benchmark from its TOML file: tasks, levels of data and training heterogeneity, merging rules, seeds."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config import settings as configuration
from fl_taskarith.config.effects import refuse_idle
from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.rule import AUTO, NAME, TEXT, Rule, shown
from fl_taskarith.config.settings import Config
from fl_taskarith.config.toml import Kind, read_table, read_toml
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import find_rule, merge_rules
from fl_taskarith.one_shot.finetune import Spread
from fl_taskarith.one_shot.tasks import FAMILIES
from fl_taskarith.study.search import GRID, Search, refuse_too_many
from fl_taskarith.workspace.machine import on_this_machine

BENCHMARK: Mapping[str, Kind] = {
    "title": TEXT, "name": NAME, "seeds": [rules()["seed"]], "reference": TEXT, "tasks": dict, "settings": dict,
    "methods": [Rule(str, "", choices=tuple(merge_rules()), importable=True)], "data": [dict], "training": [dict],
    "search": dict,
}  # fmt: skip
TASKS: Mapping[str, Kind] = {
    "family": Rule(str, "", choices=FAMILIES), "number": Rule(int, "", 2, 1000),
    "heads": Rule(str, "", choices=("shared", "own")), "folders": [Rule(str, "", 1)],
}  # fmt: skip
DATA: Mapping[str, Kind] = {"name": NAME, "overlap": Rule(float, "", 0, 1)}
SPREADS = ("steps-spread", "learning-rate-spread", "batch-size-spread")  # in the order of `Spread`; 1: the same for all
TRAINING: Mapping[str, Kind] = {"name": NAME, **dict.fromkeys(SPREADS, Rule(float, "", 1, 1000))}
SPLITS = ("train-subset", "test-subset", "validation-size", "calibration-size")  # of the data set
USED = frozenset(  # by fine-tuning, which does all else in one way only
    {"dataset", "data-dir", "download", "augmentation", "model", "weights", "input-size", "trainable-blocks", *SPLITS}
    | {"local-steps", "batch-size", "learning-rate", "momentum", "weight-decay", "dampening", "nesterov", "clip-norm"}
    | {"clients-at-once", "device", "threads", "precision", "optimizer-kernels", "prefix-cache"}
)
SETTINGS = {"mask-rule": "none", "trainable": "backbone", "strategy": "centralized"}  # what fine-tuning needs
SHARED_HEAD = ("class-groups", "superclasses")  # families on one data set's own images and labels


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

    settings: of `Config`, for data, model and optimizer; local-steps is the mean over tasks. family, number,
    shared_head, folders: of the tasks. data: overlap by level; training: spread by level. methods: rules to merge by;
    reference: the one that others are compared with. rates: learning rates to choose from, on validation; empty if the
    settings give one.
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
    """Read and check a benchmark's file; `overrides` take the place of settings in [settings].

    Raises:
        ConfigError: names the file, the place, what was expected.
    """
    document = read_toml(path, "benchmark")
    try:
        return _one_shot(document, path, overrides or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _one_shot(document: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]) -> OneShot:
    needed = ("name", "seeds", "tasks", "data", "training")
    table = read_table(document, BENCHMARK, "benchmark", needed)
    name, seeds = table["name"], table["seeds"]
    _require(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}", name), f"name = {shown(name)} is no plain folder name.")
    _require(seeds, "seeds = []: expected at least one seed.")
    methods, reference = table.get("methods", list(merge_rules())), table.get("reference", "task-arithmetic")
    _require(reference in methods, f"reference = {shown(reference)}: expected one of methods, {shown(methods)}.")
    for method in methods:
        find_rule(method)
    tasks = _tasks(read_table(table["tasks"], TASKS, "[tasks]", ("family",)))
    data = {level["name"]: level["overlap"] for level in _levels(table, "data", DATA, ("name", "overlap"))}
    spreads = {
        level["name"]: Spread(*(level.get(key, 1.0) for key in SPREADS))
        for level in _levels(table, "training", TRAINING, ("name",))
    }
    refuse_too_many(len(seeds) * len(data) * len(spreads), "cells")
    settings = {**table.get("settings", {}), **overrides}
    given = {kebab(key) for key in settings}
    fixed, unread = sorted(given & (rules().keys() - USED)), sorted(given & set(SPLITS))
    _require(not fixed, f"[settings] {', '.join(fixed)}: the benchmark decides that itself; leave it out.")
    if tasks["folders"] and unread:
        raise ConfigError(f'[settings] {", ".join(unread)} has no effect under family = "folders": leave it out.')
    one_shot = OneShot(
        title=table.get("title", name),
        name=name,
        source=path.name if path.is_absolute() else path.as_posix(),
        seeds=tuple(dict.fromkeys(seeds)),
        settings=settings,
        **tasks,
        data=data,
        training=spreads,
        methods=tuple(methods),
        reference=reference,
        rates=_rates(table, given),
    )
    known = one_shot.rates or one_shot.config().learning_rate != AUTO
    _require(known, "give [settings] a learning-rate, or a [search] that chooses it on validation.")
    _require(
        one_shot.config().prefix_cache == "off" or one_shot.family in SHARED_HEAD,
        "[settings] prefix-cache keeps the tokens of a data set's own images, and the tasks of family = "
        f'"{one_shot.family}" have others: set it to "off".',
    )
    for rate in one_shot.rates or [one_shot.config().peak_rate]:
        one_shot.at_rate(rate).config()
    refuse_idle(one_shot.config(), given & {"dampening"})
    return one_shot


def _rates(document: Mapping[str, Any], given: set[str]) -> tuple[float, ...]:
    """Return the grid of [search], if there is one: as in a study, at least four decades."""
    if "search" not in document:
        return ()
    table = read_table(document["search"], GRID, "[search]", ("from", "to"))
    contradiction = "[settings] learning-rate contradicts [search], which chooses it: leave one out."
    _require("learning-rate" not in given, contradiction)
    try:
        return Search(table["from"], table["to"], table.get("per-decade", 2), (1,), 1, (0,)).rates
    except ConfigError as error:
        raise ConfigError(f"[search]: {error}") from None


def _tasks(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of `OneShot` that [tasks] gives."""
    family, folders = table["family"], tuple(table.get("folders", ()))
    in_folders = family == "folders"
    _require(bool(folders) == in_folders, '[tasks] folders belong to family = "folders", which needs them.')
    _require(not (in_folders and "number" in table), "[tasks] number is that of the folders: leave it out.")
    number = len(folders) if in_folders else table.get("number", 0)
    _require(number >= 2, f"[tasks] number = {number}: expected at least 2 tasks.")
    heads = table.get("heads", "shared" if family in SHARED_HEAD else "own")
    _require(not (in_folders and heads == "shared"), '[tasks] heads = "shared": folders have heads of their "own".')
    return {"family": family, "number": number, "shared_head": heads == "shared", "folders": folders}


def _levels(
    document: Mapping[str, Any], kind: str, keys: Mapping[str, Kind], needed: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the table of every level of one heterogeneity, in order."""
    levels = [read_table(table, keys, f"[[{kind}]]", needed) for table in document[kind]]
    names = [level["name"] for level in levels]
    _require(names, f"[[{kind}]]: expected at least one level.")
    _require(len(set(names)) == len(names), f"[[{kind}]] names = {shown(names)}: expected a different one for each.")
    return levels


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ConfigError(message)
