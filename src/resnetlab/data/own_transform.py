"""A function of the user's own that changes training images, seeded for every image: a run stays a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnetlab.errors import UsageError
from resnetlab.preprocessing import pil_to_tensor, tensor_to_pil

Transform = Callable[[Any], Any]  # of a Pillow image, or an array


def name_transform(transform: Transform) -> str:
    """The name by which a recipe records a function, or the class of a callable object."""
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class TransformedReader:
    """Reads a training image, and changes it by the user's function.

    Attributes:
        read: gives the image, uint8 (h, w, C), for its index and random numbers.
        transform: a Pillow image (L or RGB) -> one of the same size, or an array or tensor (h, w, C), uint8. Of values as
            stored (`preprocessing.PixelFormat`) it gets and gives an array, float32 (h, w, C).
    """

    read: Callable[..., Tensor]
    transform: Transform

    def __call__(self, index: int, *draws: list[float]) -> Tensor:
        """The changed image; `draws` ends with one random number for it.

        The generators of random, NumPy and torch are seeded for the call and get their state back. Raises UsageError if the
        function fails or gives something else.
        """
        pixels, seed = self.read(index, *draws[:-1]), int(draws[-1][0] * 2**32)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            changed = self.transform(pixels.numpy().copy() if pixels.is_floating_point() else tensor_to_pil(pixels))
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"transform {name_transform(self.transform)} failed on an image: {error!r}.") from error
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])
        if isinstance(changed, Image.Image):
            changed = pil_to_tensor(changed.convert("L" if pixels.shape[-1] == 1 else "RGB"))
        result = changed if isinstance(changed, Tensor) else torch.from_numpy(np.array(changed))
        if result.shape != pixels.shape or result.dtype != pixels.dtype:
            taken = "an array" if pixels.is_floating_point() else "a Pillow image"
            raise UsageError(
                f"transform {name_transform(self.transform)} takes {taken} of the network's size and gives one of the "
                f"same size, or {str(pixels.dtype)[6:]} {tuple(pixels.shape)}; it gave {result.dtype} {tuple(result.shape)}."
            )
        return result
