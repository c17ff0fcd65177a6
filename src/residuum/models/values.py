"""What a detector or a segmenter is beside its backbone's specification: values that stand in its model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from residuum.errors import ModelFileError, UsageError, unknown

FORMS = ("fpn", "c4")
HEADS = ("fcn", "deeplab")
NORMS = ("fixed", "live")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What both have.

    Attributes:
        size: the shorter side of pictures is brought to this many pixels, the longer one to at most `longest`.
        mean, std: of the training pictures' channels, in units of [0, 1]; subtracted and divided by.
        bn: "fixed", a constant affine map as in the 2015 paper, or "live".
        frozen: the deepest map that does not learn, such as "C2"; "" where all do.
    """

    size: int
    longest: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bn: str
    frozen: str

    def __post_init__(self) -> None:
        if self.bn not in NORMS:
            raise unknown("bn", self.bn, NORMS)
        if not 1 <= self.size <= self.longest <= 16_384:
            raise UsageError(f"size {self.size} and longest {self.longest} must rise, and be at most 16,384.")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as it stands in the model file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The value that `to_json` wrote; raises ModelFileError where it cannot be used."""
        known = {f.name for f in fields(cls)}
        if strange := sorted(set(values) - known):
            raise ModelFileError(f"it has unknown keys {strange}; it was written by a newer version of residuum.")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**given)
        except (TypeError, UsageError) as error:
            raise ModelFileError(f"its values cannot be used: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Detector(Dense):
    """A Faster R-CNN.

    Attributes:
        form: "fpn" or "c4".
        anchors: sides in pixels at the network's scale; of "fpn" one for each of its five maps, of "c4" all on its one map.
        pyramid: channels of each map of the feature pyramid; "c4" has none.
        context: whether what the head says of the whole picture stands beside each region (2015, appendix B).
    """

    form: str
    anchors: tuple[int, ...]
    context: bool
    pyramid: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if not self.anchors or (self.form == "fpn" and len(self.anchors) != 5):
            raise UsageError(f"anchors must be sides in pixels, of the form fpn five, not {list(self.anchors)}.")
        if not 1 <= self.pyramid <= 4096:
            raise UsageError(f"pyramid must be from 1 to 4,096 channels, not {self.pyramid}.")


@dataclass(frozen=True, kw_only=True)
class Segmenter(Dense):
    """A fully convolutional network.

    Attributes:
        head: "fcn" or "deeplab" (DeepLabV3's).
        output_stride: pixels between the steps of the map that the head reads.
    """

    head: str
    output_stride: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            raise unknown("head", self.head, HEADS)


@dataclass(frozen=True)
class Additions:
    """How a detector is asked (2015, appendix B); as it was trained where nothing is said.

    Attributes:
        sides: shorter sides in pixels, rising, of multi-scale testing; () for the detector's own alone.
        refine: box refinement with voting.
    """

    sides: tuple[int, ...] = ()
    refine: bool = False

    def __post_init__(self) -> None:
        if len(self.sides) == 1 or list(self.sides) != sorted({s for s in self.sides if s >= 32}):
            raise UsageError(
                f"scales take two or more rising lengths from 32 pixels, such as 240,300,360, not {list(self.sides)}."
            )
