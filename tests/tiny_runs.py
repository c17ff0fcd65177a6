"""Recipes of small, fast runs."""

from __future__ import annotations

from dataclasses import replace

from resnetlab.training.checkpoint import TrainState
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import quick
from resnetlab.training.train import RunOptions, build_task

TINY = {"net": "resnet8", "image_size": 8, "batch": 32, "precision": "fp32", "threads": 1}
TINY_PHOTOS = {
    "net": "resnet8",
    "image_size": 16,
    "eval_resize": 20,
    "batch": 6,
    "steps": 8,
    "device": "cpu",
    "precision": "fp32",
}


def tiny(**values: object) -> Recipe:
    return replace(quick().rescale(20), **(TINY | values))  # type: ignore[arg-type]


def make_train_state(recipe: Recipe) -> TrainState:
    return TrainState.create(build_task(recipe, RunOptions(device="cpu")))
