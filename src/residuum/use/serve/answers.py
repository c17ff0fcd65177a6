"""The forms of the answers, for the OpenAPI document; keys as in docs/json.md."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from residuum.use.serve.bodies import FIELD
from residuum.use.serve.limits import PICTURES

TOP = (
    "How many classes or boxes to name, the best first; else 5 classes of a classifier, and all that there is to name."
)
LEAST = "Least score or share of what is named; else 0.5 for boxes, and 0."


class Top(BaseModel):
    """What can be asked of an explanation, in the address."""

    model_config = ConfigDict(extra="forbid")
    top: int | SkipJsonSchema[None] = Field(None, ge=1, le=1_000_000, description=TOP)


class Options(Top):
    """What can be asked of an answer."""

    score: float | SkipJsonSchema[None] = Field(None, ge=0, le=1, description=LEAST)


class Nothing(BaseModel):
    """An address that takes no options."""

    model_config = ConfigDict(extra="forbid")


class Scored(BaseModel):
    """A class and its score."""

    name: str = Field(alias="class")
    score: float = Field(ge=0, le=1, description="Softmax, calibrated where the model has a temperature.")


class Box(Scored):
    """A box, its class and its score."""

    box: list[float] = Field(min_length=4, max_length=4, description="[x1, y1, x2, y2] in pixels of the picture.")


class Part(BaseModel):
    """A class and its share of the pixels."""

    name: str = Field(alias="class")
    share: float = Field(ge=0, le=1)


class Predicted(BaseModel):
    """What is on a picture, by the model's task; or an error, where others of the same request could be read."""

    image: str = Field(description="The name that was sent with it.")
    top: list[Scored] | None = Field(None, description="Of a classifier.")
    width: int | None = Field(
        None, description="Of the picture, in pixels; of a detector and a segmenter, like height."
    )
    height: int | None = None
    boxes: list[Box] | None = Field(None, description="Of a detector, best first.")
    classes: list[Part] | None = Field(None, description="Of a segmenter, the largest first.")
    mask: str | None = Field(None, description="Of a segmenter: the class of each pixel, as a data URI (PNG).")
    error: str | None = None


class Predictions(BaseModel):
    """One entry a picture, in the order they were sent."""

    predictions: list[Predicted]


class Share(BaseModel):
    """What a block did for the answer."""

    block: str
    ratio: float | None = Field(description="|F(x)| / |shortcut|; null in a plain network.")
    answer_without: str | None = Field(description="The class that wins without the block.")
    score_without: float | None = Field(description="What the explained class scores without the block.")


class Explained(BaseModel):
    """Why the first class was answered."""

    image: str
    top: list[Scored]
    blocks: list[Share]
    heat: str = Field(description="Grad-CAM over the picture, as a data URI (PNG).")


class Health(BaseModel):
    """The service is up."""

    status: str


class About(BaseModel):
    """The model and the service's limits; what not every task has may be missing."""

    task: str = Field(description="classify, detect or segment.")
    name: str
    net: str
    classes: list[str]
    parameters: int
    temperature: float | None = None
    calibrated: bool | None = None
    preprocessing: dict[str, Any] | None = Field(None, description="Of a classifier.")
    values: dict[str, Any] | None = Field(
        None, description="Of a detector or a segmenter: what stands on its backbone."
    )
    colours: list[str] | None = Field(None, description="Of each class of a detector or a segmenter, on the page.")
    metrics: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, Any]
    engine: str
    limits: dict[str, float]


class Error(BaseModel):
    """What went wrong, and what to do."""

    error: str


_FORM = {
    "type": "object",
    "properties": {
        FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "maxItems": PICTURES}
    },
    "required": [FIELD],
    "additionalProperties": False,
}
_BYTES = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
BODY: dict[str, Any] = {
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
_WHEN = {
    400: "The body is empty, cut short or no form.",
    408: "The body came too slowly.",
    413: "The body or a picture is too large, or there are too many.",
    415: "The body is no picture of a known kind.",
    422: "A picture is damaged, or a field or option is not known.",
    429: "Too many requests at once; Retry-After says when to try again.",
    500: "The service failed.",
    503: "The answer took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": Error, "description": text} for code, text in _WHEN.items()}
