"""The forms of the answers, for the OpenAPI document; keys as in docs/json.md."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from residuum.use.serve.bodies import FIELD
from residuum.use.serve.limits import PICTURES


class Options(BaseModel):
    """What can be asked in the address."""

    model_config = ConfigDict(extra="forbid")
    top: int = Field(5, ge=1, le=1_000_000, description="How many classes to name.")


class Nothing(BaseModel):
    """An address that takes no options."""

    model_config = ConfigDict(extra="forbid")


class Scored(BaseModel):
    """A class and its score."""

    name: str = Field(alias="class")
    score: float = Field(ge=0, le=1, description="Softmax, calibrated where the model has a temperature.")


class Predicted(BaseModel):
    """What is on a picture; or an error, where others of the same request could be read."""

    image: str = Field(description="The name that was sent with it.")
    top: list[Scored] | None = None
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
    """The model and the service's limits."""

    name: str
    net: str
    classes: list[str]
    parameters: int
    temperature: float
    calibrated: bool
    preprocessing: dict[str, Any]
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
