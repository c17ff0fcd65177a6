"""Whether two models that evaluated the same images differ by more than chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resnetlab.evaluation.metrics import ClassificationMetrics

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """The top-1 errors of two models, image by image.

    Attributes:
        difference: error of a minus error of b.
        interval: of the difference, 95 %, by a paired bootstrap of the images.
        p_value: McNemar's exact test: the probability of counts at least this uneven if neither is better.
        only_a_wrong, only_b_wrong: images that only one of them gets wrong.
    """

    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    only_a_wrong: int
    only_b_wrong: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return asdict(self) | {"interval": list(self.interval)}


def compare_models(a: ClassificationMetrics, b: ClassificationMetrics, name_a: str, name_b: str) -> Comparison:
    """Compares two evaluations of the same images."""
    from scipy.stats import binomtest  # heavy, so only here

    wrong_a, wrong_b = ~a.right, ~b.right
    only_a, only_b = int((wrong_a & ~wrong_b).sum()), int((wrong_b & ~wrong_a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    # A bootstrap of n images only needs these three counts, which are multinomial.
    shares = np.array([only_a, only_b, a.n - only_a - only_b]) / a.n
    counts = np.random.default_rng(0).multinomial(a.n, shares, RESAMPLES)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / a.n, [0.025, 0.975])
    return Comparison(name_a, name_b, (only_a - only_b) / a.n, (float(low), float(high)), p_value, only_a, only_b)
