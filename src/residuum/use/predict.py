"""Top-k classes of pictures."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from residuum.data.decode import decode, upright
from residuum.errors import DataError, UsageError
from residuum.models.bundle import Bundle
from residuum.runtime import Engine, evaluating, pick_engine, to_device
from residuum.use.download import model_of
from residuum.use.engines import Chosen, check_names, choose

Picture = str | Path | bytes | Image.Image
BATCH = 64  # pictures that go through the engine together
AHEAD = 2 * BATCH  # pictures that are decoded, or about to be, while it computes


@dataclass(frozen=True)
class Prediction:
    """What the model says of one picture: the classes with the highest scores, best first; or why it cannot."""

    name: str
    top: tuple[tuple[str, float], ...] = ()  # (class, score); scores are softmax probabilities
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        return {"image": self.name, "top": [{"class": name, "score": score} for name, score in self.top]}


class Model(Bundle):
    """A model file ready for use: network, classes, preprocessing, and `predict`."""

    engine: Engine
    chosen: Chosen | None = None  # another engine than the network itself

    def choose(
        self, engine: str, precision: str = "auto", pictures: Sequence[Picture] = (), calibrate: Sequence[Picture] = ()
    ) -> str:
        """Takes an engine for all that follows, and says which one and why; see `use.engines.choose`, whose errors it raises.

        On a GPU it is torch, which raises UsageError where another, or int8, is asked for.

        Args:
            pictures: engines are held to what torch says of these where the model file has no check pictures.
            calibrate: int8 is calibrated on these instead of the model file's training pictures.
        """
        if self.engine.device.type != "cpu":
            check_names(engine, precision)
            if engine not in ("auto", "torch"):
                raise UsageError(f"{engine} computes on the CPU here; take --engine torch, or --device cpu.")
            if precision == "int8":
                raise UsageError("torch computes in bf16 or fp32 here, not in int8; --device cpu has engines that do.")
            self.engine = pick_engine(precision, str(self.engine.device))
            return str(self.engine)
        check = None if self.samples else self._pixels(pictures)
        self.chosen = choose(self, engine, precision, check=check, training=self._pixels(calibrate), keep=True)
        return str(self.chosen)

    @property
    def computes(self) -> str:
        """What computes the scores, in a few words."""
        return str(self.engine) if self.chosen is None else f"{self.chosen.name} {self.chosen.precision}"

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor | None:
        """Those that can be read, uint8 (n, h, w, C); None where there is none."""
        readable = [x for picture in pictures if isinstance(x := self._input(picture), Tensor)]
        return torch.stack(readable) if readable else None

    def predict(self, picture: Picture, *, top: int = 5) -> Prediction:
        """The `top` best classes of one picture.

        Args:
            picture: a path, an encoded picture's bytes, or a PIL picture of any mode and size.

        Raises:
            DataError: the picture is missing, damaged or none.
            UsageError: it is of no such type.
        """
        prediction = next(self.predictions([picture], top=top))
        if prediction.error is not None:
            raise DataError(prediction.error)
        return prediction

    def predictions(self, pictures: Iterable[Picture], *, top: int = 5) -> Iterator[Prediction]:
        """Predicts pictures one after another, in batches; one that cannot be read becomes a prediction with its error."""
        return self.named_predictions(((_name(picture), picture) for picture in pictures), top=top)

    def named_predictions(
        self, pictures: Iterable[tuple[str, Picture | DataError]], *, top: int = 5
    ) -> Iterator[Prediction]:
        """As `predictions`, of pictures with names; in the place of one that is known to be unreadable stands its error.

        Threads decode ahead while the engine computes. However many there are, no more than AHEAD + BATCH are held.
        """
        if top < 1:
            raise UsageError(f"top must be 1 or more, not {top}.")
        ready = self._decoded(pictures)
        while group := list(islice(ready, BATCH)):
            readable = [x for _, x in group if isinstance(x, Tensor)]
            scores = iter(self.scores(torch.stack(readable)) if readable else ())
            for name, x in group:
                yield Prediction(name, error=x) if isinstance(x, str) else self._best(name, next(scores), top)

    def scores(self, pixels: Tensor) -> Tensor:
        """Softmax scores, float32 (B, classes), of pictures already resized and cropped, uint8 (B, h, w, C)."""
        if self.chosen is not None:
            return self.chosen.answer(pixels)
        with evaluating(self.net), self.engine.autocast():
            logits = self.net(self.preprocessing.normalise(to_device(pixels, self.engine)))
        return torch.softmax(logits.float().cpu() / self.temperature, 1)

    def _decoded(self, pictures: Iterable[tuple[str, Picture | DataError]]) -> Iterator[tuple[str, Tensor | str]]:
        """(name, uint8 (h, w, C) or why not) of every picture, in order."""
        coming, waiting = iter(pictures), deque[tuple[str, Future[Tensor | str]]]()
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            for name, picture in islice(coming, AHEAD):
                waiting.append((name, pool.submit(self._input, picture)))
            while waiting:
                name, future = waiting.popleft()
                for following, picture in islice(coming, 1):
                    waiting.append((following, pool.submit(self._input, picture)))
                yield name, future.result()
        finally:  # also where nobody wants the rest
            pool.shutdown(cancel_futures=True)

    def _input(self, picture: Picture | DataError) -> Tensor | str:
        """uint8 (h, w, C), or why it cannot be read."""
        try:
            if isinstance(picture, DataError):
                return str(picture)
            if isinstance(picture, Image.Image):
                return self.preprocessing(upright(picture))
            if not isinstance(picture, Picture):
                raise UsageError(
                    f"a picture is a path, the bytes of a file, or a Pillow picture, not {type(picture).__name__}; "
                    "PIL.Image.fromarray makes one of an array."
                )
            return self.preprocessing(decode(Path(picture) if isinstance(picture, str) else picture))
        except DataError as error:
            return str(error)

    def _best(self, name: str, scores: Tensor, top: int) -> Prediction:
        return Prediction(name, best(self.classes, scores, top))


def best(classes: Sequence[str], scores: Tensor, top: int) -> tuple[tuple[str, float], ...]:
    """The `top` classes with the highest scores (classes,), best first."""
    values, places = scores.topk(min(top, len(classes)))
    return tuple((classes[i], round(v, 6)) for i, v in zip(places.tolist(), values.tolist(), strict=True))


def _name(picture: Picture) -> str:
    return str(picture) if isinstance(picture, str | Path) else "picture"


def load(path: str | Path, *, precision: str = "fp32", device: str = "auto") -> Model:
    """Loads a model for use.

    Args:
        path: a model file, or a publisher's name: "torchvision:resnet50.IMAGENET1K_V2", "timm:resnet50.a1_in1k",
            "hf:OWNER/REPOSITORY"; those are downloaded.
        precision: "fp32", "bf16" or "auto".

    Returns:
        Network, classes and preprocessing, with `predict` (one picture), `predictions` (many) and `scores` (uint8 (B, h, w, C)
        -> softmax scores (B, classes)).

    Raises:
        ModelFileError: the file is missing, damaged, foreign, or a folder; or there is no network to download by.
        UsageError: the publisher has no such model.
    """
    bundle = model_of(path)
    model = Model(**{name: getattr(bundle, name) for name in Bundle.__dataclass_fields__})
    model.engine = pick_engine(precision, device)
    model.engine.place(model.net)
    return model
