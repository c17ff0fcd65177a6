"""The recipes of detection and segmentation: what each adds to `Training`, and the complete ones by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from residuum.errors import UsageError
from residuum.training.recipe import Training


@dataclass(frozen=True, kw_only=True)
class DenseTraining(Training):
    """What both have."""

    start_from: str = ""  # a classifier's model file to start from; "" starts from random weights
    size: int  # the shorter side of pictures is brought to this many pixels
    longest: int  # and the longer one to at most this many
    flips: str = "sideways"  # augmentation: "none", "sideways", or "both" (no up in a microscope)
    sides: tuple[int, ...] = ()  # augmentation: other lengths of the shorter side that training draws from too
    bn_batch: int = 0  # pictures that go through the network and BN together; 0: all of a process's share
    bn: str = "fixed"  # "fixed": a constant affine map (2015, appendix A); "live"
    frozen: str = ""  # the deepest map that does not learn, such as "C2"; "" where all do
    held_out: int = 0  # training pictures kept for judging while training; 0 trains on all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 32 <= self.size <= self.longest <= 16_384:
            raise UsageError(f"size {self.size} and longest {self.longest} must rise, from 32 to 16,384.")
        if not all(isinstance(side, int) and 32 <= side <= self.longest for side in self.sides):
            raise UsageError(
                f"sides must be lengths in pixels from 32 to longest ({self.longest}), not {list(self.sides)}."
            )
        if self.schedule == "plateau":
            raise UsageError("schedule=plateau watches a held-out error, which boxes and masks have not; take cosine.")
        if 1 in (self.batch, self.bn_batch) and self.bn == "live":
            raise UsageError(
                "batch and bn_batch must be 2 or more where bn is live: batch normalisation needs more than one picture."
            )
        if self.bn_batch and self.batch % self.bn_batch:
            raise UsageError(f"bn_batch {self.bn_batch} does not divide the batch of {self.batch}; change one of them.")


@dataclass(frozen=True, kw_only=True)
class DetectRecipe(DenseTraining):
    """A detector's recipe."""

    task: ClassVar[str] = "detect"

    form: str = "fpn"  # "fpn": a feature pyramid; "c4": regions pooled before conv5 (2015, appendix A)
    anchors: tuple[
        int, ...
    ] = ()  # their sides in pixels at the network's scale; none takes them from the training boxes
    pyramid: int = 256  # channels of the pyramid's maps; "c4" has none
    context: bool = False  # what the head says of the whole picture beside each region (2015, appendix B)
    regions: int = 512  # of each picture that the second stage trains on
    on_bad_box: str = "stop"  # a box or picture that cannot be right: "stop", or "skip" (left out, and listed)


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(DenseTraining):
    """A segmenter's recipe."""

    task: ClassVar[str] = "segment"

    head: str = "fcn"  # "fcn" or "deeplab" (DeepLabV3's)
    output_stride: int = 16  # pixels between the steps of the map that the head reads: 8, 16 or 32
    on_bad_mask: str = "stop"  # a mask or picture that cannot be right: "stop", or "skip" (left out, and listed)


def paper_boxes() -> DetectRecipe:
    """The 2015 paper's Faster R-CNN: shared conv1 to conv4, regions pooled before conv5, BN fixed, one scale of 600 pixels.

    Paper: 2015 appendix A, "hyper-parameters as in Faster R-CNN": learning rate 0.001, a tenth of it after three quarters,
    weight decay 5e-4; both stages learn together (that code's approximate joint training), one picture a step, 80,000 steps.
    Command: residuum detect train VOC2007 --recipe paper-boxes --start-from resnet101.safetensors --net resnet101
    Cost: 80,000 pictures of 600x1000; days on CPU cores, hours on a data-centre GPU.
    Expected: 76.4 % mAP on VOC 2007 test with ResNet-101 trained on 07+12 (2015 Table 7); not measured here.
    """
    return DetectRecipe(
        name="paper-boxes",
        data="boxes",
        net="resnet101",
        form="c4",
        anchors=(128, 256, 512),
        size=600,
        longest=1000,
        regions=128,
        batch=1,
        steps=80_000,
        lr=0.001,
        milestones=(60_000,),
        weight_decay=5e-4,
        judge_every=10_000,
    )


def boxes() -> DetectRecipe:
    """Your own pictures with boxes, quickly: a ResNet-18 with a slim feature pyramid on small pictures.

    Paper: 2015 appendix A in small, with a feature pyramid (Lin et al., arXiv 1612.03144); the schedule is ours.
    Command: residuum detect train FOLDER
    Cost: 8,000 pictures shown, some two a second with one thread of a busy machine. Bring it to your time with --steps.
    Expected: see docs/log.md.
    """
    return DetectRecipe(
        name="boxes",
        data="boxes",
        net="resnet18",
        size=300,
        longest=500,
        sides=(256, 340),
        pyramid=128,
        regions=128,
        bn="live",
        batch=8,
        steps=1_000,
        lr=0.01,
        schedule="cosine",
        warmup="linear",
        warmup_lr=0.001,
        warmup_steps=100,
        clip_norm=10.0,  # from random weights a few steps of larger gradients are enough to leave for infinity (docs/log.md)
        weight_decay=1e-4,
        record_every=10,
        judge_every=200,
    )


def masks() -> SegmentRecipe:
    """Your own pictures with masks, quickly: a ResNet-18 with an FCN head on squares of 256 pixels.

    Paper: 2015 reports COCO segmentation without a method; the head is Long et al.'s (arXiv 1411.4038) as torchvision has it.
    Command: residuum segment train FOLDER
    Cost: 4,000 squares of 256 pixels shown. Bring it to your time with --steps.
    Expected: see docs/log.md.
    """
    return SegmentRecipe(
        name="masks",
        data="masks",
        net="resnet18",
        size=256,
        longest=512,
        sides=(224, 320),
        bn="live",
        batch=8,
        steps=500,
        lr=0.05,
        milestones=(350, 450),
        warmup="steps",
        warmup_lr=0.01,
        warmup_steps=20,
        record_every=10,
        judge_every=100,
    )


DENSE_RECIPES: dict[str, Callable[[], Training]] = {"paper-boxes": paper_boxes, "boxes": boxes, "masks": masks}
DENSE_DEFAULTS = {"detect": "boxes", "segment": "masks"}
