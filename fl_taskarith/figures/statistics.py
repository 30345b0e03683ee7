"""Statistics of a handful of seeds: mean, spread, paired intervals, the smallest detectable difference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95
POWER = 0.80


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
    """Differences matched by seed.

    Attributes:
        mean, sd, n: of the differences; NaN where n is too small.
        low, high: 95 % t interval of the mean, mean ± t_{0.975, n-1} sd / √n; NaN for n < 2.
        detectable: sd (t_{0.975, n-1} + t_{0.80, n-1}) / √n, the true difference that a two-sided paired t test at 5 %
            finds with about 80 % power (77 % at n = 3, for the formula takes the central t) if the differences spread
            as these do; NaN for n < 2. With few seeds sd is itself uncertain by a lot, and so is this.
    """

    mean: float
    sd: float
    n: int
    low: float
    high: float
    detectable: float


def summarise(values: Sequence[float]) -> Summary:
    """Return mean, sd and n of `values`."""
    count = len(values)
    return Summary(fmean(values) if count else math.nan, stdev(values) if count > 1 else math.nan, count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """Summarise `values` minus `reference` over the seeds that both have."""
    of_seeds = summarise([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])
    mean, sd, n = of_seeds.mean, of_seeds.sd, of_seeds.n
    if n < 2:
        return Paired(mean, sd, n, math.nan, math.nan, math.nan)
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1))
    error = sd / math.sqrt(n)
    detectable = error * (quantile + float(student.ppf(POWER, n - 1)))
    return Paired(mean, sd, n, mean - quantile * error, mean + quantile * error, detectable)
