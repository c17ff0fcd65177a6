"""Networks under two names that are the same function, which a study must not compare with each other."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from resnetlab.device import preserve_process_state
from resnetlab.models.cost import compute_cost
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification
from resnetlab.random import make_generator

UNITS = 2  # of each stage: what holds for two units of a kind holds for more
SIDE = 8  # pixels of the images


def are_twins(a: Specification, b: Specification) -> bool:
    """Whether two networks with equal weights have equal outputs, in training mode, in which dropout drops.

    The weights are given layer by layer, in the order of a forward pass: in ResNet-8 the last BN of a unit with BN after the
    addition is the first of the next unit with full pre-activation.
    """
    if (a.depths, a.gate_bias) != (b.depths, b.gate_bias):  # gates that start elsewhere
        return False
    cut = tuple(min(n, UNITS) for n in a.depths)
    (layers, first), (others, second) = (_draw_output(replace(spec, depths=cut)) for spec in (a, b))
    return layers == others and torch.allclose(first, second, rtol=1e-6, atol=1e-9)


@cache
def _draw_output(spec: Specification) -> tuple[list[tuple[str, tuple[int, ...], int]], Tensor]:
    """A network's layers in the order of a forward pass, and its logits with weights that are drawn in that order."""
    layers = compute_cost(spec).layers
    net, generator = ResNet(spec).double().train(), make_generator(0, "twins")
    with preserve_process_state(), torch.no_grad():
        torch.set_num_threads(1)  # threads that wait for each other take longer than such small nets
        torch.manual_seed(0)  # for dropout
        x = torch.randn(4, spec.channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
        for layer in layers:
            for value in net.get_submodule(layer.name).parameters():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) / value[0].numel() ** 0.5)
        return [(layer.kind, layer.output, layer.parameters) for layer in layers], net(x)
