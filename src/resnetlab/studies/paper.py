"""Which printed errors a study's run may be compared with: those of the same network, data, training and test protocol."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

from resnetlab.evaluation.published import PRINTED, PrintedError
from resnetlab.studies.setting import Setting
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import find_classification_recipe

NO_FIGURE = "the paper has no figure for this"

# Values of a recipe that decide how a run is carried out and recorded, not what it trains; the network and the data, which
# are compared by themselves; and the length, by which a run is labelled.
_ELSEWHERE = {"name", "data", "net", "specification", "seed", "precision", "threads", "compile", "winograd", "fused_bn",
              "recompute", "log_every", "eval_every", "checkpoint_minutes", "steps", "val_images", "on_bad_image",
              "quarantine"}  # fmt: skip


def find_printed(setting: Setting, recipe: Recipe, protocol: str = "1crop") -> list[PrintedError]:
    """The printed errors of a run's network on its data, trained as it was, by a test protocol; the run may be shorter."""
    spec = setting.spec(recipe)
    return [
        e
        for e in PRINTED
        if (e.data, e.protocol) == (setting.data_name, protocol) and e.is_network(spec) and _is_trained_as(recipe, e)
    ]


def paper_recipe(printed: PrintedError) -> Recipe:
    """The recipe, at its full length, of the runs behind a printed error."""
    return replace(_named_recipe(printed.recipe), **printed.training)


_named_recipe = cache(find_classification_recipe)


def length_share(recipe: Recipe, printed: PrintedError) -> float:
    """The length of a run as a share of the printed one's, in images."""
    full = paper_recipe(printed)
    return recipe.steps * recipe.batch / (full.steps * full.batch)


def _is_trained_as(recipe: Recipe, printed: PrintedError) -> bool:
    """Whether a recipe is the paper's, but for its length."""
    full = paper_recipe(printed)
    if recipe.steps == full.steps and recipe.val_images != full.val_images:
        return False
    same_length = full.rescale(recipe.steps)
    keys = {f.name for f in fields(Recipe)} - _ELSEWHERE
    keys -= {"warmup_steps"} if full.warmup != "steps" else set()
    return all(getattr(recipe, key) == getattr(same_length, key) for key in keys)
