"""A network with all that stands around it, as one module: what is exported, and what other engines run.

uint8 (B, h, w, C)  --normalise, network, / temperature, softmax-->  float32 (B, classes)

The engines here get pictures that Pillow has resized and cropped, as everywhere else. In exported files `use.resizing` stands
before it, so that they take pictures of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from residuum.models.bundle import Bundle
from residuum.models.fold import folded
from residuum.runtime import evaluating


class Whole(nn.Module):
    """Pictures in, scores out; BN is folded into the convolutions."""

    scale: Tensor
    shift: Tensor
    temperature: Tensor

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        prepared = bundle.preprocessing
        self.net = folded(bundle.net).cpu()
        shift = prepared.mean / prepared.std  # (C,) or (h, w, C)
        # channels first: runtimes are slow where a row to compute with is only as long as a pixel has channels
        self.register_buffer("scale", (1 / (255 * prepared.std))[:, None, None])  # (C, 1, 1)
        self.register_buffer(
            "shift", shift[:, None, None] if shift.ndim == 1 else shift.permute(2, 0, 1)
        )  # … or (C, h, w)
        self.register_buffer("temperature", torch.tensor(float(bundle.temperature)))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).to(torch.float32) * self.scale - self.shift  # (B, C, h, w)
        logits = self.net(x)
        return torch.softmax(logits / self.temperature, 1)


def program(module: nn.Module, shape: Sequence[int], free: Sequence[str]) -> torch.export.ExportedProgram:
    """A module of pictures as torch.export has it.

    Args:
        shape: (h, w, C) of a picture.
        free: the first axes, by name, that may be of any length: "batch", or "batch", "height" and "width".
    """
    example = torch.zeros(2, *shape, dtype=torch.uint8)  # a batch of one would be taken for a constant
    lengths = {axis: torch.export.Dim(name, min=1, max=65_536) for axis, name in enumerate(free)}
    with torch.no_grad():
        return torch.export.export(module.eval(), (example,), dynamic_shapes=(lengths,))


def reference(bundle: Bundle, pixels: Tensor) -> Tensor:
    """What the network itself says, in fp32 and with its BN as it was trained: scores (B, classes) of uint8 (B, h, w, C)."""
    device = next(bundle.net.parameters()).device
    with evaluating(bundle.net):
        logits = torch.cat(
            [bundle.net(bundle.preprocessing.normalise(x.to(device))).cpu() for x in torch.split(pixels, 16)]
        )
    return torch.softmax(logits.float() / bundle.temperature, 1)
