"""A study from its TOML file; fl_taskarith/study/README.md shows one."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_taskarith.config.effects import explain, idle_reason
from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.rule import NAME, TEXT, Rule, Scalar, shown, to_toml
from fl_taskarith.config.settings import from_mapping, idle_by_itself
from fl_taskarith.config.toml import Kind, read_table, read_toml
from fl_taskarith.errors import ConfigError
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.search import BY, GRID, Search, refuse_too_many

Table = Mapping[str, Any]

# What the runner itself decides for every run.
RUNNER_KEYS = ("seed", "shard-seed", "results-dir", "run-name", "resume", "save-model", "draw-curves")
STUDY: Mapping[str, Kind] = {
    "title": TEXT, "name": NAME, "seeds": [rules()["seed"]], "shard-seeds": [rules()["shard-seed"]], "reference": TEXT,
    "settings": dict, "search": dict, "grid": dict, "group": [dict], "arm": [dict], "primary": [dict],
}  # fmt: skip
PRIMARY: Mapping[str, Kind] = {"arm": NAME, "against": NAME, "group": NAME}
GROUP: Mapping[str, Kind] = {"name": NAME, "settings": dict, "reference": TEXT}
ARM: Mapping[str, Kind] = {"name": TEXT, "settings": dict, "same-rate-as": TEXT, "search": dict}
SEARCH: Mapping[str, Kind] = {
    **GRID, "rounds": [rules()["num-rounds"]], "keep": Rule(int, "", 1), "seed": rules()["seed"],
    "seeds": [rules()["seed"]], "by": Rule(str, "", choices=BY), "also": dict, "bracket": Rule(bool, ""),
    "last-seeds": [rules()["seed"]],
}  # fmt: skip
PATH_KEYS = ("data-dir", "weights", "mask-file")  # what lies where differs from machine to machine


def load_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read one study file; see `load_studies`."""
    return load_studies([path], overrides)[0]


def load_studies(paths: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> list[Study]:
    """Read and check study files: their form, and the configuration of every run they ask for.

    Args:
        overrides: settings that take the place of those in each [settings], for example where this machine keeps data.

    Raises:
        ConfigError: names the file, the place, what was expected. A setting of an arm, its group or the grid that has
            no effect in the arm is one, too; one of [settings] that has none in any arm; and an override that has none
            in any arm of any file.
    """
    studies = [_load(path, overrides or {}) for path in paths]
    named: dict[str, Path] = {}
    for path, study in zip(paths, studies, strict=True):
        if (other := named.setdefault(study.name, path)) is not path:
            raise ConfigError(f'{path}: name = "{study.name}" is that of {other}, too, and they would share a folder.')
    arms = [arm for study in studies for arm in study.arms]
    for key in map(kebab, overrides or {}):
        reached = [arm for arm in arms if key not in arm.own]
        if arms and not reached:
            raise ConfigError(f"command line: {key} has no effect, for every arm has its own: leave it out.")
        reasons = [(config, idle_reason(config, key)) for config in (from_mapping(arm.settings) for arm in reached)]
        if reasons and all(idle is not None for _, idle in reasons):
            config, idle = reasons[0]
            assert idle is not None
            raise ConfigError(f"command line, in every arm: {explain(config, key, idle)}")
    return studies


def _load(path: Path, overrides: Mapping[str, Any]) -> Study:
    document = read_toml(path, "study")
    try:
        return _study(document, path, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def shown_setting(key: str, value: Scalar) -> str:
    """Return `key = value` for readers elsewhere: of a path, the file's name alone."""
    if key in PATH_KEYS and isinstance(value, str) and "/" in value:
        value = "DATA" if key == "data-dir" else f"DATA/{Path(value).name}"
    return f"{key}={to_toml(value)}"


def _study(document: Table, path: Path, overrides: Mapping[str, Any]) -> Study:
    if "images-per-second" in document:
        raise ConfigError("images-per-second is measured where a study is listed or run: leave it out.")
    if misplaced := [key for key in document if kebab(key) in rules() and kebab(key) not in RUNNER_KEYS]:
        raise ConfigError(f"study: {', '.join(misplaced)} are settings of runs: put them below a line [settings].")
    table = read_table(document, STUDY, "study", ("name", "seeds"))
    name, seeds = table["name"], tuple(table["seeds"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,100})?", name):
        raise ConfigError(
            f'name = {shown(name)} is no plain folder name: use letters, digits, ".", "_" and "-", beginning with a '
            'letter, digit or underscore, or two such names as in "family/part" for studies that share runs.'
        )
    shard_seeds = tuple(table.get("shard-seeds", ()))
    for key, given_seeds in {"seeds": seeds, "shard-seeds": shard_seeds}.items():
        if (key in table and not given_seeds) or len(set(given_seeds)) < len(given_seeds):
            raise ConfigError(f"{key} = {shown(list(given_seeds))}: expected at least one seed, each once.")
    given = _settings({"settings": dict(overrides)}, "command line")
    in_file = _settings(table, "study")
    shared = in_file | given
    words = [path.name if path.is_absolute() else path.as_posix(), *(shown_setting(*item) for item in given.items())]
    search = _search(table["search"], "[search]") if "search" in table else None
    if search is not None and "learning-rate" in shared:
        raise ConfigError(
            "[settings] learning-rate contradicts [search], which chooses it: leave one out, or give a learning-rate "
            "to the arms that are not to be searched."
        )
    groups = _groups(table)
    study = Study(
        title=table.get("title", name),
        name=name,
        source=" ".join(words),
        seeds=seeds,
        reference=table.get("reference", ""),
        references={name: group["reference"] for name, group in groups.items() if "reference" in group},
        shared=shared,
        search=search,
        arms=_arms(table, groups, shared, len(seeds) * max(1, len(shard_seeds))),
        shard_seeds=shard_seeds,
        primary=tuple(
            (each["arm"], each["against"], each.get("group", ""))
            for each in (
                read_table(one, PRIMARY, "[[primary]]", ("arm", "against")) for one in table.get("primary", ())
            )
        ),
    )
    _refuse_idle(study, in_file, given)
    return study


def _refuse_idle(study: Study, in_file: Mapping[str, Scalar], overrides: Mapping[str, Scalar]) -> None:
    """Refuse settings of the file that have no effect: an arm's own, or shared ones in every arm."""
    everywhere: dict[str, str] | None = None
    for arm in study.arms:
        search = study.searched(arm)
        own = {**arm.own, **({} if search is None else dict(search.points[0][1]))}
        keys = own.keys() | (in_file.keys() - overrides.keys())
        found = idle_by_itself(from_mapping({**arm.settings, **own}), {**in_file, **own}, keys)
        if idle := [found[key] for key in found if key in own]:
            raise ConfigError(f'arm "{arm.title}": {" ".join(idle)}')
        everywhere = found if everywhere is None else {key: everywhere[key] for key in everywhere if key in found}
    if everywhere:
        raise ConfigError(f"[settings], in every arm: {' '.join(everywhere.values())}")


def _search(table: Table, place: str) -> Search:
    checked = read_table(table, SEARCH, place, ("from", "to", "rounds"))
    if "seed" in checked and "seeds" in checked:
        raise ConfigError(f"{place}: give seed or seeds, not both.")
    also = _lists(checked.get("also", {}), f"{place} also")
    if decided := [key for key in also if key in ("learning-rate", "num-rounds")]:
        raise ConfigError(f"{place} also: {decided[0]} is what a search decides by itself: leave it out.")
    try:
        return Search(
            low=checked["from"],
            high=checked["to"],
            per_decade=checked.get("per-decade", 2),
            rounds=tuple(checked["rounds"]),
            keep=checked.get("keep", 2),
            seeds=tuple(checked.get("seeds", [checked.get("seed", 0)])),
            by=checked.get("by", "accuracy"),
            also=tuple((key, tuple(values)) for key, values in also.items()),
            bracket=checked.get("bracket", False),
            last_seeds=tuple(checked.get("last-seeds", ())),
        )
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _own_search(arm: Table, study: Table, place: str) -> Search | None:
    """Return the study's [search], overridden by the arm's own; the seed is the same for all arms."""
    if "search" not in arm:
        return None
    if "search" not in study:
        raise ConfigError(f"{place}: search changes the study's [search], and there is none: add it.")
    if {"seed", "seeds", "last-seeds"} & arm["search"].keys():
        raise ConfigError(f"{place}: search has no seed of its own: set that of all arms in [search].")
    return _search({**study["search"], **arm["search"]}, f"{place}: search")


def _groups(study: Table) -> dict[str, Table]:
    """Return the tables [[group]] by name."""
    groups: dict[str, Table] = {}
    for table in study.get("group", ()):
        group = read_table(table, GROUP, "[[group]]", ("name",))
        if group["name"] in groups:
            raise ConfigError(f'[[group]] "{group["name"]}" is given twice.')
        groups[group["name"]] = group
    return groups


def _arms(study: Table, groups: Mapping[str, Table], shared: Mapping[str, Scalar], seeds: int) -> tuple[Arm, ...]:
    """Return every arm in every group (or in those that it names), times the grid, group by group."""
    of_group = {name: _settings(group, f'[[group]] "{name}"') for name, group in groups.items()}
    tables = study.get("arm") or ([{"name": ""}] if "grid" in study else [])
    grid = _lists(study.get("grid", {}), "[grid]")
    members = [_groups_of(table, f"[[arm]] {shown(table.get('name'))}") or list(groups) or [""] for table in tables]
    refuse_too_many(sum(map(len, members)) * math.prod(map(len, grid.values())) * seeds)
    variants, arms = _variants(grid), []
    for table, its_groups in zip(tables, members, strict=True):
        arm = read_table({key: value for key, value in table.items() if key != "group"}, ARM, "[[arm]]", ("name",))
        place = f'[[arm]] "{arm["name"]}"'
        settings, search = _settings(arm, place), _own_search(arm, study, place)
        for group, (variant, varied) in itertools.product(its_groups, variants):
            own = {**of_group.get(group, {}), **settings}
            if twice := sorted(own.keys() & varied.keys()):
                raise ConfigError(f"{place}: [grid] takes the place of its {', '.join(twice)}: leave one of them out.")
            own |= varied
            arms.append(Arm(group, arm["name"], variant, {**shared, **own}, arm.get("same-rate-as", ""), search, own))
    if groups:
        named = [group for its_groups in members for group in its_groups]
        if unknown := [group for group in named if group not in groups]:
            raise ConfigError(
                f"group = {shown(unknown[0])}: there is no such [[group]]; they are {', '.join(map(shown, groups))}."
            )
        if empty := [group for group in groups if group not in named]:
            raise ConfigError(f"[[group]] {shown(empty[0])} has no arm: leave it out, or name it in an arm's group.")
    order = {group: place for place, group in enumerate(dict.fromkeys([*groups, *(arm.group for arm in arms)]))}
    return tuple(sorted(arms, key=lambda arm: order[arm.group]))


def _groups_of(table: Table, place: str) -> list[str]:
    """Return the groups that an arm names, a string or a list of strings; none if it names none."""
    named = table.get("group", ())
    groups = [named] if isinstance(named, str) else list(named) if isinstance(named, (list, tuple)) else []
    if ("group" in table and not groups) or any(not isinstance(group, str) for group in groups):
        raise ConfigError(f"{place}: group = {shown(named)}: expected the name of a group, or a list of names.")
    return [NAME.check(f"{place}: group", group) for group in groups]  # type: ignore[misc]


def _lists(table: Table, place: str) -> dict[str, list[Any]]:
    """Return the lists of values of settings, by key in kebab-case."""
    lists: dict[str, list[Any]] = {}
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            name = shown(key).strip('"')
            raise ConfigError(f"{place} {name} = {shown(values)}: expected a list of values, for example [4, 8].")
        _refuse_runner_key(kebab(key), place)
        if kebab(key) in lists:
            raise ConfigError(f"{place} {kebab(key)} is given twice.")
        lists[kebab(key)] = values
    return lists


def _variants(grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Scalar]]]:
    """Return the cartesian product of the grid's lists with labels; one empty variant without a grid."""
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [(", ".join(f"{key} = {_plain(value)}" for key, value in one.items()), one) for one in settings]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else to_toml(value) if isinstance(value, (int, float)) else shown(value)


def _settings(table: Table, place: str) -> dict[str, Scalar]:
    """Return the `settings` of a table in kebab-case; their values are checked with the runs they make."""
    settings: dict[str, Scalar] = {}
    for key, value in table.get("settings", {}).items():
        _refuse_runner_key(kebab(key), f"{place} settings")
        if kebab(key) in settings:
            raise ConfigError(f"{place} settings: {shown(kebab(key))} is given twice.")
        settings[kebab(key)] = value
    return settings


def _refuse_runner_key(key: str, place: str) -> None:
    if key in RUNNER_KEYS:
        raise ConfigError(
            f"{place}: {key} is set by the study itself (seeds gives the seeds, --results-dir the place): leave it out."
        )
