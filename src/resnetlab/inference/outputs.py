"""What backends compute of images, scores or features, and how they are compared with torch's in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnetlab.models.model_file import compute_scores
from resnetlab.models.own_network import Network

PARITY_BOUNDS = {  # least top-1 agreement with torch in fp32, largest difference of a score
    "fp32": (1.0, 1e-3),
    "bf16": (0.99, 0.05),
    "int8": (0.9, 0.3),  # one of 16 images may get another class
}
FEATURE_BOUNDS = {  # least cosine similarity with torch's features in fp32, largest relative error
    "fp32": (0.9999, 1e-3),
    "bf16": (0.999, 0.05),
    "int8": (0.95, 0.3),
}
TIE = 0.005  # the reference's classes with scores this close count as tied: rounding may swap them


@dataclass(frozen=True)
class Agreement:
    """Agreement of scores with the reference's.

    Attributes:
        rate: fraction of images with the same best class, ties of the reference included.
        largest_difference: of a score.
    """

    rate: float
    largest_difference: float

    @staticmethod
    def between(scores: Tensor, expected: Tensor) -> Agreement:
        """Compares two tables of scores, (N, classes) each; scores that are not finite agree with nothing."""
        if scores.shape != expected.shape or not bool(scores.isfinite().all()):
            return Agreement(0.0, 1.0)
        reference = expected.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)  # its score of that class; (N,)
        same = (reference >= expected.amax(1) - TIE).float().mean()
        return Agreement(float(same), float((scores - expected).abs().max()))

    def within(self, rate: float, difference: float) -> bool:
        """Whether both figures are within the bounds."""
        return self.rate >= rate and self.largest_difference <= difference

    def __str__(self) -> str:
        return f"top-1 agrees on {self.rate:.1%}, scores within {self.largest_difference:.2g}"


class FeatureAgreement(Agreement):
    """Agreement of features, where it is worst: `rate` is the cosine similarity, `largest_difference` the relative error."""

    @staticmethod
    def between(scores: Tensor, expected: Tensor) -> FeatureAgreement:
        """Compares two tables of features, (N, C) each; features that are not finite agree with nothing."""
        if scores.shape != expected.shape or not bool(scores.isfinite().all()):
            return FeatureAgreement(0.0, 1.0)
        difference = (scores - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)
        return FeatureAgreement(float(torch.cosine_similarity(scores, expected).min()), float(difference.max()))

    def __str__(self) -> str:
        return f"features agree to a cosine of {self.rate:.4f}, relative error {self.largest_difference:.2g}"


class FeatureNetwork(nn.Module):
    """A network that ends at its features (B, C): the last map averaged over its positions."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net, self.training = net, net.training

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x).mean((2, 3))


@dataclass(frozen=True)
class Output:
    """What is computed of images.

    Attributes:
        end: makes of the model's network the one that is computed.
        finish: makes the result of its output, the model's temperature and whether images have several classes.
        bounds: of the agreement that `compare` measures, by precision.
    """

    name: str
    end: Callable[[Network], nn.Module]
    finish: Callable[[Tensor, float | Tensor, bool], Tensor]
    compare: Callable[[Tensor, Tensor], Agreement]
    bounds: Mapping[str, tuple[float, float]]


def _finish_scores(logits: Tensor, temperature: float | Tensor, multi_label: bool) -> Tensor:
    return compute_scores(logits / temperature, multi_label)


SCORES = Output("scores", lambda net: net, _finish_scores, Agreement.between, PARITY_BOUNDS)
FEATURES = Output("features", FeatureNetwork, lambda features, *_: features, FeatureAgreement.between, FEATURE_BOUNDS)
OUTPUTS = {output.name: output for output in (SCORES, FEATURES)}
