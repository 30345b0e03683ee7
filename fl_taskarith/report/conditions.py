"""What the settings of an arm say together (how the data lie, the algorithm, the clients' work), and their symbols."""

from collections.abc import Callable, Mapping

from fl_taskarith.config.fields import ALGORITHM_KEYS, rules
from fl_taskarith.config.rule import Scalar
from fl_taskarith.report.latex import Latex, escape, plain

Settings = Mapping[str, Scalar]
Condition = tuple[float, float]
Value = Scalar | Condition | tuple[str, float] | None

UNSAID: Condition = (-1, 0.0)
CENTRALIZED: Condition = (0, 0.0)
IID: Condition = (1, 0.0)
EQUAL = "equal J"


def condition(settings: Settings) -> Condition:
    """Return how the data lie, which sorts from the most homogeneous on.

    UNSAID < CENTRALIZED < IID < (2, -alpha) < (3, -classes per client), where UNSAID is that `settings` do not say it.
    """
    if settings.get("strategy") == "centralized":
        return CENTRALIZED
    if settings.get("sharding") == "dirichlet":
        return 2, -float(settings["dirichlet-alpha"])
    if settings.get("sharding") == "classes":
        return 3, -float(settings["classes-per-client"])
    return IID if "sharding" in settings else UNSAID


def algorithm(settings: Settings) -> tuple[str, float] | None:
    """Return the strategy and the strength of its proximal term; None where `settings` do not say it."""
    return (str(settings["strategy"]), float(settings.get("proximal-mu", 0))) if "strategy" in settings else None


def load(settings: Settings) -> str | None:
    """Return how much of a round's work clients do: "equal J", "J from 1 to 7", "J from 1 to 7, dropout 0.2"."""
    if "local-steps-max" not in settings:
        return None
    steps = f"J from {settings['local-steps-min']} to {settings['local-steps-max']}"
    dropout = settings.get("dropout", 0)
    return (steps if settings["local-steps-max"] else EQUAL) + (f", dropout {dropout}" if dropout else "")


# Settings that say one thing together, and how it is read from them.
COMPOUND: dict[str, tuple[Callable[[Settings], Value], frozenset[str]]] = {
    "condition": (condition, frozenset({"sharding", "classes-per-client", "dirichlet-alpha"})),
    "load": (load, frozenset({"local-steps-min", "local-steps-max", "dropout"})),
    "algorithm": (algorithm, ALGORITHM_KEYS - {"task-vector-bank", "bank-start", "bank-decay"}),
}


def setting(settings: Settings, key: str) -> Value:
    """Return `settings[key]`, or what several of them say together; None where they do not say it."""
    return COMPOUND[key][0](settings) if key in COMPOUND else settings.get(key)


def words(key: str, value: Value) -> Latex:
    """Write one setting in the field's symbols, for example $N_c = 2$, "dense", "cosine"."""
    if isinstance(value, tuple):
        name, strength = value
        if isinstance(name, str):
            return Latex(words("strategy", name) + (Latex(rf" with $\mu = {strength:g}$") if strength else ""))
        if value in (CENTRALIZED, IID):
            return Latex("iid" if value == IID else "centralized")
        key, value = "classes-per-client" if name == 3 else "dirichlet-alpha", -strength
    if key == "load":
        return Latex(str(escape(value)).replace("J", "$J$"))
    rule = rules()[key]
    if isinstance(value, (int, float)):
        return Latex(f"${rule.formula()} = {plain(value)}$") if rule.symbol else escape(rule.label(key, f"{value:g}"))
    return escape(rule.names.get(str(value), value))
