"""Hendrycks & Dietterich's corruptions a second time, pixel by pixel from the authors' formulas, for small square images.

x is (n, n, 3), float64 in [0, 1], c the parameters of a severity, `draw` the random numbers, drawn in the authors' order.
The result is not clipped. Frost is left out: the authors' is a set of photographs.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import ndimage

Array = Any


def impulse_noise(x: Array, c: float, draw: Generator) -> Array:
    flipped, salted, y = draw.random(x.shape) <= c, draw.random(x.shape) <= 0.5, x.copy()
    y[flipped & salted], y[flipped & ~salted] = 1, 0
    return y


def defocus_blur(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    radius, sigma = c
    reach, width = (8, 3) if radius <= 8 else (int(radius), 5)
    disk = np.array(
        [[float(i * i + j * j <= radius**2) for i in range(-reach, reach + 1)] for j in range(-reach, reach + 1)]
    )
    taps = np.array([math.exp(-((i - width // 2) ** 2) / (2 * sigma**2)) for i in range(width)])
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(taps, taps) / taps.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[:, :, i], kernel, mode="mirror") for i in range(3)], 2)


def glass_blur(x: Array, c: tuple[float, int, int], draw: Generator) -> Array:
    sigma, reach, rounds = c
    n = len(x)
    y = (blur(x, sigma) * 255).astype(np.uint8)
    for _ in range(rounds):
        shifts = iter(draw.integers(-reach, reach, (n - 2 * reach, n - 2 * reach, 2)).reshape(-1, 2))
        for row in range(n - reach, reach, -1):
            for column in range(n - reach, reach, -1):
                dx, dy = next(shifts)
                y[row, column] = y[row + dy, column + dx]  # the authors' exchange of two views copies one way only
    return blur(y / 255, sigma)


def motion_blur(x: Array, c: tuple[int, float], draw: Generator) -> Array:
    return smear(x, *c, draw.uniform(-45, 45))


def zoom_blur(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    factors = np.arange(1, *c)
    return (x + sum(enlarge(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: Array, c: tuple[float, ...], draw: Generator) -> Array:
    flakes = enlarge(draw.normal(c[0], c[1], x.shape[:2])[:, :, None], c[2])
    flakes[flakes < c[3]] = 0
    flakes = (flakes.clip(0, 1) * 255).astype(np.uint8) / 255
    flakes = (smear(flakes, int(c[4]), c[5], draw.uniform(-135, -45)) * 255).astype(np.uint8) / 255
    grey = (0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2])[:, :, None]
    return c[6] * x + (1 - c[6]) * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


def fog(x: Array, c: tuple[float, float], draw: Generator) -> Array:
    n = 1 << (len(x) - 1).bit_length()
    heights, step, wobble = np.zeros((n, n)), n, 100.0
    while step >= 2:
        half, cells = step // 2, range(0, n, step)
        for dy, dx, corners in (  # the middle of each square, then of its upper and its left edge
            (half, half, ((-half, -half), (-half, half), (half, -half), (half, half))),
            (0, half, ((-half, 0), (half, 0), (0, -half), (0, half))),
            (half, 0, ((-half, 0), (half, 0), (0, -half), (0, half))),
        ):
            noise = wobble * draw.uniform(-wobble, wobble, (len(cells), len(cells)))
            for i, top in enumerate(cells):
                for j, left in enumerate(cells):
                    around = [heights[(top + dy + y) % n, (left + dx + x_) % n] for y, x_ in corners]
                    heights[top + dy, left + dx] = sum(around) / 4 + noise[i, j]
        step, wobble = half, wobble / c[1]
    heights = (heights - heights.min()) / (heights.max() - heights.min())
    return (x + c[0] * heights[: len(x), : len(x), None]) * x.max() / (x.max() + c[0])


def brightness(x: Array, c: float, draw: Generator) -> Array:
    def one(pixel: Array) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))

    return np.array([[one(pixel) for pixel in row] for row in x])


def elastic_transform(x: Array, c: tuple[float, float, float], draw: Generator) -> Array:
    n = len(x)
    strength, sigma, shift = (value * (n if n <= 64 else 244 * n / 224) for value in c)
    middle, third = n // 2, n // 3
    before = np.array([[middle + third] * 2, [middle + third, middle - third], [middle - third] * 2], float)
    after = before + draw.uniform(-shift, shift, (3, 2))
    dx, dy = (ndimage.gaussian_filter(draw.uniform(-1, 1, (n, n)), sigma, mode="reflect", truncate=3) for _ in range(2))
    system = np.column_stack([after[:, ::-1], np.ones(3)])  # (row, column, 1) of the result -> (row, column) of x
    matrix = np.linalg.inv(system) @ before[:, ::-1]
    moved = [ndimage.affine_transform(x[:, :, i], matrix[:2].T, matrix[2], order=1, mode="mirror") for i in range(3)]
    rows, columns = np.mgrid[:n, :n]
    places = [rows + strength * dy, columns + strength * dx]
    return np.stack([ndimage.map_coordinates(part, places, order=1, mode="reflect") for part in moved], 2)


FORMULAS: dict[str, Callable[[Array, Any, Generator], Array]] = {
    "gaussian_noise": lambda x, c, draw: x + draw.normal(0, c, x.shape),
    "shot_noise": lambda x, c, draw: draw.poisson(x * c) / c,
    "contrast": lambda x, c, draw: c * x + (1 - c) * x.mean((0, 1)),
} | {
    function.__name__: function
    for function in (impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog, brightness, elastic_transform)
}  # fmt: skip


def blur(x: Array, sigma: float) -> Array:
    return np.stack(
        [ndimage.gaussian_filter(x[:, :, i], sigma, mode="nearest", truncate=4) for i in range(x.shape[2])], 2
    )


def smear(x: Array, radius: int, sigma: float, angle: float) -> Array:
    """ImageMagick's motion blur: half a Gaussian along a line; the border's pixels go on outside."""
    weights = [math.exp(-(k * k) / (2 * sigma**2)) for k in range(2 * radius + 1)]
    y, direction = np.zeros_like(x), math.radians(angle)
    for k, weight in enumerate(weights):
        dy, dx = math.ceil(k * math.sin(direction) - 0.5), math.ceil(k * math.cos(direction) - 0.5)
        y += weight / sum(weights) * ndimage.shift(x, (-dy, -dx, 0), order=0, mode="nearest")
    return y


def enlarge(x: Array, factor: float) -> Array:
    """The middle of an image, linearly interpolated between its corner pixels to `factor` times its size, cut to n."""
    n = len(x)
    part = math.ceil(n / factor)
    top, large = (n - part) // 2, round(part * factor)
    places = np.linspace(0, part - 1, large)[(large - n) // 2 :][:n]
    low = np.minimum(places.astype(int), part - 2)
    share = (places - low)[:, None, None]
    y = x[top : top + part, top : top + part]
    y = y[low] * (1 - share) + y[low + 1] * share
    return y[:, low] * (1 - share[:, 0]) + y[:, low + 1] * share[:, 0]
