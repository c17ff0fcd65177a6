"""A network with all that stands around it, as one module: what is exported, and what other engines run.

uint8 (B, h, w, C)  --normalise, network, / temperature, softmax-->  float32 (B, classes)

The pictures are resized and cropped already, by Pillow as everywhere else, so that every engine gets the same pixels: the size
is fixed, and a JSON beside an exported file says how pictures come to it.
"""

from __future__ import annotations

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
        self.register_buffer("scale", 1 / (255 * prepared.std))  # (C,)
        self.register_buffer("shift", prepared.mean / prepared.std)  # (C,) or (h, w, C)
        self.register_buffer("temperature", torch.tensor(float(bundle.temperature)))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32) * self.scale - self.shift  # (B, h, w, C)
        logits = self.net(x.permute(0, 3, 1, 2))  # the same memory, channels last
        return torch.softmax(logits / self.temperature, 1)


def program(bundle: Bundle) -> torch.export.ExportedProgram:
    """The whole as torch.export has it, for batches of any size.

    Two pictures stand for all: a batch of one would be taken for a constant.
    """
    h, w, c = (*bundle.preprocessing.size, bundle.preprocessing.channels)
    example = torch.zeros(2, h, w, c, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    with torch.no_grad():
        return torch.export.export(Whole(bundle), (example,), dynamic_shapes=({0: batch},))


def reference(bundle: Bundle, pixels: Tensor) -> Tensor:
    """What the network itself says, in fp32 and with its BN as it was trained: scores (B, classes) of uint8 (B, h, w, C)."""
    device = next(bundle.net.parameters()).device
    with evaluating(bundle.net):
        logits = torch.cat(
            [bundle.net(bundle.preprocessing.normalise(x.to(device))).cpu() for x in torch.split(pixels, 16)]
        )
    return torch.softmax(logits.float() / bundle.temperature, 1)
