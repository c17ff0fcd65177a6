"""The optimizers: SGD with momentum (the papers') and AdamW in torch's functional forms, LARS and LAMB for large batches.

SGD is v <- momentum·v + g, w <- w - lr·v, where g includes weight decay. The original implementation (Caffe) multiplies g by lr
before adding it to v; the two differ only in the steps after a change of the learning rate (docs/differences.md). torch's
optimizer classes are not used because creating one imports torch's compiler, which takes longer than a first run's training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from resnetlab.device import to_device
from resnetlab.training.recipe import BaseRecipe

# how names of parameters begin that `backbone_lr_scale` does not apply to: a classifier's, a segmenter's and a detector's heads
HEAD_PREFIXES = ("fc.", "classifier.", "backbone.fpn.", "rpn.", "roi_heads.box_head.fc", "roi_heads.box_predictor.")


class _Group(NamedTuple):
    """Parameters with the same weight decay and learning rate."""

    names: list[str]
    decay: float
    factor: float  # of the learning rate


class Optimizer(ABC):
    """Updates the trainable parameters of a network.

    BN's parameters and biases decay only with the recipe's `decay_all`; all parameters but the head's have
    `backbone_lr_scale` times the learning rate.

    Attributes:
        parameters: by name; frozen ones are left out.
        state: tensors that a checkpoint keeps, by "<buffer>.<parameter's name>"; empty before the first step.
    """

    buffers: ClassVar[tuple[str, ...]]  # names of the state's tensors for each parameter

    def __init__(self, net: nn.Module, recipe: BaseRecipe) -> None:
        self.parameters: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.state: dict[str, Tensor] = {}
        self._recipe = recipe
        groups: dict[tuple[float, float], list[str]] = {}
        for name, p in self.parameters.items():
            decay = recipe.weight_decay if p.ndim > 1 or recipe.decay_all else 0.0
            factor = 1.0 if name.startswith(HEAD_PREFIXES) else recipe.backbone_lr_scale
            groups.setdefault((decay, factor), []).append(name)
        self._groups = [_Group(names, decay, factor) for (decay, factor), names in groups.items()]

    def init_state(self) -> None:
        """Sets the state to 0."""
        self.state = {f"{b}.{name}": torch.zeros_like(p) for b in self.buffers for name, p in self.parameters.items()}

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
        if not self.state:
            self.init_state()
        for names, decay, factor in self._groups:
            trained = [name for name in names if self.parameters[name].grad is not None]
            self._update(trained, decay, lr * factor)
        self.zero_grad()

    @abstractmethod
    def _update(self, names: list[str], decay: float, lr: float) -> None:
        """Updates the parameters of these names."""

    @property
    def _fused(self) -> bool:
        """Whether one kernel makes the whole update, on a GPU with exact=false, not one for each operation on a list."""
        return not self._recipe.exact and all(p.device.type == "cuda" for p in self.parameters.values())

    def _tensors(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of these names, and their gradients."""
        parameters = [self.parameters[name] for name in names]
        return parameters, [p.grad for p in parameters if p.grad is not None]

    def _buffers(self, buffer: str, names: list[str]) -> list[Tensor]:
        return [self.state[f"{buffer}.{name}"] for name in names]


class SGD(Optimizer):
    """SGD with momentum."""

    buffers = ("momentum",)

    def _update(self, names: list[str], decay: float, lr: float) -> None:
        self._descend(names, self._tensors(names)[1], decay, lr)

    def _descend(self, names: list[str], gradients: list[Tensor], decay: float, lr: float) -> None:
        sgd(
            self._tensors(names)[0],
            gradients,
            [*self._buffers("momentum", names)],
            foreach=not self._fused,
            fused=self._fused,
            weight_decay=decay,
            momentum=self._recipe.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    buffers = ("exp_avg", "exp_avg_sq")

    def init_state(self) -> None:
        super().init_state()
        self.state["steps"] = torch.zeros(())  # completed; on the CPU, as torch has it

    def step(self, lr: float) -> None:
        super().step(lr)
        self.state["steps"] += 1

    def _copy_steps(self, names: list[str]) -> list[Tensor]:
        """The number of completed steps for each parameter; the fused kernel reads it on the device."""
        device = self.parameters[names[0]].device if names and self._fused else torch.device("cpu")
        return list(to_device(self.state["steps"].repeat(len(names)), device).unbind())

    def _update(self, names: list[str], decay: float, lr: float) -> None:
        adamw(
            *self._tensors(names),
            self._buffers("exp_avg", names),
            self._buffers("exp_avg_sq", names),
            [],
            self._copy_steps(names),  # which it increments
            foreach=not self._fused,
            fused=self._fused,
            amsgrad=False,
            beta1=self._recipe.beta1,
            beta2=self._recipe.beta2,
            lr=lr,
            weight_decay=decay,
            eps=self._recipe.eps,
            maximize=False,
        )


class LARS(SGD):
    """SGD whose learning rate is adapted to each layer (You, Gitman & Ginsburg 2017, arXiv 1708.03888).

    The gradient g of a layer's weights w counts `trust_coefficient`·|w| / (|g| + decay·|w|) times. Biases and BN's parameters
    have SGD's update.
    """

    def _update(self, names: list[str], decay: float, lr: float) -> None:
        parameters, gradients = self._tensors(names)
        lengths = zip(torch._foreach_norm(parameters), torch._foreach_norm(gradients), strict=True)
        ratios = [
            _trust_ratio(self._recipe.trust_coefficient * length, gradient_length + decay * length)
            for length, gradient_length in lengths
        ]
        decayed = torch._foreach_add(gradients, parameters, alpha=decay)
        self._descend(names, _scale_layers(decayed, ratios), 0.0, lr)


class LAMB(AdamW):
    """AdamW's update, as long for each layer as its weights (You et al. 2020, arXiv 1904.00962); for biases and BN as it is."""

    def _update(self, names: list[str], decay: float, lr: float) -> None:
        parameters, gradients = self._tensors(names)
        averages, squares = self._buffers("exp_avg", names), self._buffers("exp_avg_sq", names)
        beta1, beta2, step = self._recipe.beta1, self._recipe.beta2, float(self.state["steps"]) + 1
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**step))
        torch._foreach_add_(divisors, self._recipe.eps)
        updates = torch._foreach_div(torch._foreach_div(averages, 1 - beta1**step), divisors)
        torch._foreach_add_(updates, parameters, alpha=decay)
        lengths = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
        torch._foreach_add_(parameters, _scale_layers(updates, [_trust_ratio(*pair) for pair in lengths]), alpha=-lr)


def _trust_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of two scalars; 1 where either is 0, as for a layer that starts at 0."""
    return torch.where((numerator > 0) & (denominator > 0), numerator / denominator, 1.0)


def _scale_layers(updates: Sequence[Tensor], ratios: Sequence[Tensor]) -> list[Tensor]:
    """The updates of weights times their layers' ratios; those of biases and BN's parameters as they are."""
    return [x * ratio if x.ndim > 1 else x for x, ratio in zip(updates, ratios, strict=True)]


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW, "lars": LARS, "lamb": LAMB}
