"""Image preprocessing between decoding and the network; the same in training, evaluation, prediction and export.

    uint8 (B, H, W, C)  --resize, centre crop-->  uint8 (B, h, w, C)  --normalise-->  float32 (B, C, h, w), channels last

It is stored in the model file, so that a model always gets images preprocessed as in training. Images that 8-bit grey or RGB
cannot hold (`PixelFormat`) are float32 from the file to the network; torch resizes them, by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnetlab.device import to_device
from resnetlab.errors import DataError, ModelFileError, UsageError, unknown_name_error
from resnetlab.formatting import format_count
from resnetlab.pixels import is_resized_here, resize_bytes

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
STD_RANGE = 1e-7, 1e6  # beyond it normalised values overflow, or their differences are lost
MAX_INPUT_SIDE = 16_384  # pixels on a side of the input
MAX_RESIZED_PIXELS = 2**24  # pixels that a resized image may have
WHITE = {"": 255, "uint8": 255, "uint16": 65_535, "int16": 32_767, "float32": 1}  # the value that counts as 1, by type
MAX_CHANNELS = 4096
SHOWN = 0.01, 0.99  # quantiles of a channel that are black and white where it is shown


class PixelFormat(NamedTuple):
    """How the values of images are read.

    Attributes:
        channels: of an image.
        dtype: "" for 8-bit grey or RGB, to which any ordinary image is converted; otherwise the NumPy type of the values in the
            file ("uint8", "uint16", "int16" or "float32"), which become float32 unchanged.
    """

    channels: int = 3
    dtype: str = ""

    def __str__(self) -> str:
        kind = {"": "8 bits", "uint8": "8 bits", "uint16": "16 bits", "int16": "16 bits, signed"}
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {kind.get(self.dtype, self.dtype)}"

    @property
    def tensor_dtype(self) -> torch.dtype:
        """Of decoded images: uint8, or float32 for values as stored."""
        return torch.float32 if self.dtype else torch.uint8


RGB = PixelFormat()


@dataclass(frozen=True, eq=False, repr=False)
class Preprocessing:
    """How decoded images become the network's input.

    Attributes:
        channels: 1 (grey) or 3 (RGB), or any number of images with values as stored.
        size: (h, w) of the network's input, in pixels.
        resize: the shorter side is resized to this many pixels, before the centre crop to `size`.
        interpolation: of that resize, INTERPOLATIONS; antialiased.
        mean: subtracted, in units of [0, 1]: per channel (C,), or per pixel (h, w, C) as in 2015 §4.2.
        std: divided by, per channel (C,); all ones to divide by nothing, as in the papers.
        dtype: of values that are read as stored (`PixelFormat`); "" for 8-bit grey or RGB. Values are divided by its WHITE.
    """

    channels: int
    size: tuple[int, int]
    resize: int
    mean: Tensor
    std: Tensor
    interpolation: str = "bilinear"
    dtype: str = ""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_name_error("interpolation", self.interpolation, INTERPOLATIONS)

    def __repr__(self) -> str:
        """Without the thousands of numbers of a mean per pixel, which stand as their means per channel."""
        mean, per = self.mean.reshape(-1, self.channels).mean(0), " per pixel" if self.mean.ndim == 3 else ""
        values = [f"{each:.4g}" for each in mean.tolist()], [f"{each:.4g}" for each in self.std.tolist()]
        return (
            f"Preprocessing({self.size[0]}x{self.size[1]} pixels, shorter side {self.resize} ({self.interpolation}), "
            f"{self.pixel_format}, mean{per} {', '.join(values[0])}, std {', '.join(values[1])})"
        )

    @property
    def pixel_format(self) -> PixelFormat:
        """How images are read for it."""
        return PixelFormat(self.channels, self.dtype)

    def blank_image(self, height: int, width: int) -> Tensor:
        """Zeros, (height, width, C) of the type that images have before normalisation."""
        return torch.zeros(height, width, self.channels, dtype=self.pixel_format.tensor_dtype)

    @property
    def white(self) -> int:
        """The value that counts as 1."""
        return WHITE[self.dtype]

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One decoded image of any size -> (h, w, C): shorter side resized (antialiased), centre crop.

        A Pillow image, L or RGB, or uint8 (H, W, C) gives uint8; values as stored, float32 (H, W, C), give float32.
        """
        if isinstance(image, Tensor) and image.is_floating_point():
            image, (h, w) = self.resize_pixels(image, self.resize), self.size
            top, left = center_offset(image.shape[0], h), center_offset(image.shape[1], w)
            return image[top : top + h, left : left + w].contiguous()
        if (resized := self._resize_part(image)) is not None:
            return resized
        image = self.resize_image(tensor_to_pil(image) if isinstance(image, Tensor) else image, self.resize)
        (height, width), (h, w) = (image.height, image.width), self.size
        if (height, width) != (h, w):
            top, left = center_offset(height, h), center_offset(width, w)
            image = image.crop((left, top, left + w, top + h))
        return pil_to_tensor(image)

    def _resize_part(self, image: Image.Image | Tensor) -> Tensor | None:
        """What the centre crop keeps of a resized image, uint8 (h, w, 3); None where Pillow has to resize all of it."""
        if self.channels != 3 or (isinstance(image, Image.Image) and image.mode != "RGB"):
            return None
        height, width = image.shape[:2] if isinstance(image, Tensor) else (image.height, image.width)
        (top, left), inner, size = plan_resize((height, width), self.resize)
        part = (center_offset(size[0], self.size[0]), center_offset(size[1], self.size[1]), *self.size)
        is_inside = min(part) >= 0 and size[0] >= part[0] + part[2] and size[1] >= part[1] + part[3]
        if not is_inside or not is_resized_here(self.interpolation, inner, size):
            return None
        pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        return resize_bytes(self.interpolation, pixels[top : top + inner[0], left : left + inner[1]], size, part)

    def to_pixels(self, image: Image.Image | Tensor) -> Tensor:
        """One decoded image at its own size, (H, W, C) in the channels that the network gets."""
        if isinstance(image, Tensor):
            return image
        return pil_to_tensor(image.convert("L" if self.channels == 1 else "RGB"))

    def resize_image(self, image: Image.Image, side: int) -> Image.Image:
        """The whole image (`plan_resize`) as L or RGB, its shorter side resized to `side` pixels; as torchvision's Resize."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        (left, top), (width, height), size = plan_resize(image.size, side)
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
        return image if image.size == size else image.resize(size, INTERPOLATIONS[self.interpolation])

    def resize_pixels(self, pixels: Tensor, side: int) -> Tensor:
        """`resize_image` for values as stored, float32 (H, W, C): torch's antialiased filter, Pillow's without rounding."""
        if pixels.shape[2] != self.channels:
            raise DataError(f"an image has {format_count(pixels.shape[2], 'channel')}, not {self.channels}.")
        (top, left), (height, width), size = plan_resize((pixels.shape[0], pixels.shape[1]), side)
        pixels = pixels[top : top + height, left : left + width]
        if (height, width) == size:
            return pixels
        x = pixels.permute(2, 0, 1)[None]  # (1, C, H, W)
        x = F.interpolate(x, size, mode=self.interpolation, antialias=True, align_corners=False)
        return x[0].permute(1, 2, 0).contiguous()

    def resize_bytes(self, pixels: Tensor, side: int) -> Tensor:
        """`resize_image` for uint8 (H, W, C) on a CPU."""
        (top, left), (height, width), size = plan_resize((pixels.shape[0], pixels.shape[1]), side)
        resized = None
        if self.channels == 3 and (height, width) != size:
            inner = pixels[top : top + height, left : left + width]
            resized = resize_bytes(self.interpolation, inner, size)
        return pil_to_tensor(self.resize_image(tensor_to_pil(pixels), side)) if resized is None else resized

    def normalise(self, pixels: Tensor | Sequence[Tensor]) -> Tensor:
        """(B, h, w, C), or B images (h, w, C) -> float32 (B, C, h, w) in channels-last memory: (x / white - mean) / std.

        For images of another size than a per-pixel mean, its average over pixels is subtracted per channel.
        """
        one = pixels if isinstance(pixels, Tensor) else pixels[0]
        b, (h, w, c) = len(pixels), one.shape[-3:]
        mean, std = (to_device(v, one.device) for v in (self.mean, self.std))
        if mean.ndim == 3 and mean.shape[:2] != (h, w):
            mean = mean.mean((0, 1))
        scale, shift = 1 / (self.white * std), mean / std
        # whole rows are five times as fast
        scale, shift = (v.expand(h, w, c).reshape(h, w * c) for v in (scale, shift))
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
            **({"dtype": self.dtype} if self.dtype else {}),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], mean: Tensor | None = None) -> Preprocessing:
        """The inverse of `to_json`; `mean` is the per-pixel mean if there is one."""
        try:
            average = torch.tensor(values["mean"]) if mean is None else mean
            height, width = values["size"]
            optional = {key: values[key] for key in ("interpolation", "dtype") if key in values}
            preprocessing = Preprocessing(
                values["channels"], (height, width), values["resize"], average, torch.tensor(values["std"]), **optional
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
        if self.dtype not in WHITE:
            return f"values are of {', '.join(filter(None, WHITE))}, not {self.dtype!r}"
        if not isinstance(self.channels, int) or not 0 < self.channels <= MAX_CHANNELS:
            return f"images have from 1 to {MAX_CHANNELS:,} channels, not {self.channels}"
        if not self.dtype and self.channels not in (1, 3):
            return f"images have 1 channel or 3, not {self.channels}"
        if self.mean.shape not in ((self.channels,), (*self.size, self.channels)) or self.std.shape != (self.channels,):
            return f"mean of shape {tuple(self.mean.shape)}, std of shape {tuple(self.std.shape)}"
        low, high = STD_RANGE
        if not bool((self.mean.abs() <= high).all() & (self.std >= low).all() & (self.std <= high).all()):
            return f"mean and std must be finite, std from {low:g} to {high:g}"
        return None


def plan_resize(size: tuple[int, int], side: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Offset and size of the middle of an image that is resized, and what to, in pixels; all in the order of `size`.

    That is the whole image unless it is so narrow that MAX_RESIZED_PIXELS would be exceeded: 1x400000 would take gigabytes.
    """
    short = min(size)
    longest = max(short, MAX_RESIZED_PIXELS * short // side**2)
    a, b = (min(length, longest) for length in size)
    return ((size[0] - a) // 2, (size[1] - b) // 2), (a, b), (int(side * a / short), int(side * b / short))


def center_offset(length: int, part: int) -> int:
    """The offset of the middle `part` of `length` pixels; rounded as in torchvision's CenterCrop."""
    return round((length - part) / 2)


def round_to_bytes(x: Tensor) -> Tensor:
    """Resized values in units of grey levels, rounded to uint8."""
    return x.round().clamp(0, 255).to(torch.uint8)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image, L or RGB -> uint8 (H, W, C)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1)


def tensor_to_pil(pixels: Tensor) -> Image.Image:
    """uint8 (H, W, C) of one or three channels -> a PIL image, L or RGB."""
    return Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy())


def render_pixels(pixels: Tensor) -> Image.Image:
    """An image for people to see, uint8 or float32 (H, W, C) -> L or RGB.

    Three channels of uint8 are shown as they are, of another number the first. Of float32 the first three are red, green and
    blue (of two the first is grey), each stretched from its 1st to its 99th percentile in this image.
    """
    if pixels.dtype == torch.uint8:
        return tensor_to_pil((pixels if pixels.shape[-1] == 3 else pixels[..., :1]).contiguous())
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1]
    values = shown.cpu().double().numpy()
    low, high = np.quantile(values, SHOWN, axis=(0, 1))
    scaled = (values - low) / np.maximum(high - low, 1e-30)
    return tensor_to_pil(torch.from_numpy((255 * scaled.clip(0, 1)).round().astype(np.uint8)))


def pixel_statistics(
    images: Tensor | Iterable[Tensor], per_pixel: bool, divide: bool, white: int = 255
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of training images, (N, h, w, C) or batches of them, in units of [0, 1].

    The mean is (h, w, C) or (C,); the deviation (C,), all ones unless `divide`. Sums of uint8 are exact (integers), so the
    result does not depend on the order of the images; those of float32 are float64, by one thread. Raises DataError if there is
    no image.
    """
    n, total, squares = 0, torch.tensor(0), torch.tensor(0)
    for batch in [images] if isinstance(images, Tensor) else images:
        for part in torch.split(batch, 4096):
            n += len(part)
            if part.is_floating_point():
                values = part.numpy().astype(np.float64)
                total = total + torch.from_numpy(values.sum(0))
                squares = squares + torch.from_numpy(np.square(values).sum((0, 1, 2)))
                continue
            wide = part.to(torch.int32)
            total = total + wide.sum(0)  # (h, w, C), int64
            squares = squares + wide.square().sum((0, 1, 2))
    if not n:
        raise DataError("there is no readable image to train on; fix them: resnetlab data check.")
    height, width, channels = total.shape
    pixels = n * height * width
    mean = total.sum((0, 1)).double() / pixels / white
    std = (squares.double() / pixels / white**2 - mean.square()).clamp_min(1e-12).sqrt()
    if total.is_floating_point():  # a channel of one value would be divided by its rounding
        std = torch.where(std > (1e-6 * mean.abs()).clamp_min(1.1e-6), std, 1.0)
    average = total.double() / n / white if per_pixel else mean
    return average.float(), (std if divide else torch.ones(channels)).float()
