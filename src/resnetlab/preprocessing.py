"""Image preprocessing between decoding and the network; the same in training, evaluation, prediction and export.

    uint8 (B, H, W, C)  --resize, centre crop-->  uint8 (B, h, w, C)  --normalise-->  float32 (B, C, h, w), channels last

It is stored in the model file, so that a model always gets images preprocessed as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from resnetlab.device import to_device
from resnetlab.errors import DataError, ModelFileError, UsageError, unknown_name_error

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
STD_RANGE = 1e-7, 1e6  # beyond it normalised values overflow, or their differences are lost
MAX_INPUT_SIDE = 16_384  # pixels on a side of the input
MAX_RESIZED_PIXELS = 2**24  # pixels that a resized image may have


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """How decoded images become the network's input.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: (h, w) of the network's input, in pixels.
        resize: the shorter side is resized to this many pixels, before the centre crop to `size`.
        interpolation: of that resize, INTERPOLATIONS; antialiased.
        mean: subtracted, in units of [0, 1]: per channel (C,), or per pixel (h, w, C) as in 2015 §4.2.
        std: divided by, per channel (C,); all ones to divide by nothing, as in the papers.
    """

    channels: int
    size: tuple[int, int]
    resize: int
    mean: Tensor
    std: Tensor
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_name_error("interpolation", self.interpolation, INTERPOLATIONS)

    def __call__(self, image: Image.Image) -> Tensor:
        """One decoded image, L or RGB, of any size -> uint8 (h, w, C): shorter side resized (antialiased), centre crop."""
        image = self.resize_image(image, self.resize)
        (height, width), (h, w) = (image.height, image.width), self.size
        if (height, width) != (h, w):
            top, left = center_offset(height, h), center_offset(width, w)
            image = image.crop((left, top, left + w, top + h))
        return pil_to_tensor(image)

    def resize_image(self, image: Image.Image, side: int) -> Image.Image:
        """The whole image as L or RGB, its shorter side resized to `side` pixels; as torchvision's Resize.

        An image so narrow that it would exceed MAX_RESIZED_PIXELS is first cropped to its middle.
        """
        image = image.convert("L" if self.channels == 1 else "RGB")
        short = min(image.size)
        longest = max(short, MAX_RESIZED_PIXELS * short // side**2)  # 1x400000 pixels would take gigabytes
        if max(image.size) > longest:
            keep_w, keep_h = (min(length, longest) for length in image.size)
            left, top = (image.width - keep_w) // 2, (image.height - keep_h) // 2
            image = image.crop((left, top, left + keep_w, top + keep_h))
        width, height = (int(side * length / short) for length in image.size)
        if image.size == (width, height):
            return image
        return image.resize((width, height), INTERPOLATIONS[self.interpolation])

    def normalise(self, pixels: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 (B, h, w, C), or B images (h, w, C) -> float32 (B, C, h, w) in channels-last memory: (x / 255 - mean) / std.

        For images of another size than a per-pixel mean, its average over pixels is subtracted per channel.
        """
        one = pixels if isinstance(pixels, Tensor) else pixels[0]
        b, (h, w, c) = len(pixels), one.shape[-3:]
        mean, std = (to_device(v, one.device) for v in (self.mean, self.std))
        if mean.ndim == 3 and mean.shape[:2] != (h, w):
            mean = mean.mean((0, 1))
        scale, shift = 1 / (255 * std), mean / std
        scale, shift = (
            v.expand(h, w, c).reshape(h, w * c) for v in (scale, shift)
        )  # whole rows are five times as fast
        if isinstance(pixels, Tensor):
            x = torch.mul(pixels.reshape(b, h, w * c), scale).sub_(shift)  # uint8 times float32 is float32
        else:
            x = torch.empty(b, h, w * c, device=one.device)
            for image, row in zip(pixels, x, strict=True):  # one image at a time fits in the cache
                torch.mul(image.reshape(h, w * c), scale, out=row).sub_(shift)
        return x.view(b, h, w, c).permute(0, 3, 1, 2)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; a per-pixel mean is None in it (the model file keeps it as a tensor)."""
        return {
            "channels": self.channels,
            "size": list(self.size),
            "resize": self.resize,
            "mean": self.mean.tolist() if self.mean.ndim == 1 else None,
            "std": self.std.tolist(),
            **({} if self.interpolation == "bilinear" else {"interpolation": self.interpolation}),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], mean: Tensor | None = None) -> Preprocessing:
        """The inverse of `to_json`; `mean` is the per-pixel mean if there is one."""
        try:
            average = torch.tensor(values["mean"]) if mean is None else mean
            height, width = values["size"]
            std, interpolation = torch.tensor(values["std"]), values.get("interpolation", "bilinear")
            preprocessing = Preprocessing(
                values["channels"], (height, width), values["resize"], average, std, interpolation
            )
            if problem := preprocessing.validate():
                raise ValueError(problem)
            return preprocessing
        except (UsageError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelFileError(
                f"the preprocessing in the model file cannot be used ({error}); train or import it again."
            ) from error

    def validate(self) -> str | None:
        """Why the values are invalid, or None."""
        sides = (*self.size, self.resize)
        if any(not isinstance(v, int) or not 0 < v <= MAX_INPUT_SIDE for v in sides):
            size = "x".join(map(str, self.size))
            return f"size {size} and resize {self.resize} must be between 1 and {MAX_INPUT_SIDE:,} pixels"
        if self.channels not in (1, 3):
            return f"images have 1 channel or 3, not {self.channels}"
        if self.mean.shape not in ((self.channels,), (*self.size, self.channels)) or self.std.shape != (self.channels,):
            return f"mean of shape {tuple(self.mean.shape)}, std of shape {tuple(self.std.shape)}"
        low, high = STD_RANGE
        if not bool((self.mean.abs() <= high).all() & (self.std >= low).all() & (self.std <= high).all()):
            return f"mean and std must be finite, std from {low:g} to {high:g}"
        return None


def center_offset(length: int, part: int) -> int:
    """The offset of the middle `part` of `length` pixels; rounded as in torchvision's CenterCrop."""
    return round((length - part) / 2)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image, L or RGB -> uint8 (H, W, C)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1)


def tensor_to_pil(pixels: Tensor) -> Image.Image:
    """uint8 (H, W, C) of one or three channels -> a PIL image, L or RGB."""
    return Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())


def pixel_statistics(images: Tensor | Iterable[Tensor], per_pixel: bool, divide: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of training images, uint8 (N, h, w, C) or batches of them, in units of [0, 1].

    The mean is (h, w, C) or (C,); the deviation (C,), all ones unless `divide`. Sums are exact (integers), so the result does
    not depend on the order of the images. Raises DataError if there is no image.
    """
    n, total, squares = 0, torch.tensor(0), torch.tensor(0)
    for batch in [images] if isinstance(images, Tensor) else images:
        for part in torch.split(batch, 4096):
            wide = part.to(torch.int32)
            n += len(part)
            total = total + wide.sum(0)  # (h, w, C), int64
            squares = squares + wide.square().sum((0, 1, 2))
    if not n:
        raise DataError("there is no readable image to train on; fix them: resnetlab data check.")
    height, width, channels = total.shape
    pixels = n * height * width
    mean = total.sum((0, 1)).double() / pixels / 255
    std = (squares.double() / pixels / 255**2 - mean.square()).clamp_min(1e-12).sqrt()
    average = total.double() / n / 255 if per_pixel else mean
    return average.float(), (std if divide else torch.ones(channels)).float()
