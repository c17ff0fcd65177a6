"""Schemas of requests and answers for the OpenAPI document; keys as in docs/json.md."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from resnetlab.serve.limits import MAX_IMAGES
from resnetlab.serve.uploads import FIELD

TOP = "Number of classes or boxes, best first; by default 5 classes of a classifier, and all boxes."
MIN_SCORE = "Least score, or share of the pixels; by default 0.5 for boxes and 0 otherwise."
VALUES = {"top": "a whole number from 1 to 1,000,000"} | dict.fromkeys(("min_score", "score"), "a number from 0 to 1")


class ExplainQuery(BaseModel):
    """Query parameters of /explain."""

    model_config = ConfigDict(extra="forbid")
    top: int | SkipJsonSchema[None] = Field(None, ge=1, le=1_000_000, description=TOP)


class PredictQuery(ExplainQuery):
    """Query parameters of /predict."""

    min_score: float | SkipJsonSchema[None] = Field(None, ge=0, le=1, description=MIN_SCORE)
    score: float | SkipJsonSchema[None] = Field(None, ge=0, le=1, description="The same, as it was called at first.")


class EmptyQuery(BaseModel):
    """No query parameters."""

    model_config = ConfigDict(extra="forbid")


class ClassScore(BaseModel):
    """A class and its score."""

    name: str = Field(alias="class")
    score: float = Field(ge=0, le=1, description="Softmax, calibrated where the model has a temperature.")


class DetectedBox(ClassScore):
    """A box, its class and its score."""

    box: list[float] = Field(min_length=4, max_length=4, description="[x1, y1, x2, y2] in pixels of the image.")


class ClassShare(BaseModel):
    """A class and its share of the pixels."""

    name: str = Field(alias="class")
    share: float = Field(ge=0, le=1)


class ImagePrediction(BaseModel):
    """The prediction for one image, by the model's task; or its error, where other images of the request could be read."""

    image: str = Field(description="The file name in the request.")
    top: list[ClassScore] | None = Field(None, description="Of a classifier.")
    labels: list[str] | None = Field(
        None, description="Of a classifier of several classes: those over their thresholds."
    )
    none_of_these: bool | None = Field(None, description="True where the best score is below the model's least one.")
    width: int | None = Field(None, description="Of the image in pixels; of detectors and segmenters, like height.")
    height: int | None = None
    boxes: list[DetectedBox] | None = Field(None, description="Of a detector, best first.")
    classes: list[ClassShare] | None = Field(None, description="Of a segmenter, largest first.")
    mask: str | None = Field(None, description="Of a segmenter: the class of each pixel, as a data URI (PNG).")
    error: str | None = None


class PredictAnswer(BaseModel):
    """One entry per image, in the order of the request."""

    predictions: list[ImagePrediction]


class BlockContribution(BaseModel):
    """What a block contributed to the prediction."""

    block: str
    ratio: float | None = Field(description="|F(x)| / |shortcut|; null in a plain network.")
    answer_without: str | None = Field(description="The predicted class without the block.")
    score_without: float | None = Field(description="The score of the explained class without the block.")


class ExplainAnswer(BaseModel):
    """The explanation of the predicted class."""

    image: str
    top: list[ClassScore]
    blocks: list[BlockContribution]
    heat: str = Field(description="Grad-CAM over the image, as a data URI (PNG).")


class HealthAnswer(BaseModel):
    """The service is up."""

    status: str


class ModelAnswer(BaseModel):
    """The model and the service's limits; keys that do not apply to the task are absent."""

    task: str = Field(description="classify, detect or segment.")
    name: str
    net: str
    classes: list[str]
    parameters: int
    temperature: float | None = None
    calibrated: bool | None = None
    none_below: float | None = Field(
        None, description="The least score of a class; a lower best score is none of these."
    )
    preprocessing: dict[str, Any] | None = Field(None, description="Of a classifier.")
    head: dict[str, Any] | None = Field(None, description="The head of a detector or segmenter.")
    colours: list[str] | None = Field(None, description="Of each class of a detector or segmenter, on the page.")
    metrics: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, Any]
    backend: str
    limits: dict[str, float]


class ErrorAnswer(BaseModel):
    """What is wrong, and what to do next."""

    error: str


_FORM = {
    "type": "object",
    "properties": {
        FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "maxItems": MAX_IMAGES}
    },
    "required": [FIELD],
    "description": "Files in fields of any name; the names in the answer are those of the files.",
}
_BYTES = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/octet-stream": _BYTES,
            "image/jpeg": _BYTES,
            "image/png": _BYTES,
        },
    }
}
_DESCRIPTIONS = {
    400: "The body is empty, cut short or not a form.",
    408: "The body arrived too slowly.",
    413: "The body or an image is too large, or there are too many images.",
    415: "The body is not an image of a known type, or encoded in an unknown way.",
    421: "The service is not called by its name (--allowed-host).",
    422: "An image is damaged, or a field or option is unknown.",
    429: "Too many requests at once; Retry-After says when to try again.",
    500: "The service failed.",
    503: "The answer took too long.",
}
ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": text} for code, text in _DESCRIPTIONS.items()
}
