"""Settings of studies on data that are not there: only the numbers of images and classes count for a plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from resnetlab.data import imagenet
from resnetlab.studies.setting import Setting

CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "photos": 5}
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437, "photos": 4_000, "imagenet": 1_281_167}


def make_setting(data: str, depths: tuple[int, ...], seeds: int = 5, **values: Any) -> Setting:
    here = Setting(data, Path("data"), "paper", seeds, depths, "cpu", **values)
    names = tuple(imagenet.imagenet_class_names().values()) if data == "imagenet" else None
    source = SimpleNamespace(
        train=range(IMAGES[data]),
        test=range(100),
        val=None,
        classes=names or tuple(map(str, range(CLASSES[data]))),
    )
    here.__dict__["source"] = source  # in place of the cached property
    return here
