"""A loaded model: predicts the top classes of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from resnetlab.device import DeviceConfig, count_cores, map_in_order, select_device, standard_torch_state
from resnetlab.errors import AnsweredAttributes, DataError, ModelFileError, UsageError, public, unknown_name_error
from resnetlab.evaluation.calibration import NONE
from resnetlab.evaluation.protocols import Protocol, parse_protocol
from resnetlab.evaluation.scores import Member, score_images
from resnetlab.formatting import html_table
from resnetlab.inference.backends import BackendRequest, LoadedBackend, load_network, select_backend
from resnetlab.inference.classes import ClassScore, top_classes
from resnetlab.inference.download import load_or_download
from resnetlab.inference.images import (
    ImageInput,
    NamedImage,
    decode_input,
    expand_images,
    get_name,
    is_many,
    read_input,
)
from resnetlab.inference.outputs import FEATURES, SCORES
from resnetlab.models.fold import fold_batchnorm
from resnetlab.models.model_file import TrainedModel
from resnetlab.out_of_memory import compute_in_parts
from resnetlab.peer_words import MODEL_ATTRIBUTES, PREDICTION_ATTRIBUTES

if TYPE_CHECKING:
    from PIL import Image

    from resnetlab.evaluation.evaluate import Evaluation
    from resnetlab.inference.explain import Explanation

UNSURE = "unsure"  # where no class reaches the least score that was asked for
PREDICTION_COLUMNS = ("image", "rank", "class", "score", "error")  # of tables
BATCH = 64  # images per batch
PREFETCH = 2 * BATCH  # images that are decoded ahead
VIEWED = 4  # whole images that are in memory for a protocol


@dataclass(frozen=True, repr=False)
class Prediction(AnsweredAttributes):
    """The classes with the highest scores for one image, best first; or why it cannot be read.

    `prediction[0].label` and `prediction.label` are the best class; `prediction.label` is "none of these" where its score is
    below the model's `none_below`. Of a model that gives several classes `labels` are those over their thresholds, and
    `prediction.label` is "none of these" where there is none.
    """

    name: str
    top: tuple[ClassScore, ...] = ()  # scores are softmax probabilities, or sigmoids
    error: str | None = None
    is_none: bool = False
    labels: tuple[str, ...] | None = None  # of a model that gives several classes; None for others
    attribute_answers = PREDICTION_ATTRIBUTES

    def __getitem__(self, rank: int) -> ClassScore:
        return self.top[rank]

    def __len__(self) -> int:
        return len(self.top)

    @property
    def label(self) -> str:
        """The best class, or "none of these"; raises DataError if the image could not be read."""
        return NONE if self.is_none else self._best.label

    @property
    def score(self) -> float:
        """The score of the best class; raises DataError if the image could not be read."""
        return self._best.score

    @property
    def _best(self) -> ClassScore:
        if self.error is not None:
            raise DataError(self.error)
        return self.top[0]

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; keys as in docs/json.md."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        top = [{"class": name, "score": score} for name, score in self.top]
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        return {"image": self.name, "top": top} | labels | ({"none_of_these": True} if self.is_none else {})

    to_dict = to_json

    def to_rows(self) -> list[tuple[str, int | str, str, float | str, str]]:
        """Rows of image, rank, class, score and error, "" where there is none.

        A row of rank 0 says "none of these", "unsure" where no class is left, or of several classes which are over their
        thresholds, "cat;dog".
        """
        if self.error is not None:
            return [(self.name, "", "", "", self.error)]
        none: list[tuple[str, int | str, str, float | str, str]] = (
            [(self.name, 0, NONE if self.is_none else ";".join(self.labels or (UNSURE,)), "", "")]
            if self.is_none or self.labels or not self.top
            else []
        )
        return none + [(self.name, rank, each.label, each.score, "") for rank, each in enumerate(self.top, 1)]

    def describe(self) -> str:
        """The classes and scores, or the error, in one line."""
        labels = [NONE] * self.is_none + ([f"[{'; '.join(self.labels)}]"] if self.labels else [])
        return self.error or "  ".join(labels + [str(each) for each in self.top]) or UNSURE

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row for each class. Raises UsageError without pandas."""
        return Predictions([self]).to_pandas()

    def __repr__(self) -> str:
        return f"Prediction({self.name}: {self.describe()})"

    def _repr_html_(self) -> str:
        return Predictions([self])._repr_html_()


class Predictions(list[Prediction]):
    """The predictions for several images, in their order."""

    def to_dict(self) -> list[dict[str, Any]]:
        """A list of JSON dictionaries."""
        return [prediction.to_json() for prediction in self]

    def to_pandas(self) -> Any:
        """A pandas DataFrame, a row for each image and class. Raises UsageError without pandas."""
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise UsageError("to_pandas needs the package pandas; to_dict gives the same without it.") from error
        return pandas.DataFrame([row for each in self for row in each.to_rows()], columns=PREDICTION_COLUMNS)

    def _repr_html_(self) -> str:
        """The first of them as a table for notebooks."""
        rows = [(each.name, each.describe()) for each in self[:20]]
        rest = f"<p>and {len(self) - 20:,} more</p>" if len(self) > 20 else ""
        return html_table(("image", "classes and scores"), rows) + rest


@dataclass(eq=False, repr=False)
class Model(AnsweredAttributes, TrainedModel):
    """A model ready for prediction: network, classes, preprocessing, and `predict`, which `model(image)` is too.

    Where it takes an image, that is a path, an address, the bytes of a file, an open file, a Pillow image, a NumPy array
    (H, W, C) or a tensor (C, H, W); several are a list, a folder, a pattern such as "photos/*.jpg", or a 4-D array.

    Attributes:
        device_config: device and precision of the network.
        backend: computes the scores; the network itself until `select_backend` is called.
        feature_backend: computes the features if `select_backend` was called for them; else torch does.
    """

    device_config: DeviceConfig = field(kw_only=True)
    backend: LoadedBackend = field(init=False)
    feature_backend: LoadedBackend | None = field(init=False, default=None)
    _requests: dict[str, BackendRequest] = field(init=False, default_factory=dict)
    attribute_answers = MODEL_ATTRIBUTES

    def __post_init__(self) -> None:
        self.device_config.place(self.net)
        self._requests, self.backend, self.feature_backend = {}, load_network(self, self.device_config), None

    def __getstate__(self) -> dict[str, Any]:
        """Without the backends' programs, which belong to the process; the copy starts its own (Ray, Spark, Dask)."""
        return vars(self) | {"backend": None, "feature_backend": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend = load_network(self, self.device_config)
        for request in self._requests.values():
            self._start_backend(request)

    @standard_torch_state()
    def select_backend(
        self,
        backend: str,
        precision: str = "auto",
        images: Sequence[ImageInput] = (),
        calibrate: Sequence[ImageInput] = (),
        num_images: int | None = None,
        output: str = SCORES.name,
    ) -> str:
        """Selects the backend for all following predictions; returns which one and why. See `backends.select_backend`.

        Args:
            images: backends are compared with torch on these if the model file has no reference images.
            calibrate: int8 is calibrated on these instead of the model file's training images.
            num_images: how many images will be predicted, if known.
            output: "scores", or "features" for what `embed` computes, which is selected by itself.
        """
        request = BackendRequest(
            backend=backend,
            precision=precision,
            check_images=None if self.reference_images else self._read_images(images),
            calibration_images=self._read_images(calibrate),
            num_images=num_images,
            use_cache=True,
            output=output,
        )
        selected = self._start_backend(request)
        # a copy of the model takes the same one, whatever is fastest where it is
        self._requests = self._requests | {
            output: replace(request, backend=selected.name, precision=selected.precision)
        }
        return str(selected)

    def _start_backend(self, request: BackendRequest) -> LoadedBackend:
        selected = select_backend(self, request, self.device_config.device)
        if request.output == FEATURES.name:
            self.feature_backend = selected
        else:
            self.backend = selected
        return selected

    @property
    def default_top(self) -> int:
        """How many classes a prediction names: all of a model that gives several, otherwise five."""
        return len(self.classes) if self.multi_label else 5

    @property
    def backend_name(self) -> str:
        """What computes the scores, such as "openvino bf16"."""
        return f"{self.backend.name} {self.backend.precision}"

    def keep_classes(self, names: Sequence[str]) -> None:
        """Removes all other classes from the head, so that scores are over these alone.

        Raises UsageError for a name that is not one of the classes, or fewer than two of them.
        """
        names = tuple(dict.fromkeys(names))
        if unknown := [name for name in names if name not in self.classes]:
            raise unknown_name_error("class of the model", unknown[0], self.classes)
        if len(names) < 2:
            raise UsageError(f"two classes or more can compete, not {len(names)}; give more names.")
        net = self.resnet
        rows = torch.tensor([self.classes.index(name) for name in names], device=net.fc.weight.device)
        head = nn.Linear(net.fc.in_features, len(names), device="meta")
        head.weight, head.bias = nn.Parameter(net.fc.weight[rows]), nn.Parameter(net.fc.bias[rows])
        if self.multi_label:
            self.thresholds = tuple(self.thresholds[i] for i in rows.tolist())
        net.fc, net.spec, self.classes = head, replace(net.spec, classes=len(names)), names
        self.calibration = {k: v for k, v in self.calibration.items() if not k.startswith("none_")}  # of other scores
        self.reference_images = None
        self.__post_init__()

    def _read_images(self, images: Sequence[ImageInput]) -> Tensor | None:
        """The readable images (n, h, w, C); None if there is none."""
        pixels = [x for image in images if isinstance(x := self._prepare_input(image, self.preprocessing), Tensor)]
        return torch.stack(pixels) if pixels else None

    @public
    def predict(self, image: Any, *, top: int | None = None, protocol: str | None = None) -> Any:
        """The `top` best classes of an image, five by default: a Prediction; of several images Predictions, a list.

        A model that gives several classes gives all of them by default, and names those over their thresholds.

        Args:
            protocol: average the scores of the views of a test protocol, such as "flip" or "10crop".

        Raises:
            DataError: the image is missing, damaged or not an image; of several, the prediction has the error.
            UsageError: it has another type, or `top` is below 1.
        """
        if is_many(image):
            return Predictions(self.predictions(image, top=top, protocol=protocol))
        return next(self.named_predictions(self._decode_named(image), top=top, protocol=protocol))

    __call__ = predict

    def predictions(self, images: Any, *, top: int | None = None, protocol: str | None = None) -> Iterator[Prediction]:
        """Predicts images in order, in batches; an unreadable one gives a prediction with its error."""
        return self.named_predictions(expand_images(images), top=top, protocol=protocol)

    def named_predictions(
        self,
        images: Iterable[NamedImage],
        *,
        top: int | None = None,
        protocol: str | None = None,
    ) -> Iterator[Prediction]:
        """Like `predictions`, for images with names; an error in place of an image becomes its prediction's error.

        Threads decode ahead while the backend computes. At most PREFETCH + BATCH images are in memory.

        Args:
            protocol: a test protocol, such as "flip" or "10crop" (evaluation.protocols), computed by torch; whole images are
                in memory then, at most VIEWED at a time.
        """
        top = _check_top(self.default_top if top is None else top)
        scores = (
            compute_in_batches(self._decode_ahead(images), lambda pixels: self.predict_scores(torch.stack(pixels)))
            if protocol is None
            else self._score_views(images, parse_protocol(protocol))
        )
        return (self.make_prediction(name, found, top) for name, found in scores)

    def _score_views(self, images: Iterable[NamedImage], protocol: Protocol) -> Iterator[tuple[str, Tensor | str]]:
        member = Member.from_network(
            self.net, self.preprocessing, self.device_config, temperature=self.temperature, multi_label=self.multi_label
        )
        decoded = ((name, self._prepare_input(image, self.preprocessing.to_pixels)) for name, image in images)
        return compute_in_batches(
            decoded, lambda pixels: score_images(member, pixels, protocol, self.device_config), VIEWED
        )

    def make_prediction(self, name: str, scores: Tensor | str, top: int) -> Prediction:
        """The prediction of an image from its scores (classes,), or from the message of its error."""
        if isinstance(scores, str):
            return Prediction(name, error=scores)
        best = top_classes(self.classes, scores, top)
        if self.multi_label:
            labels = tuple(self.over_threshold(scores))
            return Prediction(name, best, is_none=not labels, labels=labels)
        return Prediction(name, best, is_none=best[0].score < self.none_below)

    @standard_torch_state()
    def predict_scores(self, pixels: Tensor) -> Tensor:
        """Softmax scores (sigmoids, of several classes), float32 (B, classes), of cropped images (B, h, w, C)."""
        scores = compute_in_parts(self.backend.predict, pixels, self.device)
        if not bool(scores.isfinite().all()):
            raise ModelFileError("the network's scores are not finite; its weights or preprocessing are not usable.")
        return scores

    @public
    def embed(self, images: Any) -> Tensor:
        """The features of an image, float32 (C,), or of several, (n, C): the last map averaged over its positions.

        Raises DataError: an image is missing, damaged or not an image. UsageError: it has another type, or there is none.
        """
        rows = []
        for _, found in self.embeddings(expand_images(images) if is_many(images) else self._decode_named(images)):
            if isinstance(found, str):
                raise DataError(found)
            rows.append(found)
        if not rows:
            raise UsageError("there is no image to embed; give one or more.")
        return torch.stack(rows) if is_many(images) else rows[0]

    def embeddings(self, images: Iterable[NamedImage]) -> Iterator[tuple[str, Tensor | str]]:
        """The name and the features (C,) of each image, or the message of its error, in order, in batches.

        torch computes them, in the precision of the model, or the backend that `select_backend(…, output="features")` selected.
        """
        backend = self.feature_backend
        if backend is None:
            net = self.device_config.place(FEATURES.end(fold_batchnorm(self.net)))
            backend = load_network(self, self.device_config, net, FEATURES)

        @standard_torch_state()
        def compute(pixels: list[Tensor]) -> Tensor:
            # a copy outside inference mode, so that people can train on them
            return compute_in_parts(backend.predict, torch.stack(pixels), self.device).clone()

        return compute_in_batches(self._decode_ahead(images), compute)

    def _decode_ahead(self, images: Iterable[NamedImage]) -> Iterator[tuple[str, Tensor | str]]:
        """Decodes images in threads: (name, pixels (h, w, C) or an error message) of each, in order."""

        def prepare(named: NamedImage) -> tuple[str, Tensor | str]:
            return named[0], self._prepare_input(named[1], self.preprocessing)

        with ThreadPoolExecutor(min(16, count_cores())) as pool:
            yield from map_in_order(pool, PREFETCH, prepare, images)

    def _decode_named(self, image: ImageInput) -> list[NamedImage]:
        """One image with its name, decoded: it raises what many would have as an error in their place."""
        return [(get_name(image), decode_input(image, self.preprocessing))]

    def _prepare_input(
        self, image: ImageInput | DataError, prepare: Callable[[Image.Image | Tensor], Tensor]
    ) -> Tensor | str:
        """Decodes an image and prepares it: (h, w, C), or the error message."""
        try:
            return prepare(read_input(image, self.preprocessing))
        except (DataError, UsageError) as error:  # of any kind: the other images are still predicted
            return str(error)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.device_config.device

    @property
    def names(self) -> dict[int, str]:
        """The class of each output."""
        return dict(enumerate(self.classes))

    @public
    @standard_torch_state()
    def to(self, device: str | torch.device) -> Self:
        """Moves the model to a device, such as "cuda" or "cpu", where torch predicts until `select_backend` is called.

        Raises UsageError if the device is not available.
        """
        self.device_config = select_device("auto" if self.device_config.precision == "bf16" else "fp32", str(device))
        self.__post_init__()
        return self

    def eval(self) -> Self:
        """Returns the model: it is always in eval mode."""
        return self

    @public
    def evaluate(self, data: str | Path, **options: Any) -> Evaluation:
        """Evaluates the model on a data set, in its own precision; see `resnetlab.evaluate` for the options."""
        from resnetlab.evaluation.evaluate import evaluate

        own = {"device": str(self.device), "precision": self.device_config.precision}
        return evaluate(self, data, **own | options)

    @public
    def explain(self, image: ImageInput, *, top: int = 5) -> Explanation:
        """Explains the prediction for an image: Grad-CAM (`overlay`), and what each block does for it (`blocks`).

        Raises DataError, UsageError: as `predict`.
        """
        from resnetlab.inference.explain import explain

        top = _check_top(top)
        return explain(self, self.preprocessing(read_input(image, self.preprocessing)), top=top)

    @public
    def export(
        self,
        out: str | Path,
        *,
        to: str | None = None,
        precision: str = "fp32",
        data: str | None = None,
        images: str | Path | None = None,
        data_dir: str | Path = "data",
    ) -> Path:
        """Writes the model for other programs, checked against this network on real images; returns the file.

        Args:
            to: "onnx", "torch", "openvino" or "torchvision"; None decides by the file's ending.
            precision: as for `resnetlab export`; so are `data`, `images` and `data_dir`.

        Raises:
            UsageError: an unknown format or ending, or a missing package.
            ModelFileError: the file's scores differ from the network's beyond the bound.
        """
        from resnetlab.inference.export import export_model, export_weights
        from resnetlab.inference.export_images import load_export_images
        from resnetlab.inference.formats import find_format, get_format

        out = Path(out)
        to = to or find_format(out.suffix)
        if get_format(to).read is None:
            export_weights(self, to, out)
        else:
            folder = None if images is None else Path(images)
            check_images, calibration_images = load_export_images(self, data, folder, Path(data_dir))
            export_model(self, to, precision, out, check_images, calibration_images)
        return out


def compute_in_batches(
    images: Iterable[tuple[str, Tensor | str]], compute: Callable[[list[Tensor]], Iterable[Tensor]], size: int = BATCH
) -> Iterator[tuple[str, Tensor | str]]:
    """The name of each image with its row of what `compute` gives for a batch; the message of an error stays in its place."""
    remaining = iter(images)
    while group := list(islice(remaining, size)):
        pixels = [x for _, x in group if isinstance(x, Tensor)]
        rows = iter(compute(pixels) if pixels else ())
        for name, x in group:
            yield name, x if isinstance(x, str) else next(rows)


def _check_top(top: Any) -> int:
    if not isinstance(top, Integral) or isinstance(top, bool) or top < 1:
        raise UsageError(f"top must be a whole number from 1 up, not {top!r}.")
    return int(top)


@standard_torch_state()
def load(path: str | Path, *, precision: str = "fp32", device: str = "auto", net: nn.Module | None = None) -> Model:
    """Loads a classifier for prediction; see `open_model.load`."""
    return Model(**vars(load_or_download(path, net)), device_config=select_device(precision, device))
