"""Verdicts: rules in words, as pure functions of what was measured. None says more than the runs do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FAIL = 0.2  # 2016 Table 1: a run of a larger error has failed
SEEDS = 3  # fewer runs than this give no verdict

RULE = (
    "Two networks are compared seed by seed. “Shown” needs at least 3 seeds, all of them of one mind, and a 95 % interval of "
    "the mean difference (Student's t over the pairs) that leaves 0 out; “points to” is the same without the interval. "
    "Anything else is not shown."
)


@dataclass(frozen=True)
class Comparison:
    """A minus B, seed by seed, where both finished."""

    wins: int  # seeds in which A is larger
    losses: int
    n: int
    mean: float
    interval: tuple[float, float] | None  # 95 % of the mean; None below two seeds

    @property
    def strength(self) -> str:
        """What the rule allows to say of A being larger: "shown", "points to" or "not shown"."""
        if self.n < SEEDS or self.wins < self.n:
            return "not shown"
        return "shown" if self.interval is not None and self.interval[0] > 0 else "points to"

    @property
    def reversed(self) -> Comparison:
        """B minus A."""
        interval = None if self.interval is None else (-self.interval[1], -self.interval[0])
        return Comparison(self.losses, self.wins, self.n, -self.mean, interval)


def compare(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Compares two networks' figures over the seeds that both have."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    mean = sum(differences) / n if n else math.nan
    interval = None
    if n > 1:
        sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
        half = student(n - 1) * sd / math.sqrt(n)
        interval = mean - half, mean + half
    return Comparison(sum(d > 0 for d in differences), sum(d < 0 for d in differences), n, mean, interval)


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def tally(c: Comparison, a: str, b: str, *, larger: str, smaller: str) -> str:
    """What was seen, in the words of the majority: "plain56 trains worse than plain20 in 5 of 5 seeds".

    Args:
        larger: how a larger figure is said, such as "trains worse than"; `smaller` likewise.
    """
    if not c.n:
        return f"there is no seed in which both {a} and {b} have a figure"
    if c.wins == c.losses == 0:
        return f"{a} and {b} are level in {of_seeds(c.n, c.n)}"
    if c.wins == c.losses:
        return f"{a} and {b} are level: each larger in {c.wins} of {c.n} seeds"
    words, count = (larger, c.wins) if c.wins > c.losses else (smaller, c.losses)
    split = ": no verdict" if count < c.n and c.n >= SEEDS else ""
    return f"{a} {words} {b} in {of_seeds(count, c.n)}{split}"


def of_seeds(count: int, n: int) -> str:
    """A number of seeds in words, with the remark that belongs to few: "5 of 5 seeds"."""
    return f"{count} of {n} seed{'s' * (n > 1)}" + ("" if n >= SEEDS else ", too few for a verdict")


def beside_paper(values: list[float], printed: float | None, share: float) -> str:
    """Our mean beside the paper's figure, which is said only of runs as long as the paper's; None is its "fail"."""
    if not values:
        return "no run ended with a figure"
    if share < 0.999:
        return f"not comparable: {percent(share)} of the paper's passes"
    mean, sd = mean_sd(values)
    if printed is None:
        return f"{'fails' if mean > FAIL else 'does not fail'} by the paper's measure (above {percent(FAIL)})"
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


def percent(share: float) -> str:
    """A share as people write it: "2 %", "0.06 %", "100 %"."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
