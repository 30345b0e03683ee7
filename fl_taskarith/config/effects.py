"""What settings do to one another: contradictions, and settings that the others leave without an effect.

`conditions.toml` is the table of both. Whoever gives a setting without an effect asks for something that does not
happen. What counts as given is for the caller to say: a configuration holds every key, and most are at their defaults.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_taskarith.config.fields import Settings, snake
from fl_taskarith.config.rule import Scalar, shown
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError


@dataclass(frozen=True)
class Idle:
    """One reason for which a key has no effect.

    Attributes:
        holds: whether it applies to a configuration.
        under: the keys whose values are the reason.
        instead: what gives the key an effect.
        because: what that means, after the values; empty where they say it themselves.
    """

    holds: Callable[[Settings], bool]
    under: tuple[str, ...]
    instead: str
    because: str = ""


def contradictions(config: Settings) -> list[str]:
    """Return what to say about each contradiction between the settings."""
    return [message.format_map(vars(config)) for holds, message in CONTRADICTIONS if holds(config)]


def idle_reason(config: Settings, key: str) -> Idle | None:
    """Why `key` has no effect in `config`; None if it has one, or its value asks for nothing (`OFF`)."""
    if key in OFF and getattr(config, snake(key)) == OFF[key]:
        return None
    return next((idle for idle in CONDITIONAL.get(key, ()) if idle.holds(config)), None)


def explain(config: Settings, key: str, idle: Idle) -> str:
    """Say why the key has no effect, and what to do."""

    def setting(name: str) -> str:
        return f"{name} = {shown(getattr(config, snake(name)))}"

    under = " and ".join(map(setting, idle.under))
    return f"{setting(key)} has no effect under {under}{idle.because}: leave it out, or {idle.instead}."


def refuse_idle(config: Settings, given: Iterable[str]) -> None:
    """Raise ConfigError if a key of `given`, in kebab-case, has no effect in `config`; it explains every such key."""
    reasons = [(key, idle) for key in sorted(given) if (idle := idle_reason(config, key)) is not None]
    if reasons:
        raise ConfigError(" ".join(explain(config, *each) for each in reasons))


def _condition(expression: str) -> Callable[[Settings], bool]:
    """Compile a condition of conditions.toml, which may name settings and nothing else.

    It does not hold where one of them is unknown, None: `scored` of a mask rule of one's own that is not at hand.
    """
    code = compile(expression, "conditions.toml", "eval")
    names = [name for name in code.co_names if name != "bool"]

    def holds(config: Settings) -> bool:
        values = {name: getattr(config, name) for name in names}
        return None not in values.values() and bool(eval(code, values))

    return holds


def _reason(words: str, table: Mapping[str, Idle]) -> Idle:
    """Return a reason by its name, or, of "needs KEY = A | B", the one that holds under other values of that key.

    A strategy of the user's own, "module:name", may read any setting.
    """
    if not words.startswith("needs "):
        return table[words]
    key, _, choices = words.removeprefix("needs ").partition(" = ")
    values = choices.split(" | ")
    own = " and ':' not in strategy" if key == "strategy" else ""
    holds = _condition(f"{snake(key)} not in {values}{own}")
    return Idle(holds, (key,), f"set {key} = {' or '.join(map(shown, values))}")


_TABLE = read_toml(Path(__file__).with_name("conditions.toml"))
_REASONS = {
    name: Idle(_condition(each["when"]), tuple(each["under"]), each["instead"], each.get("because", ""))
    for name, each in _TABLE["reason"].items()
}
CONTRADICTIONS = [(_condition(each["when"]), each["message"]) for each in _TABLE["contradiction"]]
CONDITIONAL: Mapping[str, tuple[Idle, ...]] = {
    key: tuple(_reason(words, _REASONS) for words in reasons) for key, reasons in _TABLE["no-effect"].items()
}
"""The reasons for which each key may have no effect; a key that is not here is among `ALWAYS`."""
OFF: Mapping[str, Scalar] = _TABLE["off"]
ALWAYS = frozenset(
    {"dataset", "strategy", "num-rounds", "seed", "engine", "threads"}
    # where things lie, what may be fetched, what is kept: said once for whatever a run turns out to need
    | {"data-dir", "download", "checkpoint-every", "save-model", "draw-curves", "tensorboard", "wandb"}
    | {"resume", "results-dir", "run-name"}
    # contradictions wherever they would have no effect
    | {"task-vector-bank", "client-groups", "byzantine-fraction"}
)
"""Keys that have an effect in every configuration that is accepted."""
