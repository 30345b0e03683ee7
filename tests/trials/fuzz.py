"""Configurations drawn at random: refused by a ConfigError that names a given key, or accepted, and then they run."""

import dataclasses
import datetime
import random
import tomllib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from trials import Tally

from fl_taskarith import simulate
from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import STRATEGIES, kebab, rules, snake
from fl_taskarith.config.rule import Rule, shown
from fl_taskarith.config.settings import Config, from_mapping, load, parse_overrides
from fl_taskarith.errors import ConfigError, FlTaskarithError

REFUSED, ACCEPTED = "refused, naming a key", "accepted"

huge = st.sampled_from([10**30, -(10**30), 2**53 + 1, 10**5000, 1e308, -1e308, 5e-324, Fraction(10) ** 400])
odd = st.one_of(
    st.none(), st.binary(max_size=4), st.lists(st.integers(), max_size=2), st.just({"a": None}), st.dates(),
    st.complex_numbers(), st.fractions(), st.decimals(), st.just(np.arange(3)), st.just(np.float32(0.5)),
    st.just(np.bool_(True)), st.just(np.str_("auto")), st.just(object()),
)  # fmt: skip
words = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Nd", "Zl"]), max_size=4),
    st.sampled_from(["auto", "AUTO", "none", "None", "true", "", " ", "../x", "a\0b", "x" * 10_000, "\ud800",
                     "module:Class"]),
)  # fmt: skip
anything = st.one_of(st.booleans(), st.integers(), st.floats(), words, huge, odd)


def near(rule: Rule) -> st.SearchStrategy[object]:
    """Values that the rule accepts, and those beside its bounds."""
    if rule.choices:
        return st.sampled_from([*rule.choices, rule.choices[0].upper(), rule.choices[0] + " "])
    if rule.kind is bool:
        return st.sampled_from([True, False, 0, 1, "true"])
    if rule.kind is str:
        return words
    bounds = [bound for bound in (rule.low, rule.high) if abs(bound) < 1e300] or [0]
    around = [bound + step for bound in bounds for step in (-1, 0, 1, 2)]
    if rule.kind is int:
        return st.sampled_from([int(value) for value in around] + [float(bounds[0])])
    return st.sampled_from([*around, *(bound + step for bound in bounds for step in (1e-9, -1e-9, 0.5))])


def _one_setting() -> st.SearchStrategy[tuple[str, object]]:
    known = rules()

    def valued(key: str) -> st.SearchStrategy[tuple[str, object]]:
        return st.tuples(st.sampled_from([key, snake(key)]), st.one_of(near(known[key]), anything))

    return st.sampled_from(sorted(known)).flatmap(valued)


def _unknown() -> st.SearchStrategy[tuple[str, object]]:
    near_misses = st.sampled_from(sorted(rules())).map(lambda key: key + "s")
    return st.tuples(st.one_of(words, near_misses), anything)


mappings = st.lists(st.one_of(_one_setting(), _one_setting(), _one_setting(), _unknown()), max_size=8).map(dict)
toml_lines = st.one_of(
    _one_setting().map(lambda pair: f"{pair[0]} = {_toml(pair[1])}"),
    st.text(max_size=30),
    st.sampled_from(["[table]", "[[tables]]", "a.b = 1", "seed = 0x" + "f" * 5000, "seed = " + "9" * 5000,
                     "seed = 1979-05-27", "seed = " + "[" * 5000, "\ufeffseed = 1", "num-rounds = inf"]),
)  # fmt: skip
toml_texts = st.lists(toml_lines, max_size=6).map("\n".join)
arguments = st.lists(
    st.one_of(
        _one_setting().map(lambda pair: f"{pair[0]}={_toml(pair[1])}"),
        st.text(max_size=20),
        st.sampled_from(
            ["seed=1\nnum-rounds=2", "seed=" + "[" * 5000, "=", "a=", "seed=1=2", "seed=\0", "seed=\ud800"]
        ),
    ),
    max_size=5,
)


def _toml(value: object) -> str:
    """Roughly as TOML; not always valid, as what people type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime.date):
        return value.isoformat()
    return shown(value)


def try_mapping(given_settings: Mapping[str, object]) -> str:
    """How `from_mapping` took it; anything but a Config that says the same, or a ConfigError, is an error here too."""
    try:
        config = from_mapping(given_settings)
    except ConfigError as error:
        _check_message(error, given_settings)
        return REFUSED
    assert from_mapping(config.to_run_config()) == config
    for key, value in given_settings.items():
        kept = getattr(config, snake(key))
        assert kept == value or float(kept) == float(value), key  # type: ignore[arg-type]
    return ACCEPTED


def _check_message(error: ConfigError, given_settings: Mapping[str, object]) -> None:
    message = str(error)
    message.encode()  # a terminal can show it
    assert len(message) < 5000, "a message of reasonable length"
    named = [key for key in given_settings if isinstance(key, str)
             and (kebab(key) in message or shown(kebab(key)) in message
                  or shown(key) in message)]  # fmt: skip
    assert named, f"no given key in: {message}"


def try_toml(text: str, folder: Path) -> str:
    """The same for a settings file."""
    path = folder / "settings.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load(path)
    except ConfigError as error:
        message = str(error)
        message.encode()
        try:
            keys = tomllib.loads(text)
        except (ValueError, RecursionError):
            assert path.name in message
            return REFUSED
        if path.name not in message:
            _check_message(error, keys)
        return REFUSED
    assert from_mapping(config.to_run_config()) == config
    return ACCEPTED


def try_arguments(given_words: list[str]) -> str:
    """The same for words of a command line."""
    try:
        overrides = parse_overrides(given_words)
    except ConfigError as error:
        str(error).encode()
        return REFUSED
    assert all(any(kebab(word).startswith(key + "=") for word in given_words) for key in overrides)
    return try_mapping(overrides)


def fuzz(examples: int, folder: Path, start: int = 0) -> list[Tally]:
    """`examples` of each of mappings, TOML texts and command lines."""
    kinds: dict[str, tuple[st.SearchStrategy[object], Callable[..., str]]] = {
        "mappings": (mappings, try_mapping),
        "settings files": (toml_texts, lambda text: try_toml(text, folder)),
        "command lines": (arguments, try_arguments),
    }
    return [_drawn(f"configurations drawn at random: {kind}", *each, examples, start) for kind, each in kinds.items()]


def _drawn(
    fault: str, strategy: st.SearchStrategy[object], attempt: Callable[..., str], examples: int, start: int
) -> Tally:
    tally = Tally(fault)

    @seed(start)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def each(drawn: object) -> None:
        try:
            tally.note(attempt(drawn))
        except Exception as error:
            tally.lose(f"{shown(drawn)}: {type(error).__name__}: {error}")

    each()
    return tally


SMALL: dict[str, tuple[float, float]] = {  # bounds of what decides how long a run takes
    "num-clients": (1, 10),
    "num-rounds": (1, 2),
    "local-steps": (1, 2),
    "batch-size": (1, 16),
    "examples-per-client": (1, 20),
    "dimension": (1, 8),
    "num-clusters": (1, 3),
    "calibration-rounds": (1, 2),
    "calibration-size": (0, 30),
    "calibration-per-client": (0, 5),
    "calibration-memory": (0.01, 1.0),
    "validation-size": (0, 60),
    "train-subset": (100, 300),
    "test-subset": (10, 60),
    "trainable-blocks": (0, 5),
    "local-steps-min": (1, 2),
    "local-steps-max": (1, 2),
    "clipping-iterations": (1, 2),
    "head-rounds": (0, 1),
    "warmup-rounds": (0, 1),
    "clients-at-once": (0, 2),
    "input-size": (14, 18),
    "evaluate-every": (1, 2),
    "checkpoint-every": (1, 2),
    "classes-per-client": (1, 11),
}
START = {"num-clients": 5, "num-rounds": 1, "local-steps": 1, "classes-per-client": 5, "calibration-size": 20,
         "validation-size": 40, "train-subset": 200, "test-subset": 40, "calibration-rounds": 1, "dimension": 5,
         "draw-curves": False, "device": "cpu", "download": False}  # fmt: skip
KEPT = {"compile", "engine", "wandb", "tensorboard", "client-timeout", "model", "threads", "dataset", "weights",
        "data-dir", "results-dir", "run-name", "mask-file", *START} - SMALL.keys()  # fmt: skip


def drawn_config(drawn: random.Random, folder: Path) -> Config | None:
    """A small run with one to eight settings drawn anew, on digits or regression data; None if they contradict."""
    chosen: dict[str, object] = {**START, "results-dir": str(folder), "data-dir": str(folder / "data")}
    chosen["strategy"] = drawn.choice((*STRATEGIES, "centralized"))
    if chosen["strategy"] == "fed-em" or (chosen["strategy"] == "br-ifca" and drawn.random() < 0.5):
        chosen["dataset"] = REGRESSION
    known = {key: rule for key, rule in rules().items() if key not in KEPT}
    for key in drawn.sample(sorted(known), drawn.randint(1, 8)):
        chosen[key] = _value(key, known[key], drawn)
    try:
        return from_mapping(chosen)
    except ConfigError:
        return None


def _value(key: str, rule: Rule, drawn: random.Random) -> object:
    if key in SMALL:
        low, high = SMALL[key]
        return drawn.randint(int(low), int(high)) if rule.kind is int else drawn.uniform(low, high)
    if rule.choices:
        return drawn.choice(rule.choices)
    if rule.kind is bool:
        return drawn.random() < 0.5
    if rule.kind is str:
        return drawn.choice(["", "norm.*", "*.bias", "nothing*", "*", "blocks.0.*, head.*"])
    if rule.auto and drawn.random() < 0.5:
        return "auto"
    low, high = max(rule.low, 0), min(rule.high, 10)
    if rule.kind is int:
        return drawn.randint(int(low), int(high))
    return drawn.choice([low + 1e-6, high, drawn.uniform(low, high), 10 ** drawn.uniform(-4, 0)])


def accepted_ones_run(runs: int, folder: Path, start: int = 0) -> Tally:
    """`runs` accepted small configurations are run: each finishes, or ends with an error of ours."""
    tally, drawn = Tally("accepted configurations run"), random.Random(start)
    while tally.trials < runs:
        config = drawn_config(drawn, folder)
        if config is None:
            continue
        named = dataclasses.replace(config, run_name=f"drawn-{tally.trials}")
        try:
            simulate(named)
        except FlTaskarithError as error:
            tally.note(f"ended: {type(error).__name__}")
        except Exception as error:
            usual = Config().to_run_config()
            different = {key: value for key, value in named.to_run_config().items() if value != usual[key]}
            tally.lose(f"{different}: {type(error).__name__}: {error}")
        else:
            tally.note("finished")
    return tally
