"""The optimizer: SGD with momentum in PyTorch's form, v <- momentum·v + g, w <- w - lr·v (g with weight decay in it).

The original implementation (Caffe) multiplies g by lr before it enters v; the two differ only in the steps after a change of
the learning rate (docs/differences.md). The arithmetic is torch.optim.SGD's to the bit (a test); that class is not used because
creating one imports torch's compiler, which takes longer than a first run's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from residuum.training.recipe import Training

HEAD = "fc."  # the parameters that `trunk_lr` does not slow down


class _Group(NamedTuple):
    """Parameters that are updated in the same way."""

    names: list[str]
    decay: float
    factor: float  # of the learning rate


class SGD:
    """SGD over the parameters that a network learns.

    BN's parameters and biases decay only under the recipe's `decay_all`; all parameters but the fully connected layer's have
    `trunk_lr` times the learning rate.

    Attributes:
        parameters: by name; those that need no gradient are left out.
        momentum: v by the parameter's name; empty before the first step.
    """

    def __init__(self, net: nn.Module, recipe: Training) -> None:
        self.parameters: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.momentum: dict[str, Tensor] = {}
        self._coefficient = recipe.momentum
        groups: dict[tuple[float, float], list[str]] = {}
        for name, p in self.parameters.items():
            decay = recipe.weight_decay if p.ndim > 1 or recipe.decay_all else 0.0
            factor = 1.0 if name.startswith(HEAD) else recipe.trunk_lr
            groups.setdefault((decay, factor), []).append(name)
        self._groups = [_Group(names, decay, factor) for (decay, factor), names in groups.items()]

    def start(self) -> None:
        """Sets the momentum to 0."""
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter that has one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def receive(self, gradients: Sequence[Tensor]) -> None:
        """Puts gradients in place, in the order of `gradients`."""
        for p, gradient in zip(self.parameters.values(), gradients, strict=True):
            p.grad = gradient

    def forget(self) -> None:
        """Forgets the gradients."""
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def clip(self, longest: float) -> Tensor:
        """The length of the gradient, a scalar; scales the gradient to `longest` where it is longer, unless that is 0."""
        gradients = self.gradients()
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if longest:
            torch._foreach_mul_(gradients, (longest / norm).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates every parameter from its gradient, and forgets the gradients."""
        if not self.momentum:
            self.start()
        for group in self._groups:
            parameters = [self.parameters[name] for name in group.names]
            gradients = [p.grad for p in parameters if p.grad is not None]
            vs = [self.momentum[name] for name in group.names]
            torch._foreach_add_(gradients, parameters, alpha=group.decay)
            torch._foreach_mul_(vs, self._coefficient)
            torch._foreach_add_(vs, gradients)
            torch._foreach_add_(parameters, vs, alpha=-lr * group.factor)
        self.forget()
