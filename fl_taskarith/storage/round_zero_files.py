"""Results of round 0 as files that several processes share: data-dir/round-zero/KIND-DIGEST-CHECKSUM.safetensors.

A file that is not what its name says is damaged and computed again. The newest files stay, within `MOST_BYTES` in all.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.locks import A_DAY
from fl_taskarith.storage.tensor_file import read_unsealed, unsealed
from fl_taskarith.storage.verified_files import write_verified

MOST_BYTES = 256 * 2**20  # of all files together: hundreds of heads, or a hundred masks of a ViT-S/14
MOST_FILES = 1_000
NOTES = ("facts", "counted")  # beside the tensors: JSON values, and the traffic and warnings of computing them

log = logging.getLogger(__name__)


def read_start(folder: Path, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest sound file of this stem; None without one. Damaged ones are removed.

    Returns:
        Its tensors, in the shapes that they were written in, on the CPU, and the JSON values beside them.
    """
    for path in _newest_first(folder, f"{stem}-*.safetensors"):
        found = read_unsealed(path)
        try:
            if found is None:
                raise ValueError("its content is not what its name says")
            tensors, metadata = found
            if metadata.get("stem", stem) != stem:
                raise ValueError(f"it is {metadata['stem']} under another name")
            start = tensors, {key: json.loads(metadata[key]) for key in NOTES}
        except (ValueError, KeyError) as error:
            if path.exists():  # else another process made room
                log.warning("%s is damaged (%s); what it held is computed again.", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
            continue
        with contextlib.suppress(OSError):
            path.touch()  # what is used stays longest
        return start
    return None


def write_start(folder: Path, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Store tensors, of any shapes, and JSON values (`NOTES`) for other processes, and make room for them.

    Where they cannot be written, a warning says so.
    """
    metadata = {"stem": stem} | {key: json.dumps(value) for key, value in notes.items()}
    try:
        write_verified(folder, stem, unsealed(tensors, metadata))
    except CheckpointError as error:
        log.warning("Other processes will compute %s again. %s", stem, error)
    _make_room(folder)


def _make_room(folder: Path) -> None:
    """Remove the files used longest ago beyond the bounds, and locks that a killed process left a day ago."""
    size = 0
    for number, path in enumerate(_newest_first(folder, "*.safetensors"), 1):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
            if number > MOST_FILES or size > MOST_BYTES:
                path.unlink()
    for pattern in (".*.lock", ".*.pid"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > A_DAY:
                    path.unlink()


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    """List the files of that pattern, the last used first."""
    dated = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            dated.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated, reverse=True)]
