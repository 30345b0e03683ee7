"""Many runs in one file: FAMILY/runs.jsonl stands in for the folders in FAMILY/runs that are not there.

The first line holds settings that most runs share. Each further line is one run, in the order of their names: what its
run.json says (settings that differ from the shared ones, and all other facts), its rounds by column, and a checksum; or
why it diverged. So a diff shows runs, and every value reads back to the same bits.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config.rule import shown
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.record_files import COUNT, conforming, unreadable
from fl_taskarith.storage.run_folder import CELLS, COLUMNS, Row
from fl_taskarith.storage.run_record import SETTINGS, SHAPE

FORMAT = "fl-taskarith runs, 1"
SUFFIX = ".jsonl"
DIGITS = 16  # hexadecimal, of a line's checksum
HEAD = {"format": str, "runs?": COUNT, "config": SETTINGS}
LINE = {
    "run": str,
    "sha256": str,
    "run_sha256?": str,
    "diverged?": str,
    "record?": SHAPE,
    "rounds?": {("round" if name == "round" else f"{name}?"): [shape] for name, shape in CELLS.items()},
}


@dataclass(frozen=True)
class PackedRun:
    """A run that need not be run again.

    Attributes:
        record: run.json; None for a diverged run.
        rows: of rounds.csv; none for a diverged run.
        cause: why it diverged; "" for a finished run.
    """

    record: dict[str, Any] | None = None
    rows: tuple[Row, ...] = ()
    cause: str = ""


def pack_of(runs: Path) -> Path:
    """Return the pack that stands in for folders in `runs`."""
    return Path(f"{runs.absolute()}{SUFFIX}")


def packed_run(folder: Path) -> PackedRun | None:
    """Return the run that a pack holds in place of `folder`, if any.

    Raises:
        CheckpointError: the pack cannot be read.
    """
    return read_pack(pack_of(folder.parent)).get(folder.name)


def packed_folders(place: Path) -> Iterator[Path]:
    """Yield where the folders of the finished runs would be that packs for, or anywhere below, `place` hold.

    Raises:
        CheckpointError: a pack cannot be read.
    """
    own = place if place.name.endswith(SUFFIX) else pack_of(place)
    for pack in [*([own] if own.is_file() else []), *sorted(place.rglob(f"runs{SUFFIX}"))]:
        yield from (pack.with_suffix("") / name for name, run in read_pack(pack).items() if run.record is not None)


def read_pack(path: Path) -> Mapping[str, PackedRun]:
    """Return the runs in a pack by name; none where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or a line is damaged or was edited.
    """
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise unreadable(path, error, "See to its folder.") from error
    return _read(path, state.st_mtime_ns, state.st_size)


def write_pack(path: Path, runs: Mapping[str, PackedRun]) -> None:
    """Write a pack of `runs`, and read it back.

    Raises:
        CheckpointError: the file cannot be written, or does not hold what was written.
    """
    configs = [run.record["config"] for run in runs.values() if run.record is not None]
    keys = [key for key in configs[0] if all(key in config for config in configs)] if configs else []
    common = {key: Counter(json.dumps(config[key]) for config in configs).most_common(1)[0][0] for key in keys}
    shared = {key: json.loads(value) for key, value in common.items()}
    lines = [json.dumps({"format": FORMAT, "runs": len(runs), "config": shared})]
    for name, run in sorted(runs.items()):
        line: dict[str, Any] = {"run": name, "sha256": _checksum(run), "run_sha256": _named(name, run)}
        if run.record is None:
            line["diverged"] = run.cause
        else:
            config = {key: value for key, value in run.record["config"].items() if json.dumps(value) != common.get(key)}
            columns = {column: [row.get(column) for row in run.rows] for column in COLUMNS}
            known = {column: cells for column, cells in columns.items() if any(cell is not None for cell in cells)}
            line |= {"record": run.record | {"config": config}, "rounds": known}
        lines.append(json.dumps(line))
    written = path.with_name(f".{path.name}.new")  # so that what cannot be read never takes the place of what can
    try:
        write_atomically(written, "\n".join(lines) + "\n")
        if {name: _checksum(run) for name, run in read_pack(written).items()} != {
            name: _checksum(run) for name, run in runs.items()
        }:
            raise CheckpointError(
                f"{written} does not read back as it was written: check the disk. {path} is as before."
            )
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> Mapping[str, PackedRun]:
    """Read a pack; `changed` and `size` tell one state of the file from another."""
    number = 1
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        head = conforming(json.loads(first), HEAD)
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {shown(head['format'])}, and this version reads {FORMAT!r}")
        runs = {}
        for line in lines:
            number += 1
            content = conforming(json.loads(line), LINE)
            run = _unpacked(content, head["config"])
            if content["sha256"] != _checksum(run):
                raise ValueError("its checksum is another")
            if content.get("run_sha256", named := _named(content["run"], run)) != named:
                raise ValueError(f"it is another run under the name {shown(content['run'])}")
            if content["run"] in runs:
                raise ValueError(f"{shown(content['run'])} is there twice")
            if run.record is not None and run.record["config"].get("run-name", "") not in ("", content["run"]):
                raise ValueError(f"it is the run {shown(run.record['config']['run-name'])} under another name")
            runs[content["run"]] = run
        if head.get("runs", len(runs)) != len(runs):
            raise ValueError(f"the file ends there, and its first line counts {head['runs']} runs, not {len(runs)}")
    except (OSError, ValueError, RecursionError) as error:
        remedy = (
            "It is damaged, or was edited: restore the file, or, to run that run again, delete the line and lower "
            '"runs" in the first one by 1.'
        )
        raise unreadable(path, error, remedy, f"line {number}") from error
    return runs


def _unpacked(content: Mapping[str, Any], shared: Mapping[str, Any]) -> PackedRun:
    if "diverged" in content:
        return PackedRun(cause=content["diverged"])
    if "record" not in content or "rounds" not in content:
        raise ValueError("it has neither record and rounds nor a cause")
    record, rounds = content["record"], content["rounds"]
    length = len(rounds["round"])
    columns = {column: rounds.get(column, [None] * length) for column in COLUMNS}
    rows = tuple(dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
    if not rows:
        raise ValueError("it has no rounds")
    return PackedRun(record | {"config": {**shared, **record["config"]}}, rows)


def _named(name: str, run: PackedRun) -> str:
    """Return a checksum of a run and its name: a line that was renamed has another."""
    return hashlib.sha256(f"{name} {_checksum(run)}".encode()).hexdigest()[:DIGITS]


def _checksum(run: PackedRun) -> str:
    """Return a checksum of all that is known of a run, the shared settings among it."""
    rows = [{column: cell for column, cell in row.items() if cell is not None} for row in run.rows]
    text = json.dumps([run.record, rows, run.cause], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
