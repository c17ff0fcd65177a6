"""The learning rate, a pure function of the step."""

from __future__ import annotations

from residuum.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, warm_since: int | None) -> float:
    """The learning rate of step `step` (0, 1, …).

    Args:
        warm_since: under the rule "train-error", the step at which the training error had fallen below its bound, or None
            where it has not yet. It is measured, so it belongs to the run's state; the other rules do not look at it.

    Warm-up: `warmup_lr` for the first `warmup_steps` steps (2016 §3), or until the training error falls below
    `warmup_error` (2015 §4.2). Then `lr`, divided by 10 at every milestone.
    """
    if recipe.warmup == "steps" and step < recipe.warmup_steps:
        return recipe.warmup_lr
    if recipe.warmup == "train-error" and (warm_since is None or step < warm_since):
        return recipe.warmup_lr
    passed = sum(step >= milestone for milestone in recipe.milestones)
    return recipe.lr / 10.0**passed
