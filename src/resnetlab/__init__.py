"""ResNetLab: residual networks, their recipes and experiments, and classifiers for your own images.

    import resnetlab
    net = resnetlab.build("resnet20", num_classes=10)             # an nn.Module
    result = resnetlab.train(data="digits")                    # a run folder with a model and a report
    model = resnetlab.load(result.model)                       # network + classes + preprocessing
    model.predict("three.png", top=3)
    resnetlab.evaluate(model, "digits")

The names below are loaded when first used, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resnetlab.errors import UnknownNameError
from resnetlab.peer_words import PYTHON

__version__ = "0.2.0.dev0"  # the only place; pyproject.toml reads it
__all__ = ["__version__", "build", "evaluate", "list_models", "load", "train"]

if TYPE_CHECKING:
    from resnetlab.evaluation.evaluate import evaluate
    from resnetlab.inference.build import build, list_models
    from resnetlab.inference.open_model import load
    from resnetlab.training.python_api import train

_MODULES = {
    "build": "resnetlab.inference.build",
    "evaluate": "resnetlab.evaluation.evaluate",
    "list_models": "resnetlab.inference.build",
    "load": "resnetlab.inference.open_model",
    "train": "resnetlab.training.python_api",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("resnetlab.models")
    if name not in _MODULES:
        is_network = name.lower().startswith(("resnet", "plain", "preresnet"))  # as torchvision.models has functions
        ours = PYTHON.get(name) or (f"build({name!r})" if is_network else None)
        hint = f"use {ours}." if ours else f"it has {', '.join(__all__)}."
        raise UnknownNameError(f"module 'resnetlab' has no attribute {name!r}; {hint}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
