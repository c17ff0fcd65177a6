"""The learning rate, a pure function of the step and of the measured values in the run's state."""

from __future__ import annotations

import math

from resnetlab.training.recipe import BaseRecipe


def learning_rate(recipe: BaseRecipe, step: int, warmup_end: int | None, lr_drops: int = 0) -> float:
    """The learning rate of step `step` (0, 1, …).

    Args:
        warmup_end: for the warm-up "train-error", the step at which the training error fell below its bound; None before
            that. It is measured, so it is part of the run's state; the other kinds of warm-up ignore it.
        lr_drops: for the schedule "plateau", how often the held-out error has stopped falling; measured too.

    Warm-up: `warmup_lr` for the first `warmup_steps` steps (2016 §3), or rising from it to `lr` over them ("linear"), or until
    the training error falls below `warmup_error` (2015 §4.2). Then `lr`, divided by 10 at every milestone (2015 §4.2) or
    plateau (2015 §3.4), or falling to 0 along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983). With `lr_base_size`
    `lr` is first multiplied by the batch over it (Goyal et al. 2017, arXiv 1706.02677).
    """
    if recipe.warmup in ("steps", "linear") and step < recipe.warmup_steps:
        share = step / recipe.warmup_steps if recipe.warmup == "linear" else 0.0
        return recipe.warmup_lr + share * (recipe.scaled_lr - recipe.warmup_lr)
    if recipe.warmup == "train-error" and (warmup_end is None or step < warmup_end):
        return recipe.warmup_lr
    if recipe.schedule == "cosine":
        start = recipe.warmup_steps if recipe.warmup in ("steps", "linear") else 0
        return recipe.scaled_lr * (1 + math.cos(math.pi * (step - start) / max(1, recipe.steps - start))) / 2
    if recipe.schedule == "plateau":
        return recipe.scaled_lr / 10.0**lr_drops
    return recipe.scaled_lr / 10.0 ** sum(step >= milestone for milestone in recipe.milestones)
