"""SGD with momentum in PyTorch's form: v <- momentum·v + g, w <- w - lr·v, where g includes weight decay.

The original implementation (Caffe) multiplies g by lr before adding it to v; the two differ only in the steps after a change of
the learning rate (docs/differences.md). The bits are those of torch.optim.SGD (a test); that class is not used because creating
one imports torch's compiler, which takes longer than a first run's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnetlab.training.recipe import BaseRecipe

HEAD_PREFIX = "fc."  # of the parameters that `backbone_lr_scale` does not apply to


class _Group(NamedTuple):
    """Parameters with the same weight decay and learning rate."""

    names: list[str]
    decay: float
    factor: float  # of the learning rate


class SGD:
    """SGD over the trainable parameters of a network.

    BN's parameters and biases decay only with the recipe's `decay_all`; all parameters but the fully connected layer's have
    `backbone_lr_scale` times the learning rate.

    Attributes:
        parameters: by name; frozen ones are left out.
        momentum: v, by the parameter's name; empty before the first step.
    """

    def __init__(self, net: nn.Module, recipe: BaseRecipe) -> None:
        self.parameters: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.momentum: dict[str, Tensor] = {}
        self._coefficient = recipe.momentum
        groups: dict[tuple[float, float], list[str]] = {}
        for name, p in self.parameters.items():
            decay = recipe.weight_decay if p.ndim > 1 or recipe.decay_all else 0.0
            factor = 1.0 if name.startswith(HEAD_PREFIX) else recipe.backbone_lr_scale
            groups.setdefault((decay, factor), []).append(name)
        self._groups = [_Group(names, decay, factor) for (decay, factor), names in groups.items()]

    def init_state(self) -> None:
        """Sets the momentum to 0."""
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def grads(self) -> list[Tensor]:
        """The gradient of every parameter that has one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def set_grads(self, gradients: Sequence[Tensor]) -> None:
        """Sets the gradients, in the order of `grads`."""
        for p, gradient in zip(self.parameters.values(), gradients, strict=True):
            p.grad = gradient

    def zero_grad(self) -> None:
        """Sets the gradients to None."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The norm of the gradient, a scalar; scales the gradient down to `max_norm` unless that is 0."""
        gradients = self.grads()
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if max_norm:
            torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates every parameter from its gradient, and clears the gradients."""
        if not self.momentum:
            self.init_state()
        for group in self._groups:
            parameters = [self.parameters[name] for name in group.names]
            gradients = [p.grad for p in parameters if p.grad is not None]
            vs = [self.momentum[name] for name in group.names]
            torch._foreach_add_(gradients, parameters, alpha=group.decay)
            torch._foreach_mul_(vs, self._coefficient)
            torch._foreach_add_(vs, gradients)
            torch._foreach_add_(parameters, vs, alpha=-lr * group.factor)
        self.zero_grad()
