"""Results folders of studies that nobody ran: files as `fl-taskarith study` writes them, around invented accuracies."""

import csv
import json
import subprocess
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import Config

SEEDS = (0, 1, 2)
EPOCHS = (2, 4, 8, 16)
Settings = Mapping[str, Scalar]
Accuracy = Callable[[Settings, int], float]  # of (settings, seed), in percent

DEFAULTS = Config().to_run_config()
DENSE = {"mask-rule": "none"}
RULES = ("least-sensitive", "most-sensitive", "lowest-magnitude", "highest-magnitude", "random")
CONDITIONS: dict[str, Settings] = {
    "Nc = 1": {"classes-per-client": 1},
    "Nc = 2": {"classes-per-client": 2},
    "iid": {"sharding": "iid"},
}

STUDIES: dict[str, list[tuple[str, Settings]]] = {
    "centralized": [
        (f"{schedule}, weight-decay = {decay:g}",
         DENSE | {"strategy": "centralized", "schedule": schedule, "weight-decay": decay, "num-rounds": 16})
        for schedule in ("constant", "cosine") for decay in (0.0, 0.001)
    ],
    "fedavg-iid": [("FedAvg iid", DENSE | {"sharding": "iid"})],
    "heterogeneity": [
        (f"{name}, local-steps = {steps}", DENSE | division | {"local-steps": steps, "num-rounds": 160 // steps})
        for name, division in CONDITIONS.items() for steps in (4, 8, 16)
    ],
    "sparsity": [
        *((f"{rule}, {name}", {"mask-rule": rule} | CONDITIONS[name]) for rule in RULES for name in ("iid", "Nc = 1")),
        *((f"density = {density:g}", {"density": density, "classes-per-client": 1}) for density in (0.01, 0.5)),
        *((f"R = {rounds}", {"calibration-rounds": rounds, "classes-per-client": 1}) for rounds in (1, 8)),
        ("all weights", DENSE | {"classes-per-client": 1}),
    ],
    "six-models": [
        (f"{name}, {words}", mask | place)
        for name, place in {"centralized": {"strategy": "centralized"}, **CONDITIONS}.items() if name != "Nc = 1"
        for words, mask in {"dense": DENSE, "sparse": {"mask-rule": "least-sensitive"}}.items()
    ],
    "participation": [
        *((f"participation = {share:g}", DENSE | {"participation": share}) for share in (0.1, 0.2, 0.4)),
        *((f"num-clients = {clients}", DENSE | {"num-clients": clients}) for clients in (10, 100)),
    ],
    "systems": [
        (strategy, DENSE | {"strategy": strategy, "local-steps-min": 1, "local-steps-max": 8, "proximal-mu": mu})
        for strategy, mu in (("fedavg", 0.0), ("fednova", 0.0), ("fedprox", 0.01))
    ],
    "strategies": [
        (f"{place} | {name}", DENSE | CONDITIONS[place] | {"strategy": strategy, "server-lr": step})
        for place in ("Nc = 1", "iid")
        for name, strategy, step in (("FedAvg", "fedavg", 1.0), ("FedAdam, step 0.01", "fedadam", 0.01),
                                     ("FedAdam, step 0.1", "fedadam", 0.1), ("SCAFFOLD", "scaffold", 1.0))
    ],
    "extension": [
        (f"{place} | {name}", CONDITIONS[place] | settings)
        for place in ("Nc = 1", "iid")
        for name, settings in {
            "masked FedAvg": {}, "dense FedAvg": DENSE, "squared loss": {"local-loss": "squared"},
            "Gram-anchored": {"strategy": "gram-anchored"},
        }.items()
    ],
}  # fmt: skip

# All questions in one study, beside a start that does not train, heads alone, and a method against label skew.
MIXED: list[tuple[str, Settings]] = [
    *((f"{place} | {name}", CONDITIONS[place] | settings)
      for place in CONDITIONS
      for name, settings in {
          "ridge head": DENSE | {"learning-rate": 0.0, "num-rounds": 1},
          "head alone": DENSE | {"num-rounds": 40, "trainable": "head"},
          "dense": DENSE | {"num-rounds": 40},
          "least-sensitive": {"num-rounds": 40},
          "random": {"num-rounds": 40, "mask-rule": "random"},
          "squared loss": {"num-rounds": 40, "local-loss": "squared"},
      }.items()),
    *((f"Nc = 2 | dense, J = {steps}",
       DENSE | CONDITIONS["Nc = 2"] | {"local-steps": steps, "num-rounds": 160 // steps})
      for steps in (8, 16)),
    ("Nc = 2 | half of the weights", CONDITIONS["Nc = 2"] | {"num-rounds": 40, "density": 0.5}),
]  # fmt: skip


def committed_results() -> Path:
    """The folder results/ of the checkout; skips the test where somebody's own runs have changed it."""
    root = Path(__file__).parent.parent
    words = ["git", "-C", str(root), "diff", "--quiet", "HEAD", "--", "results"]
    if subprocess.run(words, capture_output=True, check=False).returncode == 1:
        pytest.skip("results/ is not as it was committed")
    return root / "results"


def plausible(settings: Settings, seed: int) -> float:
    """Something like what runs give: skew and local work cost, masks help a little, seeds scatter."""
    accuracy = 97.5
    if settings["strategy"] != "centralized" and settings["sharding"] == "classes":
        accuracy -= 8.0 / int(settings["classes-per-client"]) * int(settings["local-steps"]) / 4
    accuracy += {"none": 0.0, "least-sensitive": 1.2, "random": 0.9}.get(str(settings["mask-rule"]), -0.4)
    accuracy += 0.8 * (settings["local-loss"] == "squared") + 0.6 * (settings["strategy"] == "scaffold")
    accuracy += 0.3 * (settings["schedule"] == "cosine") + 0.5 * (settings["strategy"] == "fednova")
    noise = np.random.default_rng([seed, zlib.crc32(json.dumps(dict(settings), sort_keys=True).encode())])
    return min(100.0, float(accuracy + noise.normal(0, 0.25)))


def write_studies(root: Path, names: Sequence[str] = tuple(STUDIES), accuracy: Accuracy = plausible) -> Path:
    """A folder per study in `root`, which is returned."""
    for name in names:
        write_study(root / name, STUDIES[name], accuracy)
    return root


def write_study(
    folder: Path,
    arms: Sequence[tuple[str, Settings]],
    accuracy: Accuracy = plausible,
    validation: Callable[[float], float] = lambda value: value - 0.4,
    untuned: Collection[str] = (),
) -> None:
    """table.csv, runs.csv, curves.csv and settings.json of the arms (label, settings beside the defaults).

    A label "GROUP | ARM" stands in a group.

    Args:
        accuracy: on test. validation: what that is on validation.
        untuned: labels of arms whose learning rate is at the edge of its grid.
    """
    folder.mkdir(parents=True)
    table, runs, curves, described = [], [], [], []
    for title, own in arms:
        group, _, label = title.rpartition(" | ")
        settings = DEFAULTS | own
        tests = {seed: accuracy(settings, seed) for seed in SEEDS}
        described.append({"group": group, "arm": label, "settings": settings})
        rate = own.get("learning-rate", 0.0316)
        density = "" if settings["mask-rule"] == "none" else settings["density"]
        table.append({"group": group, "arm": label, "density": density, "learning_rate": rate, "edge": title in untuned,
                      "n": len(tests), "test_percent": fmean(tests.values()),
                      "test_percent_sd": stdev(tests.values())})  # fmt: skip
        for seed, value in tests.items():
            runs.append({"group": group, "arm": label, "seed": seed, "learning_rate": rate, "state": "done",
                         "ridge_test_percent": 95.8 + 0.01 * seed, "test_percent": value,
                         "val_percent": validation(value), "seconds": 11.0,
                         "run": f"{folder.name}-{len(runs)}-s{seed}"})  # fmt: skip
            curves += [{"group": group, "arm": label, "seed": seed, "round": epoch,
                        "uplink_megabytes": 0.5 * epoch, "test_percent": value - 6 / epoch**2,
                        "val_percent": validation(value - 6 / epoch**2)}
                       for epoch in EPOCHS]  # fmt: skip
    for name, lines in (("table", table), ("runs", runs), ("curves", curves)):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    record = {
        "title": folder.name,
        "seeds": list(SEEDS),
        "search": None,
        "machines": ["A processor"],
        "arms": described,
    }
    (folder / "settings.json").write_text(json.dumps(record))
