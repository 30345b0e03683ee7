"""Finished runs that a study would have but for settings that follow the machine: those of another card or a laptop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fl_taskarith.config.settings import IDENTITY_KEYS, RECORDED_DEFAULTS, SWITCHABLE_KEYS
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.packed_runs import pack_of, read_pack
from fl_taskarith.storage.run_record import is_finished, read_record
from fl_taskarith.study.plan import Plan
from fl_taskarith.study.results import State, StudyResults

OF_THE_MACHINE = ("precision", "compile", "clients-at-once")  # which are "auto" by default, or may be
DECISIVE = sorted(IDENTITY_KEYS - SWITCHABLE_KEYS - set(OF_THE_MACHINE) - {"threads"})


def made_elsewhere(results: StudyResults, plans: Sequence[Plan]) -> Iterator[str]:
    """Yield a line for each choice of these settings under which runs that are left have been finished."""
    left = {_identity(run.to_run_config()): run.to_run_config()
            for plan in plans for run, outcome, _ in plan.known if outcome.state is State.TO_DO}  # fmt: skip
    if not left:
        return
    found: dict[str, int] = {}
    for config in _finished(results):
        if (mine := left.get(_identity(config))) is not None:
            other = [key for key in OF_THE_MACHINE if _value(config, key) != mine[key]]
            words = " ".join(f"{key}={_value(config, key)}" for key in other)
            found[words] = found.get(words, 0) + 1
    for words, number in found.items():
        yield (
            f"{number} of the runs left were finished under {words}, as another machine chose: give that after the "
            "study file to go on from them."
        )


def _finished(results: StudyResults) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of every finished run of the study's family, in folders or packed, that can be read."""
    for folder in sorted(results.runs.glob("*/")):
        with suppress(CheckpointError):
            if (record := read_record(folder)) is not None and is_finished(record):
                yield record["config"]
    with suppress(CheckpointError):
        yield from (run.record["config"] for run in read_pack(pack_of(results.runs)).values() if run.record is not None)


def _identity(config: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(_value(config, key) for key in DECISIVE)


def _value(config: Mapping[str, Any], key: str) -> object:
    return config.get(key, RECORDED_DEFAULTS[key])
