"""Residuum: residual learning, whole.

    import residuum
    net = residuum.build("resnet20", classes=10)              # an nn.Module
    result = residuum.train(data="digits")                    # a run folder with a model and a report
    model = residuum.load(result.model)                       # network + classes + preprocessing
    model.predict("three.png", top=3)
    residuum.evaluate(model, "digits")

The names below are loaded when first used, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "evaluate", "load", "train"]

if TYPE_CHECKING:
    from residuum.evaluation.evaluate import evaluate
    from residuum.models.resnet import build
    from residuum.training.loop import train
    from residuum.use.predict import load

_HOMES = {
    "build": "residuum.models.resnet",
    "evaluate": "residuum.evaluation.evaluate",
    "load": "residuum.use.predict",
    "train": "residuum.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'residuum' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
