"""Resizing and cutting out as arithmetic, so that an exported file does it by itself, for pictures of any size.

uint8 (B, H, W, C)  --resize, centre crop-->  uint8 (B, h, w, C), what `Preprocessing` makes of each with Pillow

Pillow's antialiased resize is a product with one matrix along each side, rounded to whole values after each: row i of a
matrix holds the kernel around the place in the picture that pixel i comes from, as wide as the picture is shrunk. The rows
outside the crop are left out. The matrices are computed from the picture's size, in whole numbers up to the kernel itself
(which fit into 32 bits: OpenVINO has no others; it computes the rest in float32, and so is a grey level off where a value
lies between two). Pictures more than twice as tall as wide are resized in the other order by some of Pillow's versions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from residuum.preprocessing import MOST, Preprocessing

UNIT = 2.0**22  # of Pillow's weights, which are whole numbers


class Resize(nn.Module):
    """Pictures of one size, any, as the network takes them."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size, self.side = preprocessing.size, preprocessing.resize
        self.kernel = {"bilinear": _triangle, "bicubic": _cubic}[preprocessing.interpolation]

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (torch.arange(n, device=pixels.device) for n in pixels.shape[1:3])
        short = torch.minimum(rows[-1], columns[-1]) + 1
        x = pixels.permute(0, 3, 1, 2).to(torch.float64)  # (B, C, H, W)
        x = _whole(torch.matmul(x, self._matrix(columns, short, self.size[1], 0)))  # (B, C, H, w)
        x = _whole(torch.matmul(self._matrix(rows, short, self.size[0], 1), x))  # (B, C, h, w)
        return x.permute(0, 2, 3, 1).to(torch.uint8)

    def _matrix(self, places: Tensor, short: Tensor, kept: int, along: int) -> Tensor:
        """float64 (kept, n): what each pixel kept along a side takes of the n that there are, in units of 1 / UNIT.

        Args:
            places: 0 to n - 1.
            short: the picture's shorter side, as `Preprocessing.resized` has it.
            along: the dimension of the n; 0 gives (n, kept), made so because ONNX Runtime before 1.26 joins a transposition and
                a product in float64 into an operation that it does not have.
        """
        longest = short * max(1, MOST // self.side**2)
        n = torch.minimum(places[-1] + 1, longest)  # of a very narrow picture about what `resized` keeps
        begin = (places[-1] + 1 - n) // 2
        length = self.side * n // short  # after the resize
        i = torch.arange(kept, device=places.device).unsqueeze(along) + _centred(length, kept)  # (kept, 1), of `length`
        j = places.unsqueeze(1 - along) - begin  # (1, n)
        apart = (2 * i + 1) * n - (2 * j + 1) * length  # from centre to centre, in units of 1 / (2 length) pixels
        weights = self.kernel(apart.abs().to(torch.float64) / (2 * torch.maximum(n, length)).to(torch.float64))
        there = (j >= 0) & (j < n) & (i >= 0) & (i < length)
        weights = weights * there.to(torch.float64)
        weights = weights / weights.sum(along, keepdim=True).clamp_min(1e-6)  # beyond the picture it is black
        return torch.floor(weights * UNIT + 0.5)


def _triangle(distance: Tensor) -> Tensor:
    return torch.relu(1 - distance)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as Pillow has it."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def _centred(length: Tensor, part: int) -> Tensor:
    """`preprocessing.centred` of a tensor: halves are rounded to even."""
    d = length - part
    return (d + (d // 2) % 2) // 2


def _whole(x: Tensor) -> Tensor:
    return torch.floor(x / UNIT + 0.5).clamp(0, 255)
