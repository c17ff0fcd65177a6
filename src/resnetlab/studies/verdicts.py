"""Verdicts: rules in words, as pure functions of the measurements. None claims more than the runs show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from resnetlab.formatting import format_count, format_share

FAIL = 0.2  # 2016 Table 1: a run with a larger error has failed
SEEDS = 3  # fewer runs than this give no verdict

RULE = (
    "Two networks are compared seed by seed. “Shown” needs at least 3 seeds, the same sign in all of them, and a 95 % interval "
    "of the mean difference (Student's t over the pairs) that excludes 0; “points to” is the same without the interval. "
    "A seed in which one of the two diverged is left out, and no more than “points to” is said then. "
    "Anything else is not shown. Every comparison gives its mean difference, its interval and the number of seeds; with one "
    "seed there is no interval. A printed error is compared only with runs of the same network, data, training and test, of "
    "the paper's length, and with the same statistic of ours (mean, median or best)."
)


@dataclass(frozen=True)
class Difference:
    """The evidence of a comparison: A minus B."""

    n: int
    mean: float
    interval: tuple[float, float] | None  # 95 % of the mean; None below two seeds

    def describe(self, unit: str = "error") -> str:
        """In words: "difference +2.31 points, 95 % interval 1.20 to 3.42, n = 3"; errors are in points of per cent."""
        factor, word = (100.0, " points") if unit == "error" else (1.0, "")

        def number(value: float, sign: str = "") -> str:
            return f"{factor * value:{sign}.2f}" if unit == "error" else f"{value:{sign}.3g}"

        if not self.n:
            return "no difference to give"
        if self.interval is None:
            return f"difference {number(self.mean, '+')}{word}, {'one seed' if self.n == 1 else f'n = {self.n}'}: no interval"
        low, high = (number(value) for value in self.interval)
        return f"difference {number(self.mean, '+')}{word}, 95 % interval {low} to {high}, n = {self.n}"


@dataclass(frozen=True)
class PairedDifference(Difference):
    """A minus B, seed by seed, where both finished."""

    wins: int  # seeds in which A is larger
    losses: int
    unpaired: int = 0  # seeds in which only one of the two has a figure, since a run diverged

    @property
    def strength(self) -> str:
        """How strongly the rule supports that A is larger: "shown", "points to" or "not shown"."""
        if self.n < SEEDS or self.wins < self.n:
            return "not shown"
        excludes = self.interval is not None and self.interval[0] > 0
        return "shown" if excludes and not self.unpaired else "points to"

    def describe(self, unit: str = "error") -> str:
        """As every difference, with the seeds that are left out."""
        left_out = f"; {format_count(self.unpaired, 'seed')} left out, where a run diverged" if self.unpaired else ""
        return super().describe(unit) + left_out

    @property
    def reversed(self) -> PairedDifference:
        """B minus A."""
        interval = None if self.interval is None else (-self.interval[1], -self.interval[0])
        return PairedDifference(self.n, -self.mean, interval, self.losses, self.wins, self.unpaired)


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
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return PairedDifference(n, mean, interval, wins, losses, len(a.keys() ^ b.keys()))


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


def describe(difference: PairedDifference, a: str, b: str, *, larger: str, smaller: str, unit: str = "error") -> str:
    """A tally with its evidence, in brackets, and what it amounts to where the words alone would say more."""
    text = tally(difference, a, b, larger=larger, smaller=smaller)
    if not difference.n:
        return text
    strength = difference.strength if difference.mean > 0 else difference.reversed.strength
    amounts = ": it points that way, no more" if strength == "points to" else ""
    return f"{text}{amounts} ({difference.describe(unit)})"


def format_seeds(count: int, n: int) -> str:
    """A number of seeds, with a remark where they are too few: "5 of 5 seeds"."""
    return f"{count} of {format_count(n, 'seed')}" + ("" if n >= SEEDS else ", too few for a verdict")


def compare_with_paper(
    values: Sequence[float],
    printed: float | None,
    share: float,
    *,
    fail: float = FAIL,
    statistic: str = "mean of 5",
    diverged: int = 0,
) -> str:
    """Our figure beside the paper's (None is its "above `fail`"), only for runs as long as the paper's.

    A median is compared with ours, the best of five with ours if we have as many, all others with our mean. Runs that
    diverged have failed, and what is left is no such statistic.
    """
    if not values and not diverged:
        return "no run ended with a figure"
    if abs(share - 1) > 0.001:
        return f"not comparable: {format_share(share)} of the paper's epochs"
    divergence = f"{diverged} of {format_count(len(values) + diverged, 'run')} diverged"
    if printed is None:
        ours = median([*values, *[math.inf] * diverged]) if diverged else take_statistic(values, statistic)
        words = f"{'fails' if ours > fail else 'does not fail'} by the paper's measure (above {format_share(fail)})"
        return f"{words}; {divergence}" if diverged else words
    if diverged:
        return f"not comparable: {divergence}"
    ours, sd = take_statistic(values, statistic), mean_sd(values)[1]
    away = f"{100 * abs(ours - printed):.2f} points {'above' if ours > printed else 'below'} the paper"
    if statistic.startswith("best"):
        return (
            away
            if statistic == f"best of {len(values)}"
            else f"not comparable: the {statistic} there, {len(values)} here"
        )
    if sd is None:
        return f"{away}, one seed: no verdict"
    if len(values) < SEEDS:
        return f"{away}, {format_count(len(values), 'seed')}: no verdict"
    if abs(ours - printed) <= 2 * sd:
        return "within two standard deviations of the paper"
    return f"{away}, more than two standard deviations"


def take_statistic(values: Sequence[float], statistic: str) -> float:
    """The statistic of our runs that a printed one is compared with: their median, their best, else their mean."""
    kind = statistic.partition(" ")[0]
    return min(values) if kind == "best" else median(values) if kind == "median" else fmean(values)


def difference_from_printed(values: Sequence[float], printed: float, runs: int, statistic: str) -> Difference | None:
    """Our figure minus a printed one, which is the statistic of so many runs; None where ours has no such statistic.

    The interval is Student's, with our seeds' deviation for both; a median's variance is taken as pi/2 times that of a mean.
    """
    n, best = len(values), statistic.startswith("best")
    if not n or (best and n != runs):
        return None
    away, sd = take_statistic(values, statistic) - printed, mean_sd(values)[1]
    if sd is None or best:
        return Difference(n, away, None)
    factor = math.pi / 2 if statistic.startswith("median") else 1.0
    half = student_quantile(n - 1) * sd * math.sqrt(factor * (1 / n + 1 / runs))
    return Difference(n, away, (away - half, away + half))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); None below two values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
