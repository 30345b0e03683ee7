"""A study from its TOML file; fl_taskarith/study/README.md shows one."""

import difflib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_taskarith.config.effects import explain, idle_reason
from fl_taskarith.config.fields import kebab
from fl_taskarith.config.rule import Scalar, to_toml
from fl_taskarith.config.settings import from_mapping, idle_by_itself
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.search import Search

Table = Mapping[str, Any]

# What the runner itself decides for every run.
RUNNER_KEYS = ("seed", "shard-seed", "results-dir", "run-name", "resume", "save-model", "draw-curves")
STUDY_KEYS = ("title", "name", "seeds", "reference", "settings", "search", "grid", "group", "arm")
SEARCH_KEYS = ("from", "to", "per-decade", "rounds", "keep", "seed")
TEXT, INTEGER, NUMBER, TABLE, LIST = "a string", "a whole number", "a number", "a table", "a list"
INTEGERS = "whole numbers, for example [0, 1, 2]"
KINDS: Mapping[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str),
    INTEGER: lambda value: type(value) is int,
    NUMBER: lambda value: type(value) in (int, float),
    TABLE: lambda value: isinstance(value, dict),
    LIST: lambda value: isinstance(value, list),
    INTEGERS: lambda value: isinstance(value, list) and all(type(each) is int for each in value),
}
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
    _check_keys(document, STUDY_KEYS, "study")
    name = _value(document, "name", TEXT, "study")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,100})?", name):
        raise ConfigError(
            f'name = "{name}" is no plain folder name: use letters, digits, ".", "_" and "-", beginning with a letter, '
            'digit or underscore, or two such names as in "family/part" for studies that share runs.'
        )
    seeds = tuple(_value(document, "seeds", INTEGERS, "study"))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}: expected at least one seed, each once.")
    given = _settings({"settings": dict(overrides)}, "command line")
    in_file = _settings(document, "study")
    shared = in_file | given
    words = [path.name if path.is_absolute() else path.as_posix(), *(shown_setting(*item) for item in given.items())]
    search = _search(_value(document, "search", TABLE, "study"), "[search]") if "search" in document else None
    if search is not None and "learning-rate" in shared:
        raise ConfigError(
            "[settings] learning-rate contradicts [search], which chooses it: leave one out, or give a learning-rate "
            "to the arms that are not to be searched."
        )
    study = Study(
        title=_value(document, "title", TEXT, "study", name),
        name=name,
        source=" ".join(words),
        seeds=seeds,
        reference=_value(document, "reference", TEXT, "study", ""),
        references={
            table["name"]: _value(table, "reference", TEXT, "[[group]]")
            for table in _tables(document, "group")
            if "reference" in table and "name" in table
        },
        shared=shared,
        search=search,
        arms=_arms(document, shared),
    )
    _refuse_idle(study, in_file, given)
    return study


def _refuse_idle(study: Study, in_file: Mapping[str, Scalar], overrides: Mapping[str, Scalar]) -> None:
    """Refuse settings of the file that have no effect: an arm's own, or shared ones in every arm."""
    everywhere: dict[str, str] | None = None
    for arm in study.arms:
        keys = arm.own.keys() | (in_file.keys() - overrides.keys())
        found = idle_by_itself(from_mapping(arm.settings), {**in_file, **arm.own}, keys)
        if own := [found[key] for key in found if key in arm.own]:
            raise ConfigError(f'arm "{arm.title}": {" ".join(own)}')
        everywhere = found if everywhere is None else {key: everywhere[key] for key in everywhere if key in found}
    if everywhere:
        raise ConfigError(f"[settings], in every arm: {' '.join(everywhere.values())}")


def _search(table: Table, place: str) -> Search:
    _check_keys(table, SEARCH_KEYS, place)
    try:
        return Search(
            low=float(_value(table, "from", NUMBER, place)),
            high=float(_value(table, "to", NUMBER, place)),
            per_decade=_value(table, "per-decade", INTEGER, place, 2),
            rounds=tuple(_value(table, "rounds", INTEGERS, place)),
            keep=_value(table, "keep", INTEGER, place, 2),
            seed=_value(table, "seed", INTEGER, place, 0),
        )
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(place) else f"{place}: {message}") from None


def _own_search(arm: Table, document: Table, place: str) -> Search | None:
    """Return the study's [search], overridden by the arm's own; the seed is the same for all arms."""
    if "search" not in arm:
        return None
    own = _value(arm, "search", TABLE, place)
    if "search" not in document:
        raise ConfigError(f"{place}: search changes the study's [search], and there is none: add it.")
    if "seed" in own:
        raise ConfigError(f"{place}: search has no seed of its own: set that of all arms in [search].")
    return _search({**document["search"], **own}, f"{place}: search")


def _arms(document: Table, shared: Mapping[str, Scalar]) -> tuple[Arm, ...]:
    """Return every arm in every group (or in those that it names), times the grid, group by group."""
    groups: dict[str, Mapping[str, Scalar]] = {}
    for table in _tables(document, "group"):
        _check_keys(table, ("name", "settings", "reference"), "[[group]]")
        name = _value(table, "name", TEXT, "[[group]]")
        if name in groups:
            raise ConfigError(f'[[group]] "{name}" is given twice.')
        groups[name] = _settings(table, f'[[group]] "{name}"')
    everywhere = list(groups) or [""]
    variants = _variants(document)
    arms = []
    for table in _tables(document, "arm") or ([{"name": ""}] if "grid" in document else []):
        _check_keys(table, ("name", "group", "settings", "same-rate-as", "search"), "[[arm]]")
        name = _value(table, "name", TEXT, "[[arm]]")
        place = f'[[arm]] "{name}"'
        settings, same_rate_as = _settings(table, place), _value(table, "same-rate-as", TEXT, place, "")
        search = _own_search(table, document, place)
        for group in _groups(table, place) if "group" in table else everywhere:
            for variant, varied in variants:
                own = {**groups.get(group, {}), **settings}
                if twice := sorted(own.keys() & varied.keys()):
                    raise ConfigError(
                        f"{place}: [grid] takes the place of its {', '.join(twice)}: leave one of them out."
                    )
                own |= varied
                arms.append(Arm(group, name, variant, {**shared, **own}, same_rate_as, search, own))
    order = list(dict.fromkeys([*groups, *(arm.group for arm in arms)]))
    return tuple(sorted(arms, key=lambda arm: order.index(arm.group)))


def _groups(table: Table, place: str) -> list[str]:
    """Return the groups that an arm names: a string, or a list of strings."""
    named = table["group"]
    groups = named if isinstance(named, list) else [named]
    if not groups or any(not isinstance(group, str) for group in groups):
        raise ConfigError(f"{place}: group = {named!r}: expected the name of a group, or a list of names.")
    return groups


def _variants(document: Table) -> list[tuple[str, dict[str, Scalar]]]:
    """Return the cartesian product of the [grid]'s lists with labels; one empty variant without a grid."""
    grid = _value(document, "grid", TABLE, "study", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"[grid] {key} = {values!r}: expected a list of values, for example [4, 8].")
        _refuse_runner_key(kebab(key), "[grid]")
    products = itertools.product(*grid.values())
    settings = [dict(zip(map(kebab, grid), values, strict=True)) for values in products]
    return [(", ".join(f"{key} = {_plain(value)}" for key, value in one.items()), one) for one in settings]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else to_toml(value)


def _settings(table: Table, place: str) -> dict[str, Scalar]:
    """Return the `settings` of a table in kebab-case; their values are checked with the runs they make."""
    settings = _value(table, "settings", TABLE, place, {})
    for key in settings:
        _refuse_runner_key(kebab(key), f"{place} settings")
    return {kebab(key): value for key, value in settings.items()}


def _refuse_runner_key(key: str, place: str) -> None:
    if key in RUNNER_KEYS:
        raise ConfigError(
            f"{place}: {key} is set by the study itself (seeds gives the seeds, --results-dir the place): leave it out."
        )


def _tables(document: Table, key: str) -> list[Table]:
    tables = _value(document, key, LIST, "study", [])
    if not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{key}: expected tables, each beginning with a line [[{key}]].")
    return list(tables)


def _check_keys(table: Table, known: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'did you mean "{nearest[0]}"?' if nearest else "known keys: " + ", ".join(known)
            raise ConfigError(f'{place}: "{key}" is not a key; {hint}')


def _value(table: Table, key: str, kind: str, place: str, default: Any = None) -> Any:
    """Return table[key] if it is of that kind (a key of `KINDS`); `default` if the key is absent and may be.

    Raises:
        ConfigError: names the place, the key and the kind.
    """
    if key not in table:
        if default is None:
            raise ConfigError(f"{place}: {key} is missing; expected {kind}.")
        return default
    if not KINDS[kind](table[key]):
        raise ConfigError(f"{place}: {key} = {table[key]!r}: expected {kind}.")
    return table[key]
