"""Settings as an arm's label tells them, for results that keep nothing better; and settings in the field's symbols."""

import re
from collections.abc import Mapping

from fl_taskarith.config.fields import MASK_RULES, rules
from fl_taskarith.config.rule import Scalar
from fl_taskarith.report.latex import Latex, plain, source

SYMBOLS = {
    "Nc": "classes-per-client",
    "J": "local-steps",
    "C": "participation",
    "K": "num-clients",
    "R": "calibration-rounds",
}
PHRASES: dict[str, dict[str, Scalar]] = {  # words of labels and what they mean
    "centralized": {"strategy": "centralized"},
    "federated": {"strategy": "fedavg"},
    "iid": {"sharding": "iid"},
    "dense": {"mask-rule": "none"},
    "all weights": {"mask-rule": "none"},
    "sparse": {"mask-rule": "sparse"},  # which rule, such a label does not say
    "head": {"trainable": "head"},
    **{rule: {"mask-rule": rule} for rule in MASK_RULES},
    **{name: {"schedule": name} for name in rules()["schedule"].choices},
    **{name.lower(): {"strategy": name.lower()} for name in ("fedavg", "fedprox", "fednova", "scaffold", "fedgma")},
}
NAMES = {"fedavg": "FedAvg", "fedprox": "FedProx", "fednova": "FedNova", "scaffold": "SCAFFOLD", "fedgma": "FedGMA",
         "fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedbn": "FedBN", "cclip": "CCLIP",
         "krum": "Krum", "trimmed-mean": "trimmed mean", "geometric-median": "geometric median",
         "gram-anchored": "Gram-anchored averaging",
         "centralized": "centralized", "none": "dense"}  # fmt: skip
FORMULAS = {"classes-per-client": "N_c", "local-steps": "J", "participation": "C", "num-clients": "K",
            "calibration-rounds": "R", "density": "d", "dirichlet-alpha": r"\alpha",
            "proximal-mu": r"\mu"}  # fmt: skip


def settings_in_label(label: str) -> dict[str, Scalar]:
    """Every `key = value`, symbol (`Nc = 2`) and known word of a label, as kebab-case settings."""
    found: dict[str, Scalar] = {}
    words = label.lower()
    for phrase, meaning in PHRASES.items():
        if re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", words):
            found |= meaning
    known = rules()
    for name, text in re.findall(r"([A-Za-z][A-Za-z-]*) *= *([^\s,;]+)", label):
        key = SYMBOLS.get(name, name)
        if key in known and text != "iid":
            found[key] = _number(text)
        elif text == "iid":
            found["sharding"] = "iid"
    if "classes-per-client" in found:
        found.setdefault("sharding", "classes")
    return found


def words(key: str, value: Scalar) -> Latex:
    """One setting in the field's symbols, for example $N_c = 2$, "dense", "cosine"."""
    if key == "condition":
        return condition_words(value)
    if key in FORMULAS and isinstance(value, (int, float)):
        return Latex("${} = {}$").fill(Latex(FORMULAS[key]), plain(value))
    if key == "algorithm":
        strategy, _, strength = str(value).partition(", mu = ")
        name = source(NAMES.get(strategy, strategy))
        return Latex("{} with $\\mu = {}$").fill(name, strength) if strength else name
    if key == "load":
        return Latex(source(str(value)).replace("J", "$J$"))
    if key == "weight-decay":
        return Latex("weight decay {}").fill(plain(float(value)))
    if key in ("mask-rule", "strategy", "schedule"):
        return source(NAMES.get(str(value), str(value)))
    return Latex("{} = {}").fill(key, value if isinstance(value, str) else str(value).lower())


def condition(settings: Mapping[str, Scalar]) -> str:
    """How the data lie: "centralized", "iid", "Nc = 2", "alpha = 0.1"; "" where the settings do not say."""
    if settings.get("strategy") == "centralized":
        return "centralized"
    sharding = settings.get("sharding")
    if sharding == "classes":
        return f"Nc = {settings.get('classes-per-client', '?')}"
    if sharding == "dirichlet":
        return f"alpha = {settings.get('dirichlet-alpha', '?')}"
    return str(sharding or "")


def condition_words(name: Scalar) -> Latex:
    """A condition in symbols."""
    symbol, equals, value = str(name).partition(" = ")
    if not equals:
        return source(str(name))
    return Latex("${} = {}$").fill(Latex({"Nc": "N_c", "alpha": r"\alpha"}[symbol]), value)


def algorithm(settings: Mapping[str, Scalar]) -> str:
    """The strategy with the parameter that several arms of one strategy differ in: "fedprox, mu = 0.1"."""
    strength = settings.get("proximal-mu", 0)
    return str(settings.get("strategy", "")) + (
        f", mu = {strength:g}" if isinstance(strength, float) and strength else ""
    )


def load(settings: Mapping[str, Scalar]) -> str:
    """What clients do of a round's work: "equal J", "J from 1 to 7", "J from 1 to 7, dropout 0.2"."""
    if "local-steps-max" not in settings:
        return ""
    drawn = f"J from {settings.get('local-steps-min')} to {settings['local-steps-max']}"
    dropout = settings.get("dropout", 0)
    return (drawn if settings["local-steps-max"] else "equal J") + (f", dropout {dropout}" if dropout else "")


def setting(settings: Mapping[str, Scalar], key: str) -> Scalar | None:
    """`settings[key]`, or what several of them say together; None or "" where they do not say."""
    together = {"condition": condition, "algorithm": algorithm, "load": load}
    return together[key](settings) if key in together else settings.get(key)


def heterogeneity(name: str) -> tuple[int, float]:
    """Sorts conditions from the most homogeneous to the most heterogeneous."""
    symbol, _, value = name.partition(" = ")
    order = {"centralized": 0, "iid": 1, "alpha": 2, "Nc": 3}.get(symbol, 4)
    return order, -float(value) if re.fullmatch(r"[\d.]+", value) else 0.0


def _number(text: str) -> Scalar:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
