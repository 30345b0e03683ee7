"""Describes a mask as JSON values and as text for a terminal."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.errors import CheckpointError, printable
from fl_taskarith.masking.anatomy import KINDS, Part, density_by_kind, density_by_layer, key_biases, parts
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.storage.record_files import conforming

CELL = 9  # characters of a column


@dataclass(frozen=True)
class DescribedMask:
    """A mask, the model it is for, and how it was made, as its file holds them."""

    mask: Mask
    model: str
    facts: dict[str, Any]

    @property
    def title(self) -> str:
        """Model, rule, density and, for rules that score, the calibration rounds R."""
        words = [self.model, str(self.facts.get("rule", "unknown rule")), f"density {self.mask.density:.4g}"]
        if "calibration_rounds" in self.facts:
            words.append(f"R = {self.facts['calibration_rounds']}")
        return printable(", ".join(words))


def read_mask(path: Path) -> DescribedMask:
    """Read the mask in a file that a run or `fl-taskarith mask` wrote.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    mask, metadata = load_mask(path)
    try:
        facts = conforming(json.loads(metadata.get("facts", "{}")), {str: object})
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The description of the mask in {path} is damaged ({printable(error)}). Make the mask again."
        ) from error
    if not mask.size:
        raise CheckpointError(f"{path} holds a mask of no tensors at all. Make the mask again.")
    return DescribedMask(mask, metadata.get("model", "unknown model"), facts)


def summarise(described: DescribedMask) -> dict[str, Any]:
    """Return how the mask was made, and densities by layer, by kind of tensor and by both (JSON values)."""
    mask = described.mask
    both: dict[str, dict[str, float]] = {}
    for (layer, kind), part in parts(mask).items():
        both.setdefault(layer, {})[kind] = part.density
    return {
        "model": described.model,
        **described.facts,
        "density": mask.density,
        "updated": mask.updated,
        "maskable": mask.size,
        "density_by_layer": {layer: part.density for layer, part in density_by_layer(mask).items()},
        "density_by_kind": {kind: part.density for kind, part in density_by_kind(mask).items()},
        "density_by_layer_and_kind": both,
        "key_biases": key_biases(mask),
    }


def anatomy_table(described: DescribedMask) -> str:
    """Return lines for a terminal: the share of updated weights in %, by layer (rows) and kind of tensor (columns)."""
    mask, cells = described.mask, parts(described.mask)
    by_layer, by_kind = density_by_layer(mask), density_by_kind(mask)
    kinds = [kind for kind in KINDS if kind in by_kind]
    whole = Part(mask.updated, mask.size)
    rows = [(layer, [cells.get((layer, kind)) for kind in kinds] + [part]) for layer, part in by_layer.items()]
    rows.append(("all", [*by_kind.values(), whole]))
    lines = [
        f"{described.title}: {mask.updated:,} of {mask.size:,} maskable weights are updated",
        f"{key_biases(mask):,} of them are key biases, whose gradient is zero",
        "",
        "% updated".ljust(CELL + 2) + "".join(name.rjust(CELL) for name in [*kinds, "all"]),
    ]
    lines += [name.ljust(CELL + 2) + "".join(_percent(part).rjust(CELL) for part in row) for name, row in rows]
    return "\n".join(lines)


def overlap_table(names: Sequence[str], matrix: Sequence[Sequence[float]], by_chance: Sequence[Sequence[float]]) -> str:
    """Return lines for a terminal: the Jaccard overlap of numbered masks, and below it what chance would give.

    Args:
        names: of n masks.
        matrix, by_chance: n lists of n overlaps in [0, 1].
    """
    numbers = [f"({number})" for number in range(1, len(names) + 1)]
    lines = [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]
    for title, values in (("Jaccard", matrix), ("by chance", by_chance)):
        lines += ["", title.ljust(CELL + 2) + "".join(number.rjust(CELL) for number in numbers)]
        for number, row in zip(numbers, values, strict=True):
            lines.append(number.ljust(CELL + 2) + "".join(f"{value:.4f}".rjust(CELL) for value in row))
    return "\n".join(lines)


def _percent(part: Part | None) -> str:
    """Return two decimals; only zero reads as zero, and only all reads as all."""
    if part is None:
        return "-"
    text = f"{100 * part.density:.2f}"
    if text == "0.00" and part.updated:
        return "<0.01"
    return ">99.99" if text == "100.00" and part.updated < part.size else text
