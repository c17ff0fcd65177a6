"""Top-k classes of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from residuum.data.decode import decode
from residuum.errors import DataError, UsageError
from residuum.models.bundle import Bundle, load_bundle
from residuum.runtime import Engine, evaluating, pick_engine, to_device
from residuum.use.download import download, scheme_of

Picture = str | Path | bytes | Image.Image
BATCH = 64


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

    def predict(self, picture: Picture, *, top: int = 5) -> Prediction:
        """The `top` best classes of one picture.

        Args:
            picture: a path, an encoded picture's bytes, or a PIL picture of any mode and size.

        Raises:
            DataError: the picture is missing, damaged or none.
        """
        prediction = next(self.predictions([picture], top=top))
        if prediction.error is not None:
            raise DataError(prediction.error)
        return prediction

    def predictions(self, pictures: Iterable[Picture], *, top: int = 5) -> Iterator[Prediction]:
        """Predicts pictures one after another, in batches; one that cannot be read becomes a prediction with its error."""
        if top < 1:
            raise UsageError(f"top must be 1 or more, not {top}.")
        iterator = iter(pictures)
        while group := list(islice(iterator, BATCH)):
            inputs = [self._input(picture) for picture in group]
            readable = [x for x in inputs if isinstance(x, Tensor)]
            scores = iter(self.scores(torch.stack(readable)) if readable else ())
            for picture, x in zip(group, inputs, strict=True):
                name = _name(picture)
                yield Prediction(name, error=x) if isinstance(x, str) else self._best(name, next(scores), top)

    def scores(self, pixels: Tensor) -> Tensor:
        """Softmax scores, float32 (B, classes), of pictures already resized and cropped, uint8 (B, h, w, C)."""
        with evaluating(self.net), self.engine.autocast():
            logits = self.net(self.preprocessing.normalise(to_device(pixels, self.engine)))
        return torch.softmax(logits.float().cpu() / self.temperature, 1)

    def _input(self, picture: Picture) -> Tensor | str:
        try:
            decoded = (
                picture
                if isinstance(picture, Image.Image)
                else decode(Path(picture) if isinstance(picture, str) else picture)
            )
        except DataError as error:
            return str(error)
        return self.preprocessing(decoded)

    def _best(self, name: str, scores: Tensor, top: int) -> Prediction:
        values, places = scores.topk(min(top, len(self.classes)))
        return Prediction(
            name, tuple((self.classes[i], round(v, 6)) for i, v in zip(places.tolist(), values.tolist(), strict=True))
        )


def _name(picture: Picture) -> str:
    return str(picture) if isinstance(picture, str | Path) else "picture"


def load(path: str | Path, *, precision: str = "fp32", device: str = "auto") -> Model:
    """Loads a model for use.

    Args:
        path: a model file, or a publisher's name: "torchvision:resnet50.IMAGENET1K_V2", "timm:resnet50.a1_in1k",
            "hf:OWNER/REPOSITORY"; those are downloaded.
        precision: "fp32", "bf16" or "auto".

    Raises:
        ModelFileError: the file is missing, damaged, foreign, or a folder; or there is no network to download by.
        UsageError: the publisher has no such model.
    """
    bundle = download(str(path)) if scheme_of(str(path)) else load_bundle(Path(path))
    model = Model(**{name: getattr(bundle, name) for name in Bundle.__dataclass_fields__})
    model.engine = pick_engine(precision, device)
    model.engine.place(model.net)
    return model
