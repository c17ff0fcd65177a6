"""The recipes of detection and segmentation: their values beyond `BaseRecipe`, and the complete recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from resnetlab.data.dataset import A_TENTH
from resnetlab.errors import UsageError
from resnetlab.training.recipe import BaseRecipe


@dataclass(frozen=True, kw_only=True)
class AnnotatedRecipe(BaseRecipe):
    """Values of both tasks' recipes."""

    start_from: str = ""  # a classifier's model file to start from; "" starts from random weights
    image_size: int  # images are resized to a shorter side of this many pixels,
    longest: int  # unless the longer one would have more than this many
    flips: str = "sideways"  # augmentation: "none", "sideways", or "both" (no up in a microscope)
    sides: tuple[int, ...] = ()  # augmentation: further shorter sides that training draws from
    bn: str = "fixed"  # "fixed": a constant affine map (2015, appendix A); "live"
    frozen: str = ""  # the deepest map that does not train, such as "C2"; "" if all train
    val_images: int = 0  # training images held out for evaluation while training; 0: none, A_TENTH: see data.dataset

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 32 <= self.image_size <= self.longest <= 16_384:
            raise UsageError(
                f"image_size {self.image_size} must be 32 or more and at most longest ({self.longest}), at most 16,384."
            )
        if not all(isinstance(side, int) and 32 <= side <= self.longest for side in self.sides):
            raise UsageError(
                f"sides must be lengths in pixels from 32 to longest ({self.longest}), not {list(self.sides)}."
            )
        if self.schedule == "plateau":
            raise UsageError("schedule=plateau watches a held-out error, which these tasks do not have; use cosine.")
        if 1 in (self.batch, self.bn_batch) and self.bn == "live":
            raise UsageError(
                "batch and bn_batch must be 2 or more where bn is live: batch normalisation needs more than one image."
            )


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(AnnotatedRecipe):
    """A detector's recipe."""

    task: ClassVar[str] = "detect"

    form: str = "fpn"  # "fpn": a feature pyramid; "c4": regions pooled before conv5 (2015, appendix A)
    anchors: tuple[int, ...] = ()  # side lengths in pixels of the resized image; (): chosen from the training boxes
    pyramid: int = 256  # channels of the pyramid's maps, for "fpn" only
    context: bool = False  # adds the whole image's features to each region's (2015, appendix B)
    regions: int = 512  # per image that the second stage trains on
    on_bad_box: str = "stop"  # at an invalid box or image: "stop", or "skip" it (left out, and listed)


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(AnnotatedRecipe):
    """A segmenter's recipe."""

    task: ClassVar[str] = "segment"

    head: str = "fcn"  # "fcn" or "deeplab" (DeepLabV3's)
    output_stride: int = 16  # stride of the map that the head reads: 8, 16 or 32
    class_255: str = ""  # what 255 means in masks: a class, "ignore" (not evaluated), or "" to decide by the masks
    on_bad_mask: str = "stop"  # at an invalid mask or image: "stop", or "skip" it (left out, and listed)


def paper_boxes() -> DetectionRecipe:
    """The 2015 paper's Faster R-CNN: shared conv1 to conv4, regions pooled before conv5, BN fixed, one scale of 600 pixels.

    Paper: 2015 appendix A, "hyper-parameters as in Faster R-CNN": learning rate 0.001, a tenth of it after three quarters,
    weight decay 5e-4; both stages train together (that code's approximate joint training), one image per step, 80,000 steps.
    Command: resnetlab detect train VOC2007 --recipe paper-boxes --start-from resnet101.safetensors --net resnet101
    Cost: 80,000 images of 600x1000; days on CPU cores, hours on a data-centre GPU.
    Expected: 76.4 % mAP on VOC 2007 test with ResNet-101 trained on 07+12 (2015 Table 7); not measured here.
    """
    return DetectionRecipe(
        name="paper-boxes",
        data="boxes",
        net="resnet101",
        form="c4",
        anchors=(128, 256, 512),
        image_size=600,
        longest=1000,
        regions=128,
        batch=1,
        steps=80_000,
        lr=0.001,
        milestones=(60_000,),
        weight_decay=5e-4,
        eval_every=10_000,
    )


def boxes() -> DetectionRecipe:
    """A quick detector for your own images: a ResNet-18 with a narrow feature pyramid on small images.

    Paper: 2015 appendix A in small, with a feature pyramid (Lin et al., arXiv 1612.03144); the schedule is ours.
    Command: resnetlab detect train FOLDER
    Cost: 8,000 images, some two a second with one thread of a busy machine. Choose the length with --steps.
    Expected: see docs/log.md.
    """
    return DetectionRecipe(
        name="boxes",
        data="boxes",
        val_images=A_TENTH,
        net="resnet18",
        image_size=300,
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
        clip_norm=10.0,  # without it a few large gradients make training from random weights diverge (docs/log.md)
        weight_decay=1e-4,
        log_every=10,
        eval_every=200,
    )


def masks() -> SegmentationRecipe:
    """A quick segmenter for your own images: a ResNet-18 with an FCN head on crops of 256 pixels.

    Paper: 2015 reports COCO segmentation without a method; the head is Long et al.'s (arXiv 1411.4038) as torchvision has it.
    Command: resnetlab segment train FOLDER
    Cost: 4,000 crops of 256 pixels. Choose the length with --steps.
    Expected: see docs/log.md.
    """
    return SegmentationRecipe(
        name="masks",
        data="masks",
        val_images=A_TENTH,
        net="resnet18",
        image_size=256,
        longest=512,
        sides=(224, 320),
        bn="live",
        batch=8,
        bn_batch=4,  # one for each of two threads
        steps=500,
        lr=0.05,
        milestones=(350, 450),
        warmup="steps",
        warmup_lr=0.01,
        warmup_steps=20,
        log_every=10,
        eval_every=100,
    )


ANNOTATED_RECIPES: dict[str, Callable[[], BaseRecipe]] = {"paper-boxes": paper_boxes, "boxes": boxes, "masks": masks}
