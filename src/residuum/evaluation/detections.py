"""What a detector says of the pictures of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from residuum.data.annotated import Annotated
from residuum.errors import DataError
from residuum.evaluation.boxes import Found
from residuum.models.values import Additions
from residuum.runtime import Engine, evaluating, to_device


def find(
    net: nn.Module,
    pictures: Sequence[Annotated],
    engine: Engine,
    testing: Additions,
    on_bad: str,
    skipped: dict[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Annotated], list[Found]]:
    """The pictures that can be read, and what is found in each; one that cannot is noted in `skipped`.

    Raises DataError where it is to stop the work instead.
    """
    readable, found = [], []
    for i, picture in enumerate(pictures, 1):
        try:
            pixels = picture.pixels()
        except DataError as error:
            if on_bad == "stop":
                raise
            skipped[picture.name] = str(error)
            continue
        readable.append(picture)
        found.append(find_in(net, pixels, engine, testing))
        progress(i, len(pictures))
    return readable, found


def find_in(net: nn.Module, pixels: Tensor, engine: Engine, testing: Additions) -> Found:
    """What is found in one picture, uint8 (H, W, 3)."""
    from residuum.models.testing import detect

    with evaluating(net), engine.autocast():
        picture = to_device(pixels, engine).permute(2, 0, 1) / 255
        boxes, scores, labels = detect(net, picture, testing)
    best = scores.argsort(descending=True, stable=True)
    return Found(boxes[best].float().cpu(), scores[best].float().cpu(), labels[best].cpu() - 1)
