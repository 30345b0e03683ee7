"""One frozen, checked configuration. Everything a run does follows from it.

TOML files and Flower's run-config spell the keys in kebab-case (`num-clients`), Python in snake_case (`num_clients`).
Flower carries flat scalars only and checks no types, so every check is here, before any data is touched.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.effects import contradictions, explain, idle_reason, refuse_idle
from fl_taskarith.config.fields import Settings, kebab, rules, snake
from fl_taskarith.config.hints import hint
from fl_taskarith.config.rule import AUTO, Scalar, shown
from fl_taskarith.config.toml import place_of, read_toml
from fl_taskarith.errors import ConfigError


@dataclass(frozen=True)
class Config(Settings):
    """The settings of a run, checked: each by its rule, and all against one another."""

    def __post_init__(self) -> None:
        for key, rule in rules().items():
            name = snake(key)
            object.__setattr__(self, name, rule.check(key, getattr(self, name)))
        for message in contradictions(self):
            raise ConfigError(message)

    def to_run_config(self) -> dict[str, Scalar]:
        """Return all settings as Flower's flat kebab-case mapping."""
        return {kebab(name): value for name, value in dataclasses.asdict(self).items()}

    def fingerprint(self) -> str:
        """Eight hexadecimal digits of the settings that decide the numbers (`IDENTITY_KEYS`), the defaults left out.

        So a run keeps its name when a later version of this package has more settings. A folder's run.json holds them
        all, and `differing_keys` finds what a name does not tell.
        """
        return _digest(self.to_run_config(), IDENTITY_KEYS)

    def differing_keys(self, other: Mapping[str, Scalar]) -> list[str]:
        """Keys of `IDENTITY_KEYS`, but for `SWITCHABLE_KEYS`, on which the run-config mapping `other` disagrees.

        A key that `other` lacks counts as its default: what a version without that setting did.
        """
        mine = self.to_run_config()
        watched = {"evaluate-every"} if self.early_stopping_patience else set()  # it decides where the run stops
        compared = IDENTITY_KEYS - (SWITCHABLE_KEYS - watched)
        return [
            key
            for key in mine
            if key in compared and _settled(key, other.get(key, RECORDED_DEFAULTS[key])) != _settled(key, mine[key])
        ]

    def extends(self, other: Mapping[str, Scalar], done: int) -> bool:
        """Whether a run of the settings `other`, after `done` rounds, can go on exactly as a run of these.

        The settings differ in `num-rounds` at most, and no round so far depended on how many there were to be.
        """
        before = int(other.get("num-rounds", RECORDED_DEFAULTS["num-rounds"]))
        same_length = before == self.num_rounds
        return (
            not set(self.differing_keys(other)) - {"num-rounds"}
            and done <= self.num_rounds
            and (same_length or (
                done < self.num_rounds
                and self.schedule in LENGTH_FREE_SCHEDULES
                and self.dataset != REGRESSION
                and min(before, self.num_rounds) > self.head_rounds
                # The head was solved again after the last round, whatever its number.
                and not (self.ridge_refresh and done == before and done % self.ridge_refresh)
            ))
        )  # fmt: skip


# Where a run lives, how often it saves and which engine carries it do not change a number; every other key does.
OPERATIONAL_KEYS = frozenset(
    {"data-dir", "download", "results-dir", "run-name", "resume"}
    | {"client-timeout"}
    | {"engine", "checkpoint-every", "save-model", "draw-curves", "tensorboard", "wandb"}
)
IDENTITY_KEYS = frozenset(rules()) - OPERATIONAL_KEYS
# An interrupted run may go on with another value of these; they decide single rows, or rounding, and not the course.
SWITCHABLE_KEYS = frozenset({"on-client-failure", "evaluate-every", "device"})
# What makes the files of one run another's: all that decides numbers, but for how long it goes on and its rounding.
COURSE_KEYS = IDENTITY_KEYS - SWITCHABLE_KEYS - {"num-rounds", "threads"}
LENGTH_FREE_SCHEDULES = ("constant", "plateau")  # whose rates do not depend on the number of rounds
CHOSEN_KEYS = frozenset({"seed", "shard-seed", "learning-rate"})  # of a single run, not of an arm of a study
# What a setting that a record or a name lacks was: today's defaults, and what they were before "auto" was one.
RECORDED_DEFAULTS: dict[str, Any] = {kebab(field.name): field.default for field in dataclasses.fields(Config)} | {
    "learning-rate": 1.0,
    "precision": "fp32",
    "compile": "off",
}


def course_of(settings: Mapping[str, Scalar]) -> str:
    """Return eight hexadecimal digits of `COURSE_KEYS` in recorded settings: files of a run say by them whose they are.

    They stay the same where a run goes on with more rounds, or under other settings that it may be continued with.
    """
    return _digest(settings, COURSE_KEYS)


def _digest(settings: Mapping[str, Scalar], keys: Iterable[str]) -> str:
    told = {key: settings[key] for key in keys if key in settings}
    identity = {key: value for key, value in told.items() if _settled(key, value) != RECORDED_DEFAULTS[key]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _settled(key: str, value: Scalar) -> Scalar:
    """`value`, or for "auto" what it stands for where nothing has been resolved: what a version without it did."""
    return RECORDED_DEFAULTS[key] if value == AUTO else value


def from_mapping(settings: Mapping[str, object]) -> Config:
    """Build a Config from kebab- or snake-case keys.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or value, a contradiction.
    """
    return Config(**{snake(key): _checked(key, value) for key, value in _by_kebab_key(settings).items()})


def _checked(key: str, value: object) -> Any:
    """Return the value of a key by its rule; raise ConfigError for an unknown key or a value that is not accepted."""
    if key not in rules():
        raise ConfigError(f"{shown(key)} is not a setting; {hint(key)}")
    return rules()[key].check(key, value)


def _by_kebab_key(settings: Mapping[str, object]) -> dict[str, object]:
    """Paths become strings. Raises ConfigError where a key is no string, or given in both spellings."""
    named: dict[str, object] = {}
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(f"{shown(key)} is not a setting: keys are strings.")
        if kebab(key) in named:
            raise ConfigError(f"{shown(kebab(key))} is given twice.")
        named[kebab(key)] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return named


def load(
    path: Path | str | None = None, overrides: Mapping[str, object] | None = None, used: Iterable[str] = ()
) -> Config:
    """Defaults, then the TOML file at `path`, then `overrides` (kebab- or snake-case keys).

    Args:
        path: of a settings file, or the folder of a run, whose settings are then taken but for its name.
        used: kebab-case keys that the caller itself has a use for, whether or not a run has.

    Raises:
        ConfigError: the file cannot be read, what `from_mapping` raises, or a key that was given has no effect: an
            override by the final settings, one of the file by these and by the file alone. What an override leaves
            the file's keys without an effect is no error.
    """
    if not isinstance(path, (str, Path, type(None))):
        raise ConfigError(f"{shown(path)} is no path of a settings file: settings are given by name, seed = 1.")
    recorded = path is not None and _is_folder(path)  # all keys, whether they have an effect or not
    given = _by_kebab_key(overrides or {})
    in_file = {} if path is None else _by_kebab_key(_recorded(path) if recorded else read_toml(path, "configuration"))
    for key in in_file.keys() - given.keys():
        try:
            _checked(key, in_file[key])
        except ConfigError as error:
            raise ConfigError(f"{path if recorded else place_of(path or '', key)}: {error}") from None
    config = from_mapping(in_file | given)
    refuse_idle(config, given.keys() - set(used))
    idle = {} if recorded else idle_by_itself(config, in_file, in_file.keys() - given.keys() - set(used))
    if idle:
        raise ConfigError(f"{path}: {' '.join(idle.values())}")
    return config


def from_run_config(settings: Mapping[str, object]) -> Config:
    """`from_mapping` of Flower's run-config, which holds pyproject.toml's defaults and what was given in their place.

    Flower types a word by its looks: run-name=123 and num-rounds=10.0 are read as their keys' kinds here.

    Raises:
        ConfigError: as `from_mapping`, or a key that is not at its default has no effect.
    """
    known = rules()
    config = from_mapping({key: known[kebab(key)].cast(value) if kebab(key) in known else value
                           for key, value in settings.items()})  # fmt: skip
    defaults = Config().to_run_config()
    refuse_idle(config, [key for key, value in config.to_run_config().items() if value != defaults[key]])
    return config


def idle_by_itself(config: Config, settings: Mapping[str, object], keys: Iterable[str]) -> dict[str, str]:
    """Explain each of `keys` that has no effect in `config`, and had none by `settings` over the defaults.

    Settings that others were to complete may contradict one another by themselves.
    """
    alone = object.__new__(Config)
    for key, rule in rules().items():
        value = RECORDED_DEFAULTS[key]
        with contextlib.suppress(ConfigError):  # an override has taken the place of what is not accepted
            value = rule.check(key, settings.get(key, value))
        object.__setattr__(alone, snake(key), value)
    found = ((key, idle_reason(alone, key)) for key in sorted(keys) if idle_reason(config, key) is not None)
    return {key: explain(alone, key, idle) for key, idle in found if idle is not None}


def _is_folder(path: Path | str) -> bool:
    """Whether `path` is a folder; a path that cannot be is none."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _recorded(folder: Path | str) -> dict[str, object]:
    """Return the settings of the run in `folder`, but for its name."""
    try:
        record = json.loads((Path(folder).expanduser() / "run.json").read_text(encoding="utf-8"))["config"]
        return {key: value for key, value in dict(record).items() if key != "run-name"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"Cannot read the configuration {folder}: {error!r}.") from error


def parse_overrides(arguments: Iterable[str]) -> dict[str, object]:
    """Return the settings of command-line `key=value` words; a value is typed by what its key holds, not by its looks.

    Raises:
        ConfigError: a word is of another form, or a key is given twice.
    """
    known, overrides = rules(), dict[str, object]()
    for argument in arguments:
        word, equals, text = argument.partition("=")
        key = kebab(word.strip())
        if not equals or not key:
            setting = f"{key}=VALUE" if key in known else "key=value (for example num-rounds=10)"
            raise ConfigError(f"{shown(argument)} is not of the form {setting}.")
        if key in overrides:
            raise ConfigError(f"{shown(key)} is given twice on the command line.")
        overrides[key] = known[key].read(text) if key in known else text
    return overrides
