"""ImageNet's 1,000 classes: their WordNet IDs ("n01440764"), which name the class folders, and a name for each.

The names are those that torchvision's and timm's weights are published with, one per class, so that a network from there and
a folder of ImageNet's images name the classes alike.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def imagenet_class_names() -> dict[str, str]:
    """WordNet ID -> name, in the order of the classes of published networks."""
    lines = (files("resnetlab.data") / "imagenet.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
