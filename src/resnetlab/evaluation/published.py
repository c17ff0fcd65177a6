"""Errors that were published for a network under a protocol, for comparison with measured ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from resnetlab.data import imagenet
from resnetlab.evaluation.protocols import Protocol
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.spec import Specification, get_specification

Errors = tuple[float, float | None]  # top-1, top-5; per cent

CIFAR10 = {  # one view; 2015 Table 6, 2016 Tables 2 and 4
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
class PublishedErrors:
    """Errors as fractions, and their source."""

    top1_error: float
    top5_error: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return asdict(self)


def find_published(model: TrainedModel, data: str, split: str, protocol: Protocol, n: int) -> PublishedErrors | None:
    """The published errors of a model's network under a protocol, on all `n` images of the split; None where there are none.

    ImageNet's are for a split of its 1,000 classes that is as large as its validation split, is not called train, and is
    resized and cropped as in the published protocol.
    """
    spec, protocol_name = model.spec, str(protocol)
    if data == "cifar10" and split == "test" and protocol_name == "1crop" and n == 10_000:
        for name, error in CIFAR10.items():
            if _is_named(spec, name):
                later = name.startswith("pre") or spec.depth in (164, 1001)
                table = "2015 Table 6" if not later else "2016 Table 2" if spec.depth == 110 else "2016 Table 4"
                mean = ", mean of 5" if name == "resnet110" else ""
                return PublishedErrors(round(error / 100, 6), None, f"{table}{mean}, trained on all 50,000 images")
    if split == "train" or n != 50_000 or set(model.classes) != set(imagenet.imagenet_class_names().values()):
        return None
    own = model.metrics.get("published", {})
    if own.get("protocol") == protocol_name:
        return PublishedErrors(own["top1_error"], own.get("top5_error"), f"{model.recipe.get('source')}, ImageNet val")
    if model.preprocessing.size != (224, 224) or not (
        protocol.dense or protocol.sides_for(model.preprocessing) == (256,)
    ):
        return None
    for name, (top1, top5) in IMAGENET.get(protocol_name, {}).items():
        if _is_named(spec, name):
            errors = round(top1 / 100, 6), None if top5 is None else round(top5 / 100, 6)
            return PublishedErrors(*errors, "the papers' or their released models', ImageNet val")
    return None


def _is_named(spec: Specification, name: str) -> bool:
    """Whether a specification is that of a name ("resnet34/C" for another shortcut), but for what the papers leave open."""
    net, _, shortcut = name.partition("/")
    other = get_specification(net, **({"shortcut": shortcut} if shortcut else {}))
    open_fields = ("zero_pad", "preact_transition", "maxpool", "conv1_bias", "classes", "channels")
    return spec == replace(other, **{key: getattr(spec, key) for key in open_fields})
