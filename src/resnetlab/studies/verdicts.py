"""Verdicts: rules in words, as pure functions of the measurements. None claims more than the runs show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from resnetlab.formatting import format_share

FAIL = 0.2  # 2016 Table 1: a run with a larger error has failed
SEEDS = 3  # fewer runs than this give no verdict

RULE = (
    "Two networks are compared seed by seed. “Shown” needs at least 3 seeds, the same sign in all of them, and a 95 % interval "
    "of the mean difference (Student's t over the pairs) that excludes 0; “points to” is the same without the interval. "
    "Anything else is not shown."
)


@dataclass(frozen=True)
class PairedDifference:
    """A minus B, seed by seed, where both finished."""

    wins: int  # seeds in which A is larger
    losses: int
    n: int
    mean: float
    interval: tuple[float, float] | None  # 95 % of the mean; None below two seeds

    @property
    def strength(self) -> str:
        """How strongly the rule supports that A is larger: "shown", "points to" or "not shown"."""
        if self.n < SEEDS or self.wins < self.n:
            return "not shown"
        return "shown" if self.interval is not None and self.interval[0] > 0 else "points to"

    @property
    def reversed(self) -> PairedDifference:
        """B minus A."""
        interval = None if self.interval is None else (-self.interval[1], -self.interval[0])
        return PairedDifference(self.losses, self.wins, self.n, -self.mean, interval)


def compare_by_seed(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference:
    """Compares two networks' figures over the seeds that both have."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    mean = sum(differences) / n if n else math.nan
    interval = None
    if n > 1:
        sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
        half = student_quantile(n - 1) * sd / math.sqrt(n)
        interval = mean - half, mean + half
    return PairedDifference(sum(d > 0 for d in differences), sum(d < 0 for d in differences), n, mean, interval)


def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def tally(difference: PairedDifference, a: str, b: str, *, larger: str, smaller: str) -> str:
    """The result for the majority of the seeds: "plain56 trains worse than plain20 in 5 of 5 seeds".

    Args:
        larger: what a larger figure means, such as "trains worse than"; `smaller` likewise.
    """
    wins, losses, n = difference.wins, difference.losses, difference.n
    if not n:
        return f"there is no seed in which both {a} and {b} have a figure"
    if wins == losses == 0:
        return f"{a} and {b} are level in {format_seeds(n, n)}"
    if wins == losses:
        return f"{a} and {b} are level: each larger in {wins} of {n} seeds"
    verb, count = (larger, wins) if wins > losses else (smaller, losses)
    split = ": no verdict" if count < n and n >= SEEDS else ""
    return f"{a} {verb} {b} in {format_seeds(count, n)}{split}"


def format_seeds(count: int, n: int) -> str:
    """A number of seeds, with a remark where they are too few: "5 of 5 seeds"."""
    return f"{count} of {n} seed{'s' * (n > 1)}" + ("" if n >= SEEDS else ", too few for a verdict")


def compare_with_paper(values: list[float], printed: float | None, share: float) -> str:
    """Our mean beside the paper's figure (None is its "fail"), only for runs as long as the paper's."""
    if not values:
        return "no run ended with a figure"
    if share < 0.999:
        return f"not comparable: {format_share(share)} of the paper's epochs"
    mean, sd = mean_sd(values)
    if printed is None:
        return f"{'fails' if mean > FAIL else 'does not fail'} by the paper's measure (above {format_share(FAIL)})"
    away = f"{100 * abs(mean - printed):.2f} points {'above' if mean > printed else 'below'} the paper"
    if sd is None:
        return f"{away}, one seed: no verdict"
    if abs(mean - printed) <= 2 * sd:
        return "within two standard deviations of the paper"
    return f"{away}, more than two standard deviations"


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); None below two values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
