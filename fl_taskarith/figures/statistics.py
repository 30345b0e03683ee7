"""Statistics of a handful of runs: mean, spread, paired intervals, equivalence, the smallest detectable difference."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from fl_taskarith.figures.bootstrap import central_interval, p_of_zero, resampled_means

CONFIDENCE = 0.95
POWER = 0.80
FEWEST = 3  # runs that a t interval needs: of two, it says next to nothing of where the mean lies
MARGIN = 0.5  # points: accuracies that differ by less are equivalent
IMAGES, SEEDS_AND_IMAGES, SEEDS = "images", "seeds and images", "seeds"  # what an interval generalises to

NO_WIDTH = 1e-9  # points; below it differences are the same number

Key = TypeVar("Key", bound=Hashable)  # of a run among those of its arm: see `run_key`
Correct = Mapping[Key, NDArray[np.float64]]
"""For each run, [images]: how often each test image was classified right."""


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (ddof = 1) of n values; NaN where n is too small to have one."""

    mean: float
    sd: float
    n: int

    def band(self, lowest: float = -math.inf, highest: float = math.inf) -> tuple[float, float]:
        """Return mean - sd and mean + sd, cut at the lowest and the highest possible value; NaN without a sd."""
        if math.isnan(self.sd):
            return math.nan, math.nan
        return max(self.mean - self.sd, min(lowest, self.mean)), min(self.mean + self.sd, max(highest, self.mean))


@dataclass(frozen=True)
class Paired:
    """Differences matched by run; the runs of one shard seed count as their mean.

    Attributes:
        mean, sd, n: of the differences; NaN where n is too small.
        low, high: 95 % interval of the mean; NaN where there is none.
        detectable: the true difference that a two-sided test at 5 % finds with about 80 % power, if the differences
            spread as these do; NaN without an interval. With few seeds the spread is itself uncertain, and so is this.
        values: the differences, in the order of the seeds.
        inner: 90 % interval, by which two one-sided tests at 5 % judge equivalence.
        p: of the two-sided test that the mean is 0; 1 where nothing can be tested.
        over: what the interval is over: `SEEDS_AND_IMAGES` and, of one seed, `IMAGES`, from 10,000 resamplings where it
            is known which test images each run has right; else `SEEDS`, a t interval for n ≥ 3: mean ± t_{0.975, n-1}
            sd / √n; "" without an interval.
    """

    mean: float
    sd: float
    n: int
    low: float = math.nan
    high: float = math.nan
    detectable: float = math.nan
    values: tuple[float, ...] = ()
    inner: tuple[float, float] = (math.nan, math.nan)
    p: float = 1.0
    over: str = ""

    def equivalent(self, margin: float = MARGIN) -> bool:
        """Return whether the mean lies within ± `margin` by two one-sided tests (Schuirmann, 1987) at 5 %.

        Two seeds that agree by chance would say so too often, and so would means of seeds that are all alike, where
        the images are not known: neither is taken for equivalence.
        """
        told = self.n >= FEWEST and (self.has_width or self.over == SEEDS_AND_IMAGES)
        return told and -margin < self.inner[0] and self.inner[1] < margin

    @property
    def has_width(self) -> bool:
        """Whether there is an interval, and differences that spread; a t interval of equal ones is a point."""
        return bool(self.over) and self.high - self.low > NO_WIDTH


def summarise(values: Sequence[float]) -> Summary:
    """Return mean, sd and n of `values`."""
    count = len(values)
    return Summary(fmean(values) if count else math.nan, stdev(values) if count > 1 else math.nan, count)


def paired(
    values: Mapping[Key, float],
    reference: Mapping[Key, float],
    correct: Correct[Key] | None = None,
    reference_correct: Correct[Key] | None = None,
) -> Paired:
    """Summarise `values` minus `reference`, both in percent, over the runs that both have.

    Args:
        correct, reference_correct: of the same runs. The interval is over seeds and test images where both have all
            common runs, on equally many images.
    """
    common = sorted(values.keys() & reference.keys(), key=seeds_of)
    by_shards = _clusters({key: values[key] - reference[key] for key in common})
    differences = tuple(float(np.mean(each)) for each in by_shards.values())
    of_seeds = summarise(differences)
    mean, sd, n = of_seeds.mean, of_seeds.sd, of_seeds.n
    images = _image_differences(common, correct or {}, reference_correct or {})
    if images is not None:
        means = 100 * resampled_means(images)
        detectable = float(means.std() * (norm.ppf(0.5 + CONFIDENCE / 2) + norm.ppf(POWER)))
        inner = central_interval(means, 2 * CONFIDENCE - 1)
        over = SEEDS_AND_IMAGES if n > 1 else IMAGES
        low, high = central_interval(means, CONFIDENCE)
        return Paired(mean, sd, n, low, high, detectable, differences, inner, p_of_zero(means), over)
    if n < FEWEST:
        return Paired(mean, sd, n, values=differences)
    error = sd / math.sqrt(n)
    two_sided, one_sided, power = (
        float(student.ppf(level, n - 1)) for level in (0.5 + CONFIDENCE / 2, CONFIDENCE, POWER)
    )
    half, narrow = two_sided * error, one_sided * error
    detectable = error * (two_sided + power)
    p = 1.0 if sd < NO_WIDTH else float(2 * student.sf(abs(mean) / error, n - 1))
    inner = (mean - narrow, mean + narrow)
    return Paired(mean, sd, n, mean - half, mean + half, detectable, differences, inner, p, SEEDS)


def run_key(seed: int, shard_seed: int) -> int | tuple[int, int]:
    """Return what tells a run from others of its arm: its seed, where the shards have it too; else both."""
    return seed if seed == shard_seed else (shard_seed, seed)


def seeds_of(key: Any) -> tuple[Any, Any]:
    """Return (shard seed, seed) of a run's key."""
    return key if isinstance(key, tuple) else (key, key)


def seed_words(key: Any) -> str:
    """Return "seed 3", or "seed 3, shard seed 1"."""
    shards, seed = seeds_of(key)
    return f"seed {seed}" + (f", shard seed {shards}" if shards != seed else "")


def _clusters(by_run: Mapping[Key, Any]) -> dict[Hashable, list[Any]]:
    """Return the values of the runs by their shard seed."""
    clusters: dict[Hashable, list[Any]] = {}
    for key, value in by_run.items():
        clusters.setdefault(seeds_of(key)[0], []).append(value)
    return clusters


def share_of_gain(gain: Paired, of: Paired) -> float:
    """Return the mean gain in percent of another; NaN where one is not known, or the other is no gain."""
    return 100 * gain.mean / of.mean if gain.n and of.n and of.mean > NO_WIDTH else math.nan


def _image_differences(
    keys: Sequence[Key], correct: Correct[Key], reference: Correct[Key]
) -> NDArray[np.float64] | None:
    """Return [shard seeds, images]: how much oftener the first has an image right; None where that is not known."""
    if not keys or any(key not in correct or key not in reference for key in keys):
        return None
    if len({len(each[key]) for key in keys for each in (correct, reference)}) > 1:
        return None
    by_shards = _clusters({key: correct[key] - reference[key] for key in keys})
    return np.stack([np.mean(rows, axis=0) for rows in by_shards.values()])


def holm(p: Sequence[float]) -> list[float]:
    """Return the p values of a family as adjusted by Holm's step-down procedure.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979: the
    i-th smallest of m p values is multiplied by m - i + 1, and is no less than the one before it.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        least = adjusted[place] = min(1.0, max(least, p[place] * (len(p) - rank)))
    return adjusted


def verdict_on(pairs: Paired, p: float, margin: float = MARGIN) -> str:
    """Return "equivalent within MARGIN", "different", where `p` (perhaps adjusted) is at most 5 %, or "cannot tell".

    A difference that is within the margin and yet not 0 is called equivalent: its interval shows the rest. Of one seed
    or two, the number of seeds stands behind "different": p is too small where seeds differ more than images explain.
    """
    if pairs.equivalent(margin):
        return f"equivalent within {margin:g}"
    if p > 1 - CONFIDENCE or not pairs.over:
        return "cannot tell"
    return "different" if pairs.n >= FEWEST else f"different (n = {pairs.n})"


def judge_family(pairs: Sequence[Paired], untuned: Sequence[bool]) -> list[tuple[float, str]]:
    """Return each difference's p value as Holm adjusts it to their family, and `verdict_on` it.

    Args:
        untuned: whether an arm of the difference is not tuned: it counts as p = 1, and its verdict is "not tuned". One
            without runs counts in the same way, as "not run": the family is what was named, not what came of it.
    """
    adjusted = holm([1.0 if edge else each.p for each, edge in zip(pairs, untuned, strict=True)])
    verdicts = [
        "not run" if not each.n else "not tuned" if edge else verdict_on(each, p)
        for each, edge, p in zip(pairs, untuned, adjusted, strict=True)
    ]
    return list(zip(adjusted, verdicts, strict=True))
