"""Resize and centre crop with tensor operations, so that an exported file takes images of any size.

uint8 (B, H, W, C)  --resize, centre crop-->  uint8 (B, h, w, C), as `Preprocessing` with Pillow; or both float32, as with torch

Pillow's antialiased resize multiplies with one matrix along each side and rounds to integers after each: row i of a matrix
holds the kernel around pixel i's position in the image, widened by the downscaling factor. Rows outside the crop are omitted.
The matrices are computed from the image's size, in integers except for the kernel (which fit into 32 bits: OpenVINO has no
others; it computes the rest in float32, and so may differ by one grey level where a value is halfway between two). Some
versions of Pillow resize images more than twice as tall as wide in the other order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnetlab.preprocessing import MAX_RESIZED_PIXELS, Preprocessing

UNIT = 2.0**22  # of Pillow's integer weights


class Resize(nn.Module):
    """Resizes and crops images of any one size to the network's input."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size, self.side = preprocessing.size, preprocessing.resize
        self.kernel = {"bilinear": _bilinear_kernel, "bicubic": _bicubic_kernel}[preprocessing.interpolation]

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (torch.arange(n, device=pixels.device) for n in pixels.shape[1:3])
        short = torch.minimum(rows[-1], columns[-1]) + 1
        x = pixels.permute(0, 3, 1, 2).to(torch.float64)  # (B, C, H, W)
        if pixels.is_floating_point():  # values as stored are not rounded (preprocessing.resize_pixels)
            x = torch.matmul(x, self._matrix(columns, short, self.size[1], 0)) / UNIT
            x = torch.matmul(self._matrix(rows, short, self.size[0], 1), x) / UNIT
            return x.permute(0, 2, 3, 1).to(torch.float32)
        x = _round(torch.matmul(x, self._matrix(columns, short, self.size[1], 0)))  # (B, C, H, w)
        x = _round(torch.matmul(self._matrix(rows, short, self.size[0], 1), x))  # (B, C, h, w)
        return x.permute(0, 2, 3, 1).to(torch.uint8)

    def _matrix(self, positions: Tensor, short: Tensor, size: int, dim: int) -> Tensor:
        """The weights of the n input pixels for each of the `size` output pixels of a side, in units of 1 / UNIT.

        Args:
            positions: 0 to n - 1.
            short: the image's shorter side.
            dim: the dimension of the n in the float64 result: 1 for (size, n), 0 for (n, size). The result is not transposed,
                because ONNX Runtime before 1.26 fuses transpose and float64 product into an operation that it lacks.
        """
        longest = short * max(1, MAX_RESIZED_PIXELS // self.side**2)
        n = torch.minimum(positions[-1] + 1, longest)  # very narrow images are cropped as in `Preprocessing`
        begin = (positions[-1] + 1 - n) // 2
        length = self.side * n // short  # after the resize
        i = torch.arange(size, device=positions.device).unsqueeze(dim)
        i = i + _crop_start(length, size)  # (size, 1), of `length`
        j = positions.unsqueeze(1 - dim) - begin  # (1, n)
        distance = (2 * i + 1) * n - (2 * j + 1) * length  # between centres, in units of 1 / (2 length) pixels
        weights = self.kernel(distance.abs().to(torch.float64) / (2 * torch.maximum(n, length)).to(torch.float64))
        inside = (j >= 0) & (j < n) & (i >= 0) & (i < length)
        weights = weights * inside.to(torch.float64)
        weights = weights / weights.sum(dim, keepdim=True).clamp_min(1e-6)  # black outside the image
        return torch.floor(weights * UNIT + 0.5)


def _bilinear_kernel(distance: Tensor) -> Tensor:
    return torch.relu(1 - distance)


def _bicubic_kernel(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as in Pillow."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


def _crop_start(length: Tensor, size: int) -> Tensor:
    """`preprocessing.center_offset` for a tensor: halves are rounded to even."""
    d = length - size
    return (d + (d // 2) % 2) // 2


def _round(x: Tensor) -> Tensor:
    return torch.floor(x / UNIT + 0.5).clamp(0, 255)
