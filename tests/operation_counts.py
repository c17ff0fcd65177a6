"""Counts what tensor operations compute, where a test asks what something costs: a time depends on the machine."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ElementCount(TorchDispatchMode):
    """Within it, `elements` counts those of the results of all operations but views."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        if not function.is_view:
            self.elements += sum(x.numel() for x in tree_leaves(results) if isinstance(x, Tensor))
        return results
