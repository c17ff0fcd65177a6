"""The 15 corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), each at five severities, as pure functions.

Parameters are those of the authors' programs (github.com/hendrycks/robustness): ImageNet-C's for images of more than 64 pixels
on a side, CIFAR-10-C's for smaller ones. docs/differences.md lists what differs: frost is drawn, not photographed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.random import seed_for

Errors = Mapping[str, tuple[float, ...]]  # kind -> top-1 error at each severity
Array = Any  # a NumPy array of an image: (H, W, C), float64 in [0, 1]
SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64  # pixels on the shorter side: up to here CIFAR-10-C's parameters


def _gaussian_noise(x: Array, c: float, draw: Generator) -> Array:
    return x + draw.normal(size=x.shape, scale=c)


def _shot_noise(x: Array, c: float, draw: Generator) -> Array:
    return draw.poisson(x * c) / c


def _impulse_noise(x: Array, c: float, draw: Generator) -> Array:
    changed, white = draw.random(x.shape) < c, draw.random(x.shape) < 0.5
    return np.where(changed, white, x)


def _defocus_blur(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    from scipy.ndimage import correlate1d

    radius, sigma = c
    reach = 8 if radius <= 8 else int(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    product = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(disk, padded.shape[:2])[:, :, None]
    return np.fft.irfft2(product, padded.shape[:2], axes=(0, 1))[2 * reach :, 2 * reach :]  # where the kernel fits


def _glass_blur(x: Array, c: tuple[float, int, int], draw: Generator) -> Array:
    sigma, reach, rounds = c
    blurred = np.floor(_gaussian(x, sigma) * 255) / 255
    (height, width), channels = x.shape[:2], x.shape[2]
    source = list(range(height * width))  # the pixel that each one takes its value from
    ys, xs = range(height - reach, reach, -1), range(width - reach, reach, -1)
    for _ in range(rounds):
        shifts = draw.integers(-reach, reach, (len(ys), len(xs), 2))
        offsets = (shifts[:, :, 1] * width + shifts[:, :, 0]).ravel().tolist()
        for place, offset in zip((y * width + x for y in ys for x in xs), offsets, strict=True):
            source[place] = source[place + offset]
    return _gaussian(blurred.reshape(-1, channels)[source].reshape(x.shape), sigma)


def _motion_blur(x: Array, c: tuple[int, float], draw: Generator) -> Array:
    return _blur_along(x, *c, draw.uniform(-45, 45))


def _zoom_blur(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    factors = np.arange(1, *c)
    return (x + sum(_zoom(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _snow(x: Array, c: tuple[float, ...], draw: Generator) -> Array:
    mean, deviation, zoom, threshold, radius, sigma, share = c
    layer = _zoom(draw.normal(mean, deviation, x.shape[:2])[:, :, None], zoom)
    layer = np.floor(np.where(layer < threshold, 0, layer).clip(0, 1) * 255) / 255
    layer = np.floor(_blur_along(layer, int(radius), sigma, draw.uniform(-135, -45)) * 255) / 255
    grey = x @ [[0.299], [0.587], [0.114]] if x.shape[2] == 3 else x
    return share * x + (1 - share) * np.maximum(x, grey * 1.5 + 0.5) + layer + np.rot90(layer, 2)


def _frost(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    coarse, fine = (_plasma(x.shape[:2], decay, draw) for decay in (2.2, 1.6))
    needles = (1 - np.abs(2 * coarse - 1)) ** 3 * (1 - np.abs(2 * fine - 1))
    layer = (0.25 + 0.3 * fine + 0.9 * needles).clip(0, 1)[:, :, None]
    tint = np.array([0.9, 0.97, 1.0]) if x.shape[2] == 3 else np.ones(1)
    return c[0] * x + c[1] * layer * tint


def _fog(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    highest = x.max()
    return (x + c[0] * _plasma(x.shape[:2], c[1], draw)[:, :, None]) * highest / (highest + c[0])


def _brightness(x: Array, c: float, draw: Generator) -> Array:
    value = x.max(2, keepdims=True)  # HSV's; hue and saturation stay
    brighter = (value + c).clip(0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(x: Array, c: float, draw: Generator) -> Array:
    means = x.mean((0, 1), keepdims=True)
    return (x - means) * c + means


def _elastic_transform(x: Array, c: tuple[float, float, float], draw: Generator) -> Array:
    from scipy.ndimage import gaussian_filter, map_coordinates

    (height, width), side = x.shape[:2], min(x.shape[:2])
    scale = side if side <= SMALL else 244 * side / 224  # the authors' 244 for images of 224
    strength, sigma, shift = (scale * value for value in c)
    centre, third = np.array([width // 2, height // 2], float), side // 3
    before = np.array([centre + third, centre + np.array([third, -third]), centre - third])
    after = before + draw.uniform(-shift, shift, before.shape)
    to_before = np.linalg.solve(np.c_[after, np.ones(3)], before)  # (3, 2): dst (x, y, 1) -> src (x, y)
    ys, xs = np.mgrid[:height, :width].astype(float)
    source = np.stack([xs, ys, np.ones_like(xs)], 2) @ to_before
    moved = _sample(x, source[:, :, 1], source[:, :, 0], map_coordinates, "mirror")
    dx, dy = (
        gaussian_filter(draw.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3) * strength
        for _ in range(2)
    )
    return _sample(moved, ys + dy, xs + dx, map_coordinates, "reflect")


def _pixelate(x: Array, c: float, draw: Generator) -> Array:
    image = _to_image(x)
    small = image.resize([max(1, int(side * c)) for side in image.size], Image.Resampling.BOX)
    return _from_image(small.resize(image.size, Image.Resampling.BOX), x.shape[2])


def _jpeg_compression(x: Array, c: int, draw: Generator) -> Array:
    buffer = io.BytesIO()
    _to_image(x).save(buffer, "JPEG", quality=c)
    return _from_image(Image.open(buffer), x.shape[2])


def _sample(x: Array, ys: Array, xs: Array, sample: Callable[..., Array], mode: str) -> Array:
    return np.stack([sample(x[:, :, i], [ys, xs], order=1, mode=mode) for i in range(x.shape[2])], 2)


def _gaussian(x: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    blurred: Array = gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)
    return blurred


def _blur_along(x: Array, radius: int, sigma: float, angle: float) -> Array:
    """ImageMagick's motion blur: half a Gaussian of 2 · radius + 1 pixels along a direction, in degrees; edges continue."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    blurred = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        dy, dx = (int(np.ceil(step * f(np.deg2rad(angle)) - 0.5)) for f in (np.sin, np.cos))
        rows, columns = ((np.arange(n) + d).clip(0, n - 1) for n, d in zip(x.shape[:2], (dy, dx), strict=True))
        blurred += weight * x[rows][:, columns]
    return blurred


def _zoom(x: Array, factor: float) -> Array:
    """The middle of an image enlarged to its size, with linear interpolation."""
    from scipy.ndimage import zoom

    size = x.shape[:2]
    crops = [int(np.ceil(n / factor)) for n in size]
    top, left = ((n - crop) // 2 for n, crop in zip(size, crops, strict=True))
    large = zoom(x[top : top + crops[0], left : left + crops[1]], (factor, factor, 1), order=1)
    top, left = ((a - n) // 2 for a, n in zip(large.shape[:2], size, strict=True))
    enlarged: Array = large[top : top + size[0], left : left + size[1]]
    return enlarged


def _plasma(size: tuple[int, ...], decay: float, draw: Generator) -> Array:
    """A random height map in [0, 1] by the diamond-square algorithm, (H, W)."""
    side = 1 << (max(size) - 1).bit_length()
    heights, step, wobble = np.zeros((side, side)), side, 100.0

    def spread(total: Array) -> Array:
        return total / 4 + wobble * draw.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = spread(pairs + np.roll(pairs, -1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = spread(middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1))
        heights[half::step, ::step] = spread(middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0))
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights[: size[0], : size[1]] / max(heights.max(), 1e-12)


def _to_image(x: Array) -> Image.Image:
    pixels = (x * 255).round().astype(np.uint8)
    return Image.fromarray(pixels if x.shape[2] == 3 else pixels[:, :, 0])


def _from_image(image: Image.Image, channels: int) -> Array:
    return np.asarray(image, np.float64).reshape(image.height, image.width, channels) / 255


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption.

    Attributes:
        apply: (x, parameters of a severity, generator) -> the corrupted image, before it is clipped.
        large, small: the parameters of the five severities, of ImageNet-C and of CIFAR-10-C.
        alexnet_error: AlexNet's mean top-1 error on ImageNet-C over the five severities, which the authors divide by.
    """

    apply: Callable[[Array, Any, Generator], Array]
    large: tuple[Any, ...]
    small: tuple[Any, ...]
    alexnet_error: float


CORRUPTIONS = {
    "gaussian_noise": Corruption(
        _gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10), 0.886428
    ),
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50), 0.894468),
    "impulse_noise": Corruption(
        _impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07), 0.922640
    ),
    "defocus_blur": Corruption(
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        0.819880,
    ),
    "glass_blur": Corruption(
        _glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        0.826268,
    ),
    "motion_blur": Corruption(
        _motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        0.785948,
    ),
    "zoom_blur": Corruption(
        _zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        0.798360,
    ),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        0.866816,
    ),
    "frost": Corruption(
        _frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        0.826572,
    ),
    "fog": Corruption(
        _fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        0.819324,
    ),
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3), 0.564592),
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15), 0.853204),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        0.646056,
    ),
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65), 0.717840),
    "jpeg_compression": Corruption(_jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40), 0.606500),
}


@dataclass(frozen=True)
class CorruptionErrors:
    """Top-1 errors on corrupted images.

    Attributes:
        severities: of SEVERITIES, ascending.
        errors: kind -> the error at each severity.
        clean_error: on the same images, not corrupted.
        baseline: its name, or "" where there is none to divide by.
        baseline_errors: kind -> the baseline's mean error over the severities.
    """

    severities: tuple[int, ...]
    errors: Errors
    clean_error: float
    seed: int
    baseline: str = ""
    baseline_errors: Mapping[str, float] | None = None

    @property
    def mean_error(self) -> float:
        """Over all kinds and severities."""
        return fmean(map(fmean, self.errors.values()))

    def corruption_error(self, kind: str) -> float | None:
        """CE: the errors of a kind divided by the baseline's; None without a baseline, or where it makes no error."""
        baseline = (self.baseline_errors or {}).get(kind)
        return fmean(self.errors[kind]) / baseline if baseline else None

    @property
    def mean_corruption_error(self) -> float | None:
        """mCE: the mean of the CEs, a fraction (1 is as good as the baseline); None where one is missing."""
        values = [self.corruption_error(kind) for kind in self.errors]
        return None if None in values else fmean(cast("list[float]", values))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        kinds = [
            {
                "kind": kind,
                "errors": list(errors),
                "mean_error": fmean(errors),
                "baseline_error": (self.baseline_errors or {}).get(kind),
                "corruption_error": self.corruption_error(kind),
            }
            for kind, errors in self.errors.items()
        ]
        return {
            "severities": list(self.severities),
            "seed": self.seed,
            "clean_error": self.clean_error,
            "mean_error": self.mean_error,
            "baseline": self.baseline or None,
            "mean_corruption_error": self.mean_corruption_error,
            "kinds": kinds,
        }

    def to_csv(self) -> str:
        """A line for each kind and severity."""
        rows = [
            f"{kind},{severity},{error!r}"
            for kind, errors in self.errors.items()
            for severity, error in zip(self.severities, errors, strict=True)
        ]
        return "\n".join(["kind,severity,top1_error", *rows, ""])


def corrupt(pixels: Tensor, kind: str, severity: int, seed: int, name: str) -> Tensor:
    """A corrupted copy of an image, uint8 (H, W, C) of one channel or three.

    Args:
        kind: of CORRUPTIONS.
        severity: 1 to 5.
        seed, name: the random numbers are a function of these, the kind and the severity: `name` is the image's.
    """
    entry, draw = CORRUPTIONS[kind], np.random.default_rng(seed_for(seed, "corruption", kind, severity, name))
    parameters = (entry.small if min(pixels.shape[:2]) <= SMALL else entry.large)[severity - 1]
    x = entry.apply(pixels.numpy().astype(np.float64) / 255, parameters, draw)
    values = x.clip(0, 1) * 255
    # the authors cut the fraction off; images that come back unchanged must not lose a level to rounding of the division
    return torch.from_numpy(np.floor(values + 1e-6).astype(np.uint8))


@dataclass(frozen=True)
class CorruptionChoice:
    """Which corruptions to evaluate on: kinds of CORRUPTIONS, severities of SEVERITIES, and the seed of their randomness."""

    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = SEVERITIES
    seed: int = 0


def parse_corruptions(kinds: str, severities: str, seed: int = 0) -> CorruptionChoice:
    """Reads lists of kinds ("all", or names separated by commas) and severities; raises UsageError for unknown ones."""
    names = tuple(CORRUPTIONS) if kinds == "all" else tuple(dict.fromkeys(part.strip() for part in kinds.split(",")))
    for name in names:
        if name not in CORRUPTIONS:
            raise unknown_name_error("corruption", name, ["all", *CORRUPTIONS])
    levels = tuple(dict.fromkeys(part.strip() for part in severities.split(",")))
    if not all(level in map(str, SEVERITIES) for level in levels):
        raise UsageError(f"severities are numbers from 1 to 5 separated by commas, such as 1,3,5, not {severities!r}.")
    return CorruptionChoice(names, tuple(sorted(map(int, levels))), seed)
