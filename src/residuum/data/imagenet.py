"""ImageNet's 1,000 classes: their numbers in WordNet ("n01440764"), which folders are called by, and a name for each.

The names are those that torchvision's and timm's weights are published with, one for each class, so that a network from there
and a folder of ImageNet's pictures name the same classes the same.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def names() -> dict[str, str]:
    """Number in WordNet -> name, in the order of the classes that networks are published with."""
    lines = (files("residuum.data") / "imagenet.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
