"""The network with normalisation, temperature and softmax (or sigmoid), or up to its features, for export and other backends.

uint8 (B, h, w, C)  --normalise, network, / temperature, softmax-->  float32 (B, classes)

Images whose values are as stored (`preprocessing.PixelFormat`) are float32 in place of uint8.
Backends get images that Pillow has resized and cropped. Exported files put `inference.resizing` before this module, so that
they take images of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnetlab.device import eval_mode
from resnetlab.errors import UsageError
from resnetlab.inference.outputs import SCORES, Output
from resnetlab.models.fold import fold_batchnorm
from resnetlab.models.model_file import TrainedModel


class InferenceModule(nn.Module):
    """Computes calibrated scores of images, or their features; BN is folded into the convolutions."""

    scale: Tensor
    shift: Tensor
    temperature: Tensor

    def __init__(self, model: TrainedModel, output: Output = SCORES) -> None:
        super().__init__()
        preprocessing = model.preprocessing
        self.net, self.multi_label = output.end(fold_batchnorm(model.net).cpu()), model.multi_label
        self.finish = output.finish
        shift = preprocessing.mean / preprocessing.std  # (C,) or (h, w, C)
        shift = shift[:, None, None] if shift.ndim == 1 else shift.permute(2, 0, 1)  # (C, 1, 1) or (C, h, w)
        # channels first: runtimes are slow if the innermost dimension is only as long as the number of channels
        self.register_buffer("scale", (1 / (preprocessing.white * preprocessing.std))[:, None, None])  # (C, 1, 1)
        self.register_buffer("shift", shift.contiguous())  # torch.export.save warns of another order
        self.register_buffer("temperature", torch.tensor(float(model.temperature)))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).to(torch.float32) * self.scale - self.shift  # (B, C, h, w)
        return self.finish(self.net(x), self.temperature, self.multi_label)


def export_program(module: nn.Module, image: Tensor, dynamic: Sequence[str]) -> torch.export.ExportedProgram:
    """Exports a module of images with torch.export.

    Args:
        image: an example, (h, w, C) of the type that the module takes.
        dynamic: names of the leading dimensions that are dynamic: "batch", or "batch", "height" and "width".
    """
    example = torch.stack([image, image])  # a batch of one would become a constant
    dims = {axis: torch.export.Dim(name, min=1, max=65_536) for axis, name in enumerate(dynamic)}
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), (example,), dynamic_shapes=(dims,))
    except Exception as error:  # of many kinds, about a network of the user's own
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"torch.export cannot trace the network for batches of any size: {reason[:300]}") from error


def compute_reference(model: TrainedModel, pixels: Tensor, output: Output = SCORES) -> Tensor:
    """Scores (B, classes), or features, of the unfolded network in fp32, for images (B, h, w, C)."""
    net = output.end(model.net)
    device = next(net.parameters()).device
    with eval_mode(net):
        found = torch.cat([net(model.preprocessing.normalise(x.to(device))).cpu() for x in torch.split(pixels, 16)])
    return output.finish(found.float(), model.temperature, model.multi_label)
