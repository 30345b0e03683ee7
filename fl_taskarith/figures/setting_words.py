"""How settings read in titles, legends and labels of figures; the words for a single one are those of its rule."""

from collections.abc import Iterator, Mapping, Sequence

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import rules
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import IDENTITY_KEYS

Settings = Mapping[str, Scalar]

SEED_KEYS = ("seed", "shard-seed")
FOLLOWING_KEYS = ("learning-rate", "num-rounds", "evaluate-every", "threads", "device")
"""Chosen anew for each setting of interest; they tell runs apart only where nothing else does."""
SHARDING_WORDS = {"iid": "iid", "classes": "Nc = {classes-per-client}", "dirichlet": "Dir({dirichlet-alpha})"}
OF_SHARDING = ("classes-per-client", "dirichlet-alpha")  # part of what `sharding_words` says
OF_MASK = ("density", "calibration-rounds", "soft-zero")  # without a meaning where there is no mask


def sharding_words(settings: Settings) -> str:
    """For example "iid" or "Nc = 2"."""
    return SHARDING_WORDS[str(settings["sharding"])].format(**settings)


def evenness(settings: Settings) -> tuple[int, float]:
    """Return what divisions of the data are sorted by: Dirichlet by α, then by classes per client, then iid."""
    kind = str(settings["sharding"])
    by = {"classes": "classes-per-client", "dirichlet": "dirichlet-alpha"}
    return (2, 0.0) if kind == "iid" else (int(kind == "classes"), float(settings[by[kind]]))


def mask_words(settings: Settings) -> str:
    """For example "all weights" or "random, density 0.1"."""
    rule = settings["mask-rule"]
    return "all weights" if rule == "none" else f"{rule}, density {settings['density']:g}"


def mean_local_steps(settings: Settings) -> float:
    """Return J, or its mean where every client draws its own."""
    low, high = settings["local-steps-min"], settings["local-steps-max"]
    return (float(low) + float(high)) / 2 if high else float(settings["local-steps"])


def run_words(settings: Settings) -> str:
    """Return the main settings of a run; nothing for a run that was given a name."""
    if settings["run-name"]:
        return ""
    words = [str(settings["dataset"]), str(settings["strategy"])]
    if settings["dataset"] == REGRESSION:
        sizes = (("num-clusters", "K"), ("num-clients", "m"), ("examples-per-client", "n"))
        words += [f"{letter} = {settings[key]}" for key, letter in sizes]
    elif settings["strategy"] != "centralized":
        drawn = f"J = {settings['local-steps-min']} to {settings['local-steps-max']}"
        words += [sharding_words(settings), drawn if settings["local-steps-max"] else f"J = {settings['local-steps']}"]
    return ", ".join([*words, f"seed {settings['seed']}"])


def labels(settings: Sequence[Settings], names: Sequence[str]) -> list[str]:
    """Return the settings in which these differ, in words; `names` where that does not tell all of them apart."""
    keys = [key for key in settings[0] if key in IDENTITY_KEYS and key not in SEED_KEYS]
    differing = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
    telling = [key for key in differing if key not in FOLLOWING_KEYS] or differing
    words = [", ".join(_words(each, telling)) for each in settings]
    return words if len(set(words)) == len(words) and all(words) else list(names)


def _words(settings: Settings, telling: Sequence[str]) -> Iterator[str]:
    silent = {"sharding", *OF_SHARDING, *(OF_MASK if settings["mask-rule"] == "none" else ())}
    if {"sharding", *OF_SHARDING} & set(telling):
        yield sharding_words(settings)
    for key in telling:
        if key == "mask-rule":
            yield "all weights" if settings[key] == "none" else str(settings[key])
        elif key not in silent:
            yield rules()[key].label(key, settings[key])


def solved_head_words(arms: Sequence[Settings]) -> str:
    """Return what the head before training is called: "ridge head", "LDA head", or "head" where kinds differ."""
    kinds = {str(settings.get("head", "ridge")) for settings in arms} - {"linear"} or {"ridge"}
    kind = kinds.pop()
    return "head" if kinds else f"{rules()['head'].names.get(kind, kind)} head"
