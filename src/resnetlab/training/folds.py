"""K-fold cross-validation: one run per fold, each evaluated on its fold, and the mean and standard deviation over them."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from resnetlab.data import sources
from resnetlab.errors import UsageError
from resnetlab.run_folder import FOLDS_FILE, write_atomically
from resnetlab.training.recipe import Recipe
from resnetlab.training.result import ClassificationResult
from resnetlab.training.run_options import RunOptions
from resnetlab.training.train import resume, start_run


def cross_validate(
    recipe: Recipe, folds: int, out: Path | None = None, options: RunOptions | None = None
) -> dict[str, Any]:
    """Trains and evaluates once per fold, into out/fold-1, out/fold-2, …; writes the figures to out/folds.json.

    Called again with the same folder it resumes: finished runs are kept, an unfinished one goes on bit-identically. It raises
    RunError if a run there has another recipe.

    Args:
        folds: how many, 2 or more. Images of one group (recipe.groups) are in one fold.
        out: None takes runs/<data>-folds.

    Returns:
        `runs` (of each its folder, `n` and `top1_error`), `n`, `top1_error` (mean over folds), `standard_deviation` (of a fold,
        with N - 1) and `pooled_top1_error` (wrong images of all images), errors as fractions.
    """
    if folds < 2 or recipe.fold:
        raise UsageError(
            f"cross-validation takes 2 folds or more and sets fold itself, not {folds} and {recipe.fold!r}."
        )
    options = options or RunOptions()
    root = out or Path("runs") / f"{sources.short_name(recipe.data)}-folds"
    results = []
    for number in range(1, folds + 1):
        own, run = replace(recipe, fold=f"{number}/{folds}"), root / f"fold-{number}"
        options.report(f"fold {number} of {folds}")
        known = (run / "recipe.toml").is_file()
        result = resume(run, options, overrides=own) if known else start_run(own, run, options)
        results.append(cast(ClassificationResult, result))
    summary = summarise_folds(results)
    write_atomically(root / FOLDS_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def summarise_folds(results: list[ClassificationResult]) -> dict[str, Any]:
    """The figures of `cross_validate`."""
    errors, n = [result.top1_error for result in results], sum(result.n for result in results)
    return {
        "runs": [{"run": r.run, "n": r.n, "top1_error": r.top1_error} for r in results],
        "n": n,
        "top1_error": math.fsum(errors) / len(errors),
        "standard_deviation": statistics.stdev(errors),
        "pooled_top1_error": sum(round(r.top1_error * r.n) for r in results) / n,
    }
