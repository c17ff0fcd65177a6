"""What a detector's and a segmenter's run share before the first step and after the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from residuum.data import sources
from residuum.data.parts import Marked, Parts
from residuum.data.reading import spare_processes
from residuum.models.accounting import parameters
from residuum.records import Run
from residuum.runtime import Engine
from residuum.tasks.dense import DenseTask, Plan
from residuum.training import recipes
from residuum.training.checkpoint import State
from residuum.training.dense_recipe import DenseTraining
from residuum.training.result import Ended

P = TypeVar("P", bound=Marked)
E = TypeVar("E", bound=Ended)


def plan(
    recipe: DenseTraining, data: Parts[P], on_bad: str, engine: Engine, workers: int | None, started_in: Path
) -> Plan[P]:
    """What the task is prepared from; paths in the recipe start in `started_in`."""
    return Plan(
        data=data,
        name=sources.short_name(recipe.data),
        net=recipe.net,
        specification=recipe.specification,
        init=recipe.init,
        start_from=started_in / recipe.start_from if recipe.start_from else None,
        sides=recipe.sides,
        flips=recipe.flips,
        held=recipe.held_out,
        on_bad=on_bad,
        batch=recipe.batch,
        bn_batch=recipe.bn_batch,
        seed=recipe.seed,
        engine=engine,
        workers=spare_processes(engine) if workers is None else workers,
    )


def tell(task: DenseTask[Any, Any], recipe: DenseTraining, what: str, say: Callable[[str], None]) -> None:
    """Says what is trained (`what` begins the sentence), and how long."""
    say(f"{what} to train on, {len(task.held_out):,} held out, {len(task.test):,} to test on ({task.judged}); "
        f"{parameters(task.net):,} parameters")  # fmt: skip
    passes = recipe.steps * recipe.batch / len(task.train)
    say(f"{recipe.steps:,} steps of {recipe.batch:,} show every picture {passes:,.1f} times (--steps changes that)")


def ended(
    task: Any, recipe: DenseTraining, run: Run, state: State, kind: type[E], figures: Sequence[str]
) -> tuple[E, Any]:
    """Touches the test split, once, with the last iterate, and writes the model; the result and the judgement.

    Args:
        kind, figures: of the task's result: which figures of the judgement stand in it.
    """
    began = time.perf_counter()
    held_out = task.judge(task.held_out).to_json() if task.held_out else None
    judgement = task.judge(task.test)
    found = judgement.to_json()
    measured = {task.judged: found} | ({"held_out": held_out} if held_out else {})
    if task.engine.world.first:
        task.bundle(recipe.to_json(), measured).save(run.model)
    state.seconds += time.perf_counter() - began
    result = kind(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.judged,
        n=found["n"],
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=parameters(task.net),
        budget=recipes.budget(recipe),
        **{key: found[key] for key in figures},
    )
    return result, judgement
