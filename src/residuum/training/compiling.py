"""How steps are made: whether a run is long enough to pay for torch.compile, and whether a CUDA graph is tried."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

from residuum.models.accounting import cost
from residuum.models.spec import Specification
from residuum.runtime import Engine
from residuum.training.recipe import Recipe

# Measured on two cores with bf16 (docs/log.md): what it saves of a step of a CIFAR net, what compiling costs, and how fast the
# steps are without. At 224 pixels it saves nothing.
SAVES, COSTS, SPEED = 0.04, 60.0, 240e9  # share; seconds; operations per second, 6 for each multiply-add
LARGEST = 64  # pixels on a side
# steps; recording takes the time of about ten. Those of --verify-resume are as many, so that it proves what runs do.
WORTH_RECORDING = 25


def compiling(engine: Engine, recipe: Recipe, spec: Specification) -> Engine:
    """The engine as the recipe's `compile` has it, saying why."""
    if recipe.compile != "auto":
        return replace(engine, compiled=recipe.compile == "on", why=f"{engine.why}; compile {recipe.compile} as asked")
    if engine.device.type == "cuda":
        why = _against_graph(engine, recipe)
        return replace(
            engine, graphs=not why, why=f"{engine.why}; {why or 'steps are replayed where that gives the same bits'}"
        )
    why = _against(engine, recipe, spec)
    return replace(
        engine, compiled=not why, why=f"{engine.why}; {why or 'the run is long enough to pay for compiling'}"
    )


def _against(engine: Engine, recipe: Recipe, spec: Specification) -> str:
    """Why not to compile; nothing where it pays."""
    if engine.device.type != "cpu":
        return "not compiled: what that brings was not measured on this kind of device"
    if recipe.size > LARGEST:
        return "not compiled: that saves nothing on pictures this large"
    if recipe.recompute or recipe.bn_sync:
        return "not compiled: recompute and bn_sync interrupt the graph"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    work = 6.0 * cost(spec, (recipe.size, recipe.size)).multiply_adds * recipe.batch * recipe.steps
    if SAVES * work / SPEED < COSTS:
        return "not compiled: the run is too short to pay for it"
    return "" if compiler else "not compiled: there is no C++ compiler"


def _against_graph(engine: Engine, recipe: Recipe) -> str:
    """Why steps are not to be replayed from a CUDA graph; nothing where that is tried."""
    if engine.world.size > 1:
        return "no CUDA graph: several processes talk in every step"
    if recipe.recompute:
        return "no CUDA graph: recompute keeps the state of the random generator, which a graph cannot"
    return "" if recipe.steps >= WORTH_RECORDING else "no CUDA graph: the run is too short to pay for one"
