"""Networks: specification, construction, costs, and the model file."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from resnetlab.errors import UnknownNameError


def __getattr__(name: str) -> Any:
    if name == "backbone":  # resnetlab.models.backbone.dilate(net), as the documentation says, after `import resnetlab`
        return import_module("resnetlab.models.backbone")
    ours = "list_models()" if name == "list_models" else "build(name)"
    raise UnknownNameError(f"module 'resnetlab.models' has no attribute {name!r}; use resnetlab.{ours}.")
