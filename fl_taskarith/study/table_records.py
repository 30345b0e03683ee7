"""What a study's folder keeps beside its tables: every arm's settings, and every run's course. A report reads them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.comparison import ArmResults
from fl_taskarith.study.definition import Study
from fl_taskarith.study.results import Outcome
from fl_taskarith.study.search import Search


def settings_record(study: Study, arms: Sequence[ArmResults]) -> str:
    """settings.json: seeds, search, machines, and every arm's settings in full, defaults included; no path in it."""
    runs = [outcome.record for arm in arms for outcome in arm.outcomes.values() if outcome.record]
    search = study.search
    record = {
        "title": study.title,
        "seeds": list(study.seeds),
        "search": None if search is None else _search_record(search),
        "machines": machine_list(runs),
        "arms": [
            {"group": each.arm.group, "arm": each.arm.label, "settings": _portable(each.settings)}
            | ({} if each.arm.search is None else {"search": _search_record(each.arm.search)})
            for each in arms
        ],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _search_record(search: Search) -> dict[str, object]:
    return {"rates": list(search.rates), "rounds": list(search.rounds), "keep": search.keep, "seed": search.seed}


def curve_records(arms: Sequence[ArmResults]) -> list[dict[str, object]]:
    """Lines of curves.csv: every evaluated round of every final run; megabytes (10⁶) are summed since round 0.

    None of a run that left its end alone.
    """
    lines = []
    for each in arms:
        for seed, outcome in each.outcomes.items():
            if outcome.record is None:
                continue
            sent = 0.0
            for row in outcome.rows:
                sent += (row.get("uplink_bytes") or 0) / 1e6
                accuracies = {split: row.get(f"{split}_accuracy") for split in ("val", "test")}
                if all(value is None for value in accuracies.values()):
                    continue
                percents = {f"{split}_percent": None if value is None else 100 * value
                            for split, value in accuracies.items()}  # fmt: skip
                lines.append(
                    {
                        "group": each.arm.group,
                        "arm": each.arm.label,
                        "seed": seed,
                        "round": row["round"],
                        "uplink_megabytes": sent,
                        "train_loss": row.get("train_loss"),
                        "val_loss": row.get("val_loss"),
                        "test_loss": row.get("test_loss"),
                    }
                    | percents
                )
    return lines


def machine_list(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The machines of run.json's `records`, each once."""
    return list(dict.fromkeys(map(machine, records)))


def machine(record: Mapping[str, Any]) -> str:
    """Processor or GPU and threads, from a run.json."""
    described = record.get("machine")
    processor = described.get("processor") if isinstance(described, dict) else None
    device = record.get("device", "unknown device")
    where = str(processor or "unknown processor") if device == "cpu" else f"{device} ({processor})"
    return f"{where}, {record.get('threads', '?')} CPU threads per run"


def speed(outcome: Outcome) -> tuple[float, float]:
    """Of a run that is done: seconds per round, training images per second. Medians over its rounds from 1 on.

    Seconds are those of clients and server, without evaluation. Images are NaN where rounds.csv does not tell their
    number: clients take unequal numbers of steps, or have fewer examples than a batch. Both are NaN without a round, or
    of a run that left its end alone.
    """
    if outcome.record is None:
        return nan, nan
    rounds = [row for row in outcome.rows if row["round"] and row.get("train_seconds")]
    seconds = [row["train_seconds"] + (row.get("overhead_seconds") or 0.0) for row in rounds]
    if not seconds:
        return nan, nan
    images = [_images(outcome.record, row) / spent for row, spent in zip(rounds, seconds, strict=True)]
    return median(seconds), median(images)


def _images(record: Mapping[str, Any], row: Row) -> float:
    config, shards = record["config"], record.get("shards", {"smallest": 0})
    if config.get("strategy") == "centralized":
        return float(record["data"]["train"])  # a round is an epoch
    if config.get("local-steps-max") or shards["smallest"] < config["batch-size"]:
        return nan
    return float(row["clients"] * config["local-steps"] * config["batch-size"])


def _portable(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    kept = {key: value for key, value in settings.items() if key not in OPERATIONAL_KEYS and key not in CHOSEN_KEYS}
    return kept | {key: Path(str(kept[key])).name for key in ("weights", "mask-file") if kept.get(key)}
