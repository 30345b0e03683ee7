"""The results of round 0, stored for the next run that would compute the same bits: in this process, and on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fl_taskarith.config.fields import ALGORITHM_KEYS, rules_by_heading
from fl_taskarith.config.settings import OPERATIONAL_KEYS, Config
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.masking.calibration import Calibration
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import make_folder
from fl_taskarith.storage.locks import only_maker
from fl_taskarith.storage.paths import resolve
from fl_taskarith.storage.round_zero_files import read_start, write_start
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.storage.run_log import LOGGER
from fl_taskarith.training.local import Evaluation
from fl_taskarith.workspace.clusters import clustered
from fl_taskarith.workspace.global_model import Weights
from fl_taskarith.workspace.machine import describe_device
from fl_taskarith.workspace.workspace import Workspace

Found = TypeVar("Found")
Packed = tuple[Mapping[str, Tensor], Any]
"""Tensors and JSON values."""

# What only later rounds depend on. A setting that is not listed counts as one that round 0 depends on.
LOCAL_KEYS = frozenset(rules_by_heading()["training"]) | {"optimizer-kernels"}
ROUND_KEYS = ALGORITHM_KEYS | {
    *("num-rounds", "participation", "sampling", "dropout", "ridge-refresh", "evaluate-every", "cluster-rule")
}
MASK_KEYS = frozenset(rules_by_heading()["mask"])
BY_CONTENT = frozenset({"strategy", "weights", "device"})  # in the digest by what they stand for
LATER_KEYS = OPERATIONAL_KEYS - {"engine"} | LOCAL_KEYS | ROUND_KEYS | BY_CONTENT

KEPT = 2  # of each kind, in this process
WARNINGS = "warnings"  # beside what is counted
COUNTED = ("clients", "uplink_bytes", "downlink_bytes")  # of a row: as much as if it had been computed here
SWITCH = "FL_TASKARITH_SHARED_STARTS"  # in the environment: "off" keeps the results of round 0 in their process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind(Generic[Found]):
    """One result of round 0.

    Attributes:
        name: begins the names of its files.
        making: what a process that computes it does, for those that wait.
        ignored: settings that do not matter to it beside `LATER_KEYS`.
        pack, unpack: turn it into what a file holds, and back, on a device.
    """

    name: str
    making: str
    ignored: frozenset[str]
    pack: Callable[[Found], Packed]
    unpack: Callable[[Mapping[str, Tensor], Any, torch.device], Found]


HeadAndFacts = tuple[Weights, dict[str, object]]
Table = list[list[Evaluation]]  # of every model, in every group of clients


def _unpacked_head(tensors: Mapping[str, Tensor], facts: Any, device: torch.device) -> HeadAndFacts:
    return {name: tensors[name].to(device) for name in HEAD_PARAMETERS}, facts


def _packed_mask(found: Calibration) -> Packed:
    shapes = {name: list(tensor.shape) for name, tensor in found.mask.tensors.items()}
    return found.mask.packed(), {"shapes": shapes, "threshold": found.threshold, "densities": found.densities}


def _unpacked_mask(tensors: Mapping[str, Tensor], facts: Any, device: torch.device) -> Calibration:
    # In the order of the shapes, which is the model's: a file has another, and sums over tensors depend on it.
    packed = {name: tensors[name] for name in facts["shapes"]}
    mask = Mask.unpacked(packed, {name: tuple(shape) for name, shape in facts["shapes"].items()})
    return Calibration(mask.to(device), facts["threshold"], tuple(facts["densities"]))


def _packed_table(found: Table) -> Packed:
    return {}, [list(map(asdict, model)) for model in found]


def _unpacked_table(tensors: Mapping[str, Tensor], facts: Any, device: torch.device) -> Table:
    return [[Evaluation(**group) for group in model] for model in facts]


HEAD = Kind[HeadAndFacts]("head", "solves the head", MASK_KEYS, lambda found: found, _unpacked_head)
MASK = Kind[Calibration]("mask", "chooses the mask", frozenset(), _packed_mask, _unpacked_mask)
EVALUATIONS = {
    split: Kind[Table](f"evaluation-{split}", "evaluates round 0", MASK_KEYS, _packed_table, _unpacked_table)
    for split in ("val", "test")
}


class Starts:
    """The head, the mask and the measures of round 0, for the next run that would find the same.

    A study runs one configuration at many learning rates, under many algorithms, in several processes; its rounds may
    take less time than solving the head and scoring the mask, which are the same bits every time. The last two of each
    are stored in this process: one that shares runs with others alternates between two arms. All are stored on disk,
    under data-dir/round-zero, where several processes that want the same wait for the first.
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, tuple[Any, Row]]] = {}  # by kind and digest, the last one used at the end

    def once(self, home: Workspace, kind: Kind[Found], row: Row, find: Callable[[], Found]) -> Found:
        """Return `find()`, which may count traffic in `row`, or its result for a run whose round 0 has the same bits.

        Nothing is stored under head-rounds, whose result depends on the rate, nor where failed clients may be left out.
        """
        config = home.config
        if config.head_rounds or config.on_client_failure == "skip":
            return find()
        digest, kept = _digest(home, kind), self._kept.setdefault(kind.name, {})
        before = {name: row[name] for name in COUNTED if name in row}
        computed: list[Found] = []

        def compute() -> tuple[Found, Row]:
            found, counted = _counted(row, before, find)
            computed.append(found)
            return found, counted

        if digest in kept:
            entry = kept.pop(digest)
        elif _shareable(config, kind):
            entry = _shared(home, kind, f"{kind.name}-{digest}", compute)
        else:
            entry = compute()
        kept[digest] = entry
        if len(kept) > KEPT:
            del kept[next(iter(kept))]
        found, counted = entry
        for message in () if computed else counted.get(WARNINGS, ()):
            log.warning("%s", message)
        row |= {name: value + counted.get(name, 0) for name, value in before.items()}
        return found  # type: ignore[no-any-return]


def _counted(row: Row, before: Row, find: Callable[[], Found]) -> tuple[Found, Row]:
    """Return `find()`, and beside it the traffic that it adds to `row` and what it warns of."""
    warned = BufferingHandler(10_000)
    warned.setLevel(logging.WARNING)
    LOGGER.addHandler(warned)
    try:
        found = find()
    finally:
        LOGGER.removeHandler(warned)
    messages = [record.getMessage() for record in warned.buffer]
    return found, {name: row[name] - value for name, value in before.items()} | {WARNINGS: messages}


def _shareable(config: Config, kind: Kind[Any]) -> bool:
    """Whether what this process computes holds for another, and takes long enough to compute.

    SuperNodes compute on machines and from data that this process does not see. Byzantine clients are an experiment
    on what arrives from clients, so it is computed every time. A mask from a file or from the weights alone is quick,
    and a rule of the user's own may change under its name.
    """
    if os.environ.get(SWITCH) == "off" or config.engine != "sequential" or config.byzantine_fraction > 0:
        return False
    return kind is not MASK or (bool(config.scored) and ":" not in config.mask_rule)


def _shared(home: Workspace, kind: Kind[Found], stem: str, find: Callable[[], tuple[Found, Row]]) -> tuple[Found, Row]:
    """Return the entry in the file of this stem; one process computes and writes it, and others wait for that."""
    folder = resolve(home.config.data_dir, "data-dir") / "round-zero"

    def stored() -> tuple[Found, Row] | None:
        entry = read_start(folder, stem)
        return entry and (kind.unpack(entry[0], entry[1]["facts"], home.device), entry[1]["counted"])

    if (entry := stored()) is not None:
        return entry
    try:
        make_folder(folder)
    except CheckpointError:
        return find()
    with only_maker(folder / stem, kind.making):
        if (entry := stored()) is None:
            entry = find()
            tensors, facts = kind.pack(entry[0])
            write_start(folder, stem, tensors, {"facts": facts, "counted": entry[1]})
    return entry


def _digest(home: Workspace, kind: Kind[Any]) -> str:
    """Return a checksum of all that decides the bits, this package's code included."""
    config, ignored = home.config, LATER_KEYS | kind.ignored
    settings = {key: value for key, value in config.to_run_config().items() if key not in ignored}
    federated = config.strategy != "centralized"
    parts: dict[str, object] = {
        "settings": settings,
        "clients": config.strategy if clustered(config) or not federated else "federated",
        "weights": home.pretrained_sha256,
        "inputs": home.inputs_sha256,
        "shards": home.shards_sha256 if federated else "",
        "device": describe_device(home.device),
        "threads": torch.get_num_threads(),
        "surroundings": _surroundings(),
    }
    if kind is MASK and config.mask_file:
        parts["mask file"] = _content(config.mask_file)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _content(mask_file: str) -> str:
    """Return the checksum of a mask file; "" where it cannot be read, which the run itself will say."""
    try:
        return hashlib.sha256(resolve(mask_file, "mask-file").read_bytes()).hexdigest()
    except (OSError, ConfigError):
        return ""


@lru_cache(maxsize=1)
def _surroundings() -> list[str]:
    """Return processor, versions, and a checksum of this package's code: an edit does not change its version."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        code.update(f"|{path.relative_to(package).as_posix()}:".encode() + path.read_bytes())
    here = environment()
    return [
        *(f"{package} {version}" for package, version in here["versions"].items()),
        f"scipy {metadata.version('scipy')}",
        here["machine"]["processor"],
        torch.backends.cpu.get_cpu_capability(),
        str(torch.version.cuda),
        code.hexdigest(),
    ]
