"""The models that a service can have, a class a task: each says how a picture is made ready, shown, and put into words.

classify   the classes with the highest scores, and why
detect     boxes in pixels of the picture that was sent
segment    the share of each class, and which pixel shows which, as a PNG
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from residuum.errors import UsageError
from residuum.evaluation.boxes import Found
from residuum.evaluation.detections import find_in
from residuum.evaluation.drawing import COLOURS
from residuum.evaluation.masks import segment
from residuum.models.accounting import parameters
from residuum.models.dense_file import DenseBundle, task_of
from residuum.models.spec import Specification
from residuum.models.values import Additions, Segmenter
from residuum.runtime import Engine
from residuum.use import dense, predict
from residuum.use.explain import explain
from residuum.use.predict import Model, best

TINT = 130  # opacity of a class on the picture, of 255


class Answering(Protocol):
    """A model, as a service asks it. What `prepare` gives goes through `show` and, with what that gives, through `said`."""

    @property
    def model(self) -> Model | DenseBundle: ...

    @property
    def batches(self) -> Sequence[int]:
        """Sizes of batches of which the first is slow to show."""

    @property
    def unexplained(self) -> str | None:
        """Why the model explains nothing, as a sentence; None where it does."""

    def prepare(self, picture: Image.Image) -> Any:
        """An upright picture made ready, in one of many threads."""

    def show(self, pictures: Sequence[Any]) -> Sequence[Any]:
        """What the network says of each, in a thread of its own."""

    def said(self, picture: Any, answer: Any, top: int | None, least: float | None) -> dict[str, Any]:
        """The answer in words; keys as in docs/json.md.

        Args:
            top: how many classes or boxes to name, the best first; None for as many as the task usually does.
            least: score or share of what is named; None for what the task usually takes.
        """

    def explain(self, picture: Any, top: int | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Why the network says so; only asked where `unexplained` is None."""

    def about(self) -> dict[str, Any]:
        """What there is to know of the model."""


def load(name: str, engine: str, precision: str, device: str, pictures: Sequence[Path] = ()) -> tuple[Answering, str]:
    """The model of a file or a publisher's name, of whatever task, and one line on what computes its answers.

    Args:
        engine: as `use.engines.choose` has it for classifiers; torch computes the others.
        precision: likewise; the others are in fp32 unless bf16 is asked for, which would round boxes to whole pixels.
        pictures: a classifier's engine is held to torch on every second one, and int8 is calibrated on the others.

    Raises:
        ModelFileError, UsageError
    """
    task = task_of(Path(name))
    if task == "classify":
        model = predict.load(name, device=device)
        return Classifies(model), model.choose(engine, precision, pictures[::2], pictures[1::2])
    if engine not in ("auto", "torch") or precision == "int8" or pictures:
        raise UsageError(
            f"a model that can {task} is computed by torch in fp32 or bf16: no other --engine, no --pictures."
        )
    kinds: dict[str, type[Detects | Segments]] = {"detect": Detects, "segment": Segments}
    answering = kinds[task](*dense.load(Path(name), task, "fp32" if precision == "auto" else precision, device))
    return answering, f"torch on {answering.computes}"


class Classifies:
    """A classifier.

    Args:
        scores: uint8 (B, h, w, C) -> float32 (B, classes); the model's own by default.
    """

    unexplained = None
    batches = (1, 16)

    def __init__(self, model: Model, scores: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self._scores = model, scores or model.scores
        self.prepare = model.preprocessing

    def show(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        return list(self._scores(torch.stack(list(pictures))))

    def said(self, picture: Tensor, answer: Tensor, top: int | None, least: float | None) -> dict[str, Any]:
        named = best(self.model.classes, answer, top or 5)
        return {"top": [{"class": name, "score": score} for name, score in named if score >= (least or 0)]}

    def explain(self, picture: Tensor, top: int | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        found = explain(self.model, picture, top=top or 5, progress=progress)
        return {**found.to_json(), "heat": _data_uri(found.overlay)}

    def about(self) -> dict[str, Any]:
        model = self.model
        return _about("classify", model, model.spec) | {
            "temperature": model.temperature,
            "calibrated": bool(model.calibration),
            "preprocessing": model.preprocessing.to_json(),
            "engine": model.computes,
        }


class Picture(NamedTuple):
    """A picture for a detector or segmenter, uint8 (h, w, 3), and (width, height) of the one that was sent."""

    pixels: Tensor
    size: tuple[int, int]


class _Dense:
    """What detectors and segmenters share."""

    task: str
    unexplained: str | None
    batches = (1,)  # one picture at a time, in any batch

    def __init__(self, model: DenseBundle, engine: Engine) -> None:
        self.model, self._engine, self.computes = model, engine, str(engine)

    def prepare(self, picture: Image.Image) -> Picture:
        """A picture more than twice as large as the network looks at is reduced to that, so that many fit into memory."""
        sent, most = picture.size, 2 * self.model.values.longest
        whole = picture.convert("RGB")
        whole.thumbnail((most, most), Image.Resampling.BILINEAR)
        return Picture(dense.as_pixels(whole), sent)

    def explain(self, picture: Picture, top: int | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
        raise NotImplementedError(self.unexplained)

    def about(self) -> dict[str, Any]:
        classes = range(len(self.model.classes))
        return _about(self.task, self.model, self.model.spec) | {
            "values": self.model.values.to_json(),
            "colours": [self._colour(i) for i in classes],
            "engine": self.computes,
        }

    def _colour(self, label: int) -> str:
        return COLOURS[label % len(COLOURS)]


class Detects(_Dense):
    """A detector."""

    task = "detect"
    unexplained = "a detector's boxes are not explained; only a classifier's answer is."
    LEAST = 0.5  # score of a box, where nothing is asked

    def show(self, pictures: Sequence[Picture]) -> list[Found]:
        """Boxes in the pixels of the pictures that were sent."""
        return [self._found(picture) for picture in pictures]

    def _found(self, picture: Picture) -> Found:
        found = find_in(self.model.net, picture.pixels, self._engine, Additions())
        (width, height), (h, w) = picture.size, picture.pixels.shape[:2]
        return found._replace(boxes=found.boxes * torch.tensor([width / w, height / h] * 2))

    def said(self, picture: Picture, answer: Found, top: int | None, least: float | None) -> dict[str, Any]:
        found = dense.listed(answer.at_least(self.LEAST if least is None else least), self.model.classes)
        return _size(picture) | {"boxes": found[:top]}


class Segments(_Dense):
    """A segmenter."""

    task = "segment"
    unexplained = "a segmenter's masks are not explained; only a classifier's answer is."

    def show(self, pictures: Sequence[Picture]) -> list[tuple[list[dict[str, Any]], str]]:
        """The share of each class, the largest first, and the mask drawn."""
        return [self._shown(picture) for picture in pictures]

    def _shown(self, picture: Picture) -> tuple[list[dict[str, Any]], str]:
        mask = segment(self.model.net, picture.pixels, cast(Segmenter, self.model.values), self._engine)
        rows = sorted(dense.shares(mask, self.model.classes), key=lambda row: -row["share"])
        return rows, self._drawn(mask)

    def said(self, picture: Picture, answer: Any, top: int | None, least: float | None) -> dict[str, Any]:
        rows, mask = answer
        named = [row for row in rows if row["share"] >= (least or 0)]
        return _size(picture) | {"classes": named[:top], "mask": mask}

    def _drawn(self, mask: Tensor) -> str:
        """The mask as a PNG of so many colours, a pixel's value being its class; the background cannot be seen."""
        drawn = Image.fromarray(mask.numpy().astype(np.uint8))
        drawn.putpalette([int(self._colour(i)[k : k + 2], 16) for i in range(256) for k in (1, 3, 5)])
        return _data_uri(drawn, transparency=bytes([0] + 255 * [TINT]))

    def _colour(self, label: int) -> str:
        """As `evaluation.drawing.mask_on` has it: the first colour is the first class's after the background."""
        return super()._colour(label - 1)


def _about(task: str, model: Model | DenseBundle, spec: Specification) -> dict[str, Any]:
    depth = f"{spec.block} blocks {'-'.join(map(str, spec.depths))}, {spec.order}, shortcut {spec.shortcut}"
    return {
        "task": task,
        "net": depth,
        "classes": list(model.classes),
        "parameters": parameters(model.net),
        "metrics": dict(model.metrics),
        "data": dict(model.data),
        "versions": dict(model.versions),
    }


def _size(picture: Picture) -> dict[str, int]:
    return {"width": picture.size[0], "height": picture.size[1]}


def _data_uri(picture: Image.Image, **values: Any) -> str:
    png = io.BytesIO()
    picture.save(png, "PNG", **values)
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
