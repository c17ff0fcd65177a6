"""Specifications of detection and segmentation heads; the model file has them beside the backbone's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.models.spec import read_specification

FORMS = ("fpn", "c4")
HEADS = ("fcn", "deeplab")
NORMS = ("fixed", "live")


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Values of both heads.

    Attributes:
        image_size: images are resized to a shorter side of this many pixels, if the longer one stays at most `longest`.
        mean, std: the training images' channel statistics, in units of [0, 1]; images are normalised by them.
        bn: "fixed", a constant affine map as in the 2015 paper, or "live".
        frozen: the deepest map that does not train, such as "C2"; "" if all train.
    """

    image_size: int
    longest: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bn: str
    frozen: str

    def __post_init__(self) -> None:
        if self.bn not in NORMS:
            raise unknown_name_error("bn", self.bn, NORMS)
        if not 1 <= self.image_size <= self.longest <= 16_384:
            raise UsageError(
                f"image_size {self.image_size} must be 1 or more and at most longest ({self.longest}), which is at most 16,384."
            )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as the model file has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The value that `to_json` wrote; raises ModelFileError if it is invalid."""
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return read_specification(cls, arguments, "the specification of its head")


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(HeadSpec):
    """A Faster R-CNN.

    Attributes:
        form: "fpn" or "c4".
        anchors: side lengths in pixels of the resized image; "fpn" has one for each of its five maps, "c4" all on one map.
        pyramid: channels of each map of the feature pyramid, for "fpn" only.
        context: whether the whole image's features are added to each region's (2015, appendix B).
    """

    form: str
    anchors: tuple[int, ...]
    context: bool
    pyramid: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise unknown_name_error("form", self.form, FORMS)
        if not self.anchors or min(self.anchors) < 1 or (self.form == "fpn" and len(self.anchors) != 5):
            raise UsageError(
                f"anchors must be side lengths in pixels, from 1 up, five for the form fpn, not {list(self.anchors)}."
            )
        if not 1 <= self.pyramid <= 4096:
            raise UsageError(f"pyramid must be from 1 to 4,096 channels, not {self.pyramid}.")


@dataclass(frozen=True, kw_only=True)
class SegmenterSpec(HeadSpec):
    """A fully convolutional network.

    Attributes:
        head: "fcn" or "deeplab" (DeepLabV3's).
        output_stride: stride of the map that the head reads.
    """

    head: str
    output_stride: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            raise unknown_name_error("head", self.head, HEADS)


@dataclass(frozen=True)
class DetectionOptions:
    """The 2015 paper's additions to a detector's prediction (appendix B); none by default.

    Attributes:
        sides: rising shorter sides in pixels for multi-scale testing; () uses the detector's own size.
        refine: box refinement with voting.
    """

    sides: tuple[int, ...] = ()
    refine: bool = False

    def __post_init__(self) -> None:
        if len(self.sides) == 1 or list(self.sides) != sorted({s for s in self.sides if s >= 32}):
            raise UsageError(
                f"scales take two or more rising lengths from 32 pixels, such as 240,300,360, not {list(self.sides)}."
            )
