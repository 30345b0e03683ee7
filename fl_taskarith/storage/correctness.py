"""Which images of a split a model classified right, as a short text that run.json holds: a bit per image."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_taskarith.errors import CheckpointError

CORRECT = "test_correct"  # in run.json: a text per group of clients that sees the test images differently, usually one


def packed(right: NDArray[np.bool_]) -> str:
    """Return `right`, [images], as two hexadecimal digits per eight images; zeros fill the last ones."""
    return np.packbits(right).tobytes().hex()


def correct_images(record: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Return for each test image how often a run's final model classified it right.

    Args:
        record: run.json.

    Returns:
        A float64 [images] array of 0 and 1, or of means over the groups of clients that see images differently; None
        for a run of a version that did not write it.

    Raises:
        CheckpointError: what run.json holds is not that of so many images.
    """
    texts = record.get(CORRECT)
    if texts is None:
        return None
    images = record.get("data", {}).get("test", 0)
    length = 2 * -(-images // 8)
    try:
        rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in texts if len(text) == length]
    except (TypeError, ValueError):
        rows = []
    if not rows or len(rows) != len(texts):
        raise CheckpointError(
            f"{CORRECT} in run.json is not a list of texts of {length} hexadecimal digits each, as {images} images "
            "need: restore run.json, or delete the run's folder to run it again."
        )
    mean: NDArray[np.float64] = np.unpackbits(np.stack(rows), axis=1, count=images).mean(axis=0)
    return mean
