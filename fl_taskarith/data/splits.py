"""Stratified splits of the training set: calibration (masks only), validation (choices only), train."""

from dataclasses import dataclass

import numpy as np

from fl_taskarith.errors import ConfigError


@dataclass(frozen=True)
class Splits:
    """Disjoint, sorted indices into the training set, each int64 [n]."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray


def split_training_set(
    labels: np.ndarray, calibration_size: int, validation_size: int, train_subset: int, seed: int
) -> Splits:
    """Carve calibration and validation from `labels` [N], then take `train_subset` of the rest (0 = all of it).

    The validation split depends on `calibration_size` and `seed` only beside its own size, the training subset on all
    of them: none on the federation's seed.

    Raises:
        ConfigError: a split is smaller than the number of classes or larger than what is left.
    """
    everything = np.arange(len(labels))
    calibration = _carve(everything, labels, calibration_size, seed, "calibration-size")
    rest = np.setdiff1d(everything, calibration)
    validation = _carve(rest, labels, validation_size, seed, "validation-size")
    rest = np.setdiff1d(rest, validation)
    train = _carve(rest, labels, train_subset, seed, "train-subset") if train_subset else rest
    return Splits(train, validation, calibration)


def _carve(candidates: np.ndarray, labels: np.ndarray, size: int, seed: int, key: str) -> np.ndarray:
    """Return `size` of the `candidates`, stratified; errors name `key`."""
    classes = len(np.unique(labels))
    if size == 0:
        return candidates[:0]
    if not classes <= size <= len(candidates):
        raise ConfigError(
            f"{key} = {size} cannot be had: {len(candidates)} training images of {classes} classes are left, and a "
            f"stratified split needs at least one image of each class and no more than there are."
        )
    chosen: np.ndarray = candidates[stratified_sample(labels[candidates], size, seed)]
    return chosen


def stratified_sample(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return sorted positions of `size` examples, drawn per class in proportion to `labels` [N] (largest remainder)."""
    generator = np.random.default_rng([seed, size, len(labels)])
    classes, counts = np.unique(labels, return_counts=True)
    quotas = apportion(size, counts.astype(float), np.zeros_like(counts), counts)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    positions: np.ndarray = np.sort(np.concatenate(chosen))
    return positions


def apportion(total: int, weights: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Return whole numbers proportional to `weights` [n], between `lower` and `upper` [n], that add up to `total`.

    Largest-remainder apportionment within bounds; ties go to the lower index. Needs sum(lower) <= total <= sum(upper).
    """
    exact = total * weights / weights.sum()
    quotas: np.ndarray = np.clip(np.floor(exact).astype(int), lower, upper)
    while (missing := total - int(quotas.sum())) != 0:
        step = 1 if missing > 0 else -1
        open_ones = quotas < upper if step > 0 else quotas > lower
        need = np.where(open_ones, step * (exact - quotas), -np.inf)
        order = np.argsort(-need, kind="stable")[: min(abs(missing), int(open_ones.sum()))]
        quotas[order] += step
    return quotas
