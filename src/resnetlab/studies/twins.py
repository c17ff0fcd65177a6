"""Networks under two names that are the same function, which a study must not compare with each other."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from resnetlab.device import preserve_process_state
from resnetlab.models.cost import compute_cost
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification
from resnetlab.random import make_generator

UNITS = 2  # of each stage: what holds for two units of a kind holds for more
SIDE = 8  # pixels of the images


@cache
def are_twins(a: Specification, b: Specification) -> bool:
    """Whether two networks with equal weights have equal outputs.

    The weights are given layer by layer, in the order of a forward pass: in ResNet-8 the last BN of a unit with BN after the
    addition is the first of the next unit with full pre-activation. In training mode, in which dropout drops.
    """
    a, b = (replace(spec, depths=tuple(min(n, UNITS) for n in spec.depths)) for spec in (a, b))
    layers = [[(x.name, (x.kind, x.output, x.parameters)) for x in compute_cost(spec).layers] for spec in (a, b)]
    if [layer for _, layer in layers[0]] != [layer for _, layer in layers[1]]:
        return False
    nets = [ResNet(spec).double().train() for spec in (a, b)]
    generator = make_generator(0, "twins")
    with torch.no_grad(), preserve_process_state():
        torch.set_num_threads(1)  # threads that wait for each other take longer than such small nets
        for (name, _), (other, _) in zip(*layers, strict=True):
            first, second = nets[0].get_submodule(name), nets[1].get_submodule(other)
            for value, copy in zip(first.parameters(), second.parameters(), strict=True):
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.1)
                copy.copy_(value)
        x = torch.randn(4, a.channels, SIDE, SIDE, generator=generator, dtype=torch.float64)
        outputs = []
        for net in nets:
            torch.manual_seed(0)
            outputs.append(net(x))
    return torch.allclose(outputs[0], outputs[1], rtol=1e-6, atol=1e-9)
