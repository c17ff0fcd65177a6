"""Numbers that the papers print, with the table or figure; 2015 is arXiv 1512.03385, 2016 arXiv 1603.05027."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedFigure:
    """A number and its source. Errors are fractions; None where the paper has a word instead."""

    value: float | None
    source: str


def _from_percent(source: str, values: dict[str, float]) -> dict[str, PublishedFigure]:
    return {key: PublishedFigure(round(value / 100, 6), source) for key, value in values.items()}


IMAGENET_TOP1 = _from_percent(
    "2015 Table 2 (ImageNet, 10-crop)", {"plain18": 27.94, "resnet18": 27.88, "plain34": 28.54, "resnet34": 25.03}
)
CIFAR10 = _from_percent(
    "2015 Table 6 (CIFAR-10)",
    {"resnet20": 8.75, "resnet32": 7.51, "resnet44": 7.17, "resnet56": 6.97, "resnet110": 6.61, "resnet1202": 7.93},
)
SHORTCUTS_TOP1 = _from_percent(  # ImageNet, 10-crop
    "2015 Table 3 (ImageNet, 34 layers)", {"plain": 28.54, "A": 25.03, "B": 24.52, "C": 24.19}
)
SHORTCUT_TYPES = _from_percent(  # ResNet-110
    "2016 Table 1 (CIFAR-10, 110 layers)",
    {"original": 6.61, "constant": 12.35, "exclusive-gate": 8.70, "shortcut-gate": 6.91, "conv": 12.22},
)
FAILS = PublishedFigure(None, "2016 Table 1: fails, above 20 %")  # plain and dropout, of 110 layers
ORDERS_110 = _from_percent(
    "2016 Table 2 (CIFAR-10, 110 layers)",
    {"original": 6.61, "bn-after-add": 8.17, "relu-before-add": 7.84, "relu-only-preact": 6.71, "preact": 6.37},
)
ONE_LAYER = PublishedFigure(0.0990, "2016 Table 3 (CIFAR-10, 110 layers, 1-layer skip)")
PROTOCOLS = {  # ResNet-50 on ImageNet, top-1
    "1crop": PublishedFigure(0.247, "the released ResNet-50, ImageNet"),
    "10crop": PublishedFigure(0.2285, "2015 Table 3 (ResNet-50, ImageNet)"),
    "multiscale": PublishedFigure(0.2074, "2015 Table 4 (ResNet-50, ImageNet)"),
}
VGG_MULTIPLY_ADDS = {"vgg16": 15.3e9, "vgg19": 19.6e9}  # 2015 Table 1 and Fig. 3
