"""Numbers that the papers print, with the table or figure; 2015 is arXiv 1512.03385, 2016 arXiv 1603.05027."""

from __future__ import annotations

from dataclasses import dataclass

from resnetlab.evaluation import published
from resnetlab.models.spec import CIFAR_DEPTHS


@dataclass(frozen=True)
class PublishedFigure:
    """A number and its source. Errors are fractions; None where the paper has a word instead."""

    value: float | None
    source: str


def _from_percent(source: str, values: dict[str, float]) -> dict[str, PublishedFigure]:
    return {key: PublishedFigure(round(value / 100, 6), source) for key, value in values.items()}


_RESNET110 = published.CIFAR10["resnet110"]
_TEN_CROP = {name: top1 for name, (top1, _) in published.IMAGENET["10crop"].items()}
IMAGENET_TOP1 = _from_percent(
    "2015 Table 2 (ImageNet, 10-crop)",
    {name.removesuffix("/A"): _TEN_CROP[name] for name in ("plain18", "resnet18/A", "plain34", "resnet34/A")},
)
CIFAR10 = _from_percent(
    "2015 Table 6 (CIFAR-10)", {f"resnet{depth}": published.CIFAR10[f"resnet{depth}"] for depth in CIFAR_DEPTHS}
)
SHORTCUTS_TOP1 = _from_percent(
    "2015 Table 3 (ImageNet, 34 layers)",
    {
        "plain": _TEN_CROP["plain34"],
        "A": _TEN_CROP["resnet34/A"],
        "B": _TEN_CROP["resnet34"],
        "C": _TEN_CROP["resnet34/C"],
    },
)
SHORTCUT_TYPES = _from_percent(  # ResNet-110
    "2016 Table 1 (CIFAR-10, 110 layers)",
    {"original": _RESNET110, "constant": 12.35, "exclusive-gate": 8.70, "shortcut-gate": 6.91, "conv": 12.22},
)
FAILS = PublishedFigure(None, "2016 Table 1: fails, above 20 %")  # plain and dropout, of 110 layers
ORDERS_110 = _from_percent(
    "2016 Table 2 (CIFAR-10, 110 layers)",
    {"original": _RESNET110, "bn-after-add": 8.17, "relu-before-add": 7.84, "relu-only-preact": 6.71}
    | {"preact": published.CIFAR10["preresnet110"]},
)
ONE_LAYER = PublishedFigure(0.0990, "2016 Table 3 (CIFAR-10, 110 layers, 1-layer skip)")
PROTOCOLS = {  # ResNet-50 on ImageNet, top-1
    "1crop": PublishedFigure(0.247, "the released ResNet-50, ImageNet"),
    "10crop": PublishedFigure(0.2285, "2015 Table 3 (ResNet-50, ImageNet)"),
    "multiscale": PublishedFigure(0.2074, "2015 Table 4 (ResNet-50, ImageNet)"),
}
VGG_MULTIPLY_ADDS = {"vgg16": (15.3e9, "2015 §4.1"), "vgg19": (19.6e9, "2015 §3.3 and Fig. 3")}
