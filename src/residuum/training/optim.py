"""The optimizer: SGD with momentum in PyTorch's form, v <- momentum·v + g, w <- w - lr·v (g with weight decay in it).

The original implementation (Caffe) multiplies g by lr before it enters v; the two differ only in the steps after a change of
the learning rate (docs/differences.md). The arithmetic is torch.optim.SGD's to the bit (a test); that class is not used because
creating one imports torch's compiler, which takes longer than a first run's training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from residuum.training.recipe import Recipe


class SGD:
    """SGD over a network's parameters; BN's parameters and biases decay only under the recipe's `decay_all`."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        named = dict(net.named_parameters())
        decayed = {name for name, p in named.items() if p.ndim > 1 or recipe.decay_all}
        groups = ((decayed, recipe.weight_decay), (set(named) - decayed, 0.0))
        self._named: dict[str, Tensor] = dict(named)
        self._groups = [
            ([self._named[name] for name in named if name in names], decay) for names, decay in groups if names
        ]
        self._coefficient = recipe.momentum
        self.momentum: dict[str, Tensor] = {}  # v by the parameter's name; empty before the first step

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates every parameter from its gradient, and forgets the gradients."""
        if not self.momentum:
            self.momentum = {name: torch.zeros_like(p) for name, p in self._named.items()}
        velocity = {id(p): self.momentum[name] for name, p in self._named.items()}
        for parameters, decay in self._groups:
            gradients = [p.grad for p in parameters if p.grad is not None]
            vs = [velocity[id(p)] for p in parameters]
            torch._foreach_add_(gradients, parameters, alpha=decay)
            torch._foreach_mul_(vs, self._coefficient)
            torch._foreach_add_(vs, gradients)
            torch._foreach_add_(parameters, vs, alpha=-lr)
        for p in self._named.values():
            p.grad = None
