"""Errors that were published for a network under a protocol, beside which a figure is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from residuum.data import imagenet
from residuum.evaluation.views import Protocol
from residuum.models.bundle import Bundle
from residuum.models.spec import Specification, specification

Errors = tuple[float, float | None]  # top-1, top-5; per cent

CIFAR10 = {  # one view; 2015 Table 6, 2016 Table 3
    "resnet20": 8.75, "resnet32": 7.51, "resnet44": 7.17, "resnet56": 6.97, "resnet110": 6.61, "resnet1202": 7.93,
    "resnet164": 5.93, "resnet1001": 7.61, "preresnet110": 6.37, "preresnet164": 5.46, "preresnet1001": 4.92}  # fmt: skip
IMAGENET: dict[str, dict[str, Errors]] = {  # validation split
    "1crop": {"resnet50": (24.7, 7.8), "resnet101": (23.6, 7.1), "resnet152": (23.0, 6.7)},  # the released models' README
    "10crop": {  # 2015 Tables 2 and 3
        "plain18": (27.94, None), "resnet18/A": (27.88, None), "plain34": (28.54, 10.02), "resnet34/A": (25.03, 7.76),
        "resnet34": (24.52, 7.46), "resnet34/C": (24.19, 7.40), "resnet50": (22.85, 6.71), "resnet101": (21.75, 6.05),
        "resnet152": (21.43, 5.71)},
    "multiscale:224,256,384,480,640": {  # 2015 Table 4
        "resnet34": (21.84, 5.71), "resnet34/C": (21.53, 5.60), "resnet50": (20.74, 5.25), "resnet101": (19.87, 4.60),
        "resnet152": (19.38, 4.49)},
    "dense:320": {  # 2016 Table 5
        "resnet152": (21.3, 5.5), "preresnet152": (21.1, 5.5), "resnet200": (21.8, 6.0), "preresnet200": (20.7, 5.3)},
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Errors as fractions, and where they stand."""

    top1_error: float
    top5_error: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return asdict(self)


def published(bundle: Bundle, data: str, split: str, protocol: Protocol, n: int) -> Published | None:
    """What was published for a bundle's network under a protocol, on all `n` pictures of the split it was measured on.

    ImageNet's figures are shown for pictures of its 1,000 classes that are as many as its validation split has, and not
    called train, resized and cropped as the figure's own protocol says. None where nothing was published.
    """
    spec, asked = bundle.spec, str(protocol)
    if data == "cifar10" and split == "test" and asked == "1crop" and n == 10_000:
        for name, error in CIFAR10.items():
            if _same(spec, name):
                table = "2016 Table 3" if name.startswith("pre") or spec.depth in (164, 1001) else "2015 Table 6"
                mean = ", mean of 5" if name == "resnet110" else ""
                return Published(round(error / 100, 6), None, f"{table}{mean}, trained on all 50,000 pictures")
    if split == "train" or n != 50_000 or set(bundle.classes) != set(imagenet.names().values()):
        return None
    own = bundle.metrics.get("published", {})
    if own.get("protocol") == asked:
        return Published(own["top1_error"], own.get("top5_error"), f"{bundle.recipe.get('source')}, ImageNet val")
    if bundle.preprocessing.size != (224, 224) or not (
        protocol.dense or protocol.sides_for(bundle.preprocessing) == (256,)
    ):
        return None
    for name, (top1, top5) in IMAGENET.get(asked, {}).items():
        if _same(spec, name):
            errors = round(top1 / 100, 6), None if top5 is None else round(top5 / 100, 6)
            return Published(*errors, "the papers' or their released models', ImageNet val")
    return None


def _same(spec: Specification, name: str) -> bool:
    """Whether a specification is that of a name ("resnet34/C" for another shortcut), whatever the papers leave open."""
    net, _, shortcut = name.partition("/")
    other = specification(net, **({"shortcut": shortcut} if shortcut else {}))
    left_open = ("zeros", "boundary", "maxpool", "conv1_bias", "classes", "channels")
    return spec == replace(other, **{key: getattr(spec, key) for key in left_open})
