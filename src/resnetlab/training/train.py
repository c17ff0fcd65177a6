"""Training: starts a run or resumes one, and the loop over its steps. `python_api` has the function for Python."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from resnetlab.data import sources
from resnetlab.data.decode import jpeg_decoder
from resnetlab.data.object_store import advise_on_password
from resnetlab.data.shared_loading import share_loading
from resnetlab.device import count_cores, default_precision, preserve_process_state, select_device
from resnetlab.distributed import World, can_exchange, join_process_group, leave_if_imported_again
from resnetlab.errors import DataError, ResNetLabError, RunError, UsageError, unknown_name_error
from resnetlab.formatting import format_count, format_percent
from resnetlab.models.own_network import OWN
from resnetlab.out_of_memory import is_out_of_memory
from resnetlab.process_place import read_process_place
from resnetlab.run_folder import RunFolder, check_output_folder, explain_full_disk, write_atomically
from resnetlab.stopping import catch_stop_signals
from resnetlab.tensor_file import read_tensor_file
from resnetlab.training import recipes
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import (
    TrainState,
    change_identity,
    drop_optimizer_state,
    load_best,
    restore_checkpoint,
    upgrade_run,
)
from resnetlab.training.gradients import select_gradients
from resnetlab.training.machine import describe_differences, describe_machine
from resnetlab.training.micro_batches import describe_sum_order
from resnetlab.training.optim import OPTIMIZERS
from resnetlab.training.recipe import BaseRecipe, Overrides, Recipe
from resnetlab.training.recorder import Recorder, RunContext
from resnetlab.training.result import TrainResult
from resnetlab.training.run_options import RunOptions, ignore
from resnetlab.training.schedule import learning_rate
from resnetlab.training.side_by_side import choose_kernels, divide_threads
from resnetlab.training.step import compute_gradients, train_step
from resnetlab.training.step_trace import trace_steps
from resnetlab.training.tasks.base import Task, TaskSetup
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.tasks.detection import DetectionTask
from resnetlab.training.tasks.segmentation import SegmentationTask
from resnetlab.training.tasks.starting_network import require_own_network
from resnetlab.training.trackers import add_trackers, check_trackers

TASKS: dict[str, type[Task]] = {task.name: task for task in (ClassificationTask, DetectionTask, SegmentationTask)}


def start_run(recipe: BaseRecipe, out: Path | None = None, options: RunOptions | None = None) -> TrainResult:
    """Trains a complete recipe into a new run folder, which is created only after data and network are ready.

    The folder is `out`, or runs/<data>, or the next free name. A job that torchrun has restarted resumes the run in `out`.
    """
    with contextlib.ExitStack() as stack:
        world, options = _join(stack, options)
        if world.restarted and out is None:
            raise UsageError("a job that is started again needs --out, the folder to resume in.")
        if world.broadcast(world.restarted and out is not None and (out / "recipe.toml").is_file()):
            prepared = _reopen(stack, world, cast(Path, out), options, recipe.task, recipe)
        else:
            if world.is_first:
                check_output_folder(out, new=True)
            task = build_task(recipe, options, world)
            path = RunFolder.create(out, sources.short_name(recipe.data)).path if world.is_first else None
            run = RunFolder(world.broadcast(path) or Path())
            if world.is_first:
                stack.enter_context(run.lock())
                run.check_empty()  # another process may have been faster
                _write_setup(run, task, options)
            prepared = task, RunContext(run, options)
        return prepared if isinstance(prepared, TrainResult) else train_to_end(*prepared)


def resume(
    path: Path,
    options: RunOptions | None = None,
    *,
    task: str = "classify",
    overrides: Overrides | BaseRecipe | None = None,
) -> TrainResult:
    """Resumes a run from its last checkpoint; the result is bit-identical to that of an uninterrupted run.

    This needs the same kind of device, processor and torch version; a difference from the run's record is reported.

    Args:
        task: the expected task of the run, a key of TASKS.
        overrides: values that must be those of the run, or its whole recipe.

    Raises:
        RunError: not a run folder, another recipe or other data, every checkpoint damaged, or another process trains in it.
    """
    with contextlib.ExitStack() as stack:
        world, options = _join(stack, options)
        prepared = _reopen(stack, world, path, options, task, overrides or Overrides())
        return prepared if isinstance(prepared, TrainResult) else train_to_end(*prepared)


def _describe_evaluated(test: int, held_out: int) -> str:
    """The images that the final weights are evaluated on."""
    return format_count(test, "test image") + (f" and the {held_out:,} held out" if held_out else "")


def train_to_end(task: Task, context: RunContext) -> TrainResult:
    """Trains from the latest checkpoint to the end, then evaluates, saves and reports."""
    recipe, train_state = task.recipe, TrainState.create(task)
    for sentence in restore_checkpoint(context.run, train_state):
        context.options.report(sentence)
    state, out_of_memory = train_state.state, False
    if state.step:
        context.options.report(f"resuming from step {state.step:,}")
    how_to_resume = task.how_to_resume(context.run)
    with (
        catch_stop_signals() as request,
        explain_full_disk(how_to_resume),
        contextlib.closing(Recorder(train_state, context, request)) as recorder,
    ):
        gradients = select_gradients(train_state, recorder.report_graph)
        if recipe.net.startswith(OWN) and not state.step:  # only the caller knows where its weights began
            recorder.save()
        set_train_mode(task.net)
        steps = context.options.profile if task.device_config.world.is_first else 0
        trace = context.run.path / "trace.json", context.options.report, recorder.record_launches
        with recorder.closing(), trace_steps(steps, *trace) as end_traced_step:
            try:
                # the first step compiles, for minutes; a request to stop needs no step after it
                if task.device_config.compiled:
                    context.options.report("the first step compiles the network, which takes a minute or more")
                if task.device_config.compiled and task.device_config.world.size == 1:
                    request.stop_immediately(f"stopped while compiling, at step {state.step:,}; {how_to_resume}")
                while not train_state.is_done:
                    recorder.timer.start()
                    lr = learning_rate(recipe, state.step, state.warmup_end, state.lr_drops)
                    micro_batches = task.micro_batches(state.step)
                    recorder.timer.batch_ready()
                    output = train_step(train_state, micro_batches, lr, gradients)
                    request.deferred = True
                    recorder.end_step(output, lr)
                    end_traced_step()
            except ValueError as error:
                if "Expected more than 1 value per channel" not in str(error):
                    raise
                raise DataError(f"step {state.step:,} has one readable image, BN needs two; fix the others.") from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                out_of_memory = True
            if out_of_memory:  # the memory that the error and the graph hold is free only here
                gradients, micro_batches = compute_gradients, []
                train_state.optimizer.zero_grad()
                raise task.out_of_memory_error()
        request.stop_immediately(f"stopped while evaluating, after the last step, which is saved; {how_to_resume}")
        if isinstance(recipe, Recipe) and recipe.early_stop and state.step < recipe.steps:
            context.options.report(
                f"ended early, after step {state.step:,} of {recipe.steps:,}: the held-out error was no lower in the last "
                f"{format_count(state.since_best, 'evaluation')}"
            )
        with train_state.average.swap_in():
            if isinstance(recipe, Recipe) and recipe.keep == "best" and state.best_step:
                load_best(context.run, train_state)
                context.options.report(
                    f"keeping the weights of step {state.best_step:,}, the best on the held-out images "
                    f"({format_percent(state.best_error)} error)"
                )
            context.options.report(f"evaluating on {_describe_evaluated(len(task.test), len(task.held_out))}")
            result = task.finish(context.run, state)
        skipped = task.device_config.world.merge_dicts(task.skipped)
        if task.device_config.world.is_first:
            recorder.note_skipped(skipped)
            context.run.write_json("result.json", result.to_json())
            recorder.record_result(result)
            drop_optimizer_state(context.run)
    return result


def build_task(
    recipe: BaseRecipe, options: RunOptions, world: World | None = None, started_in: Path | None = None
) -> Task:
    """The task of a recipe, whose paths are relative to `started_in`, with all "auto" values resolved."""
    if recipe.optimizer not in OPTIMIZERS:
        raise unknown_name_error("optimizer", recipe.optimizer, OPTIMIZERS)
    if options.shard_space is not None and (getattr(recipe, "sampling", "") != "shards" or options.shard_space < 1):
        raise UsageError("--shard-space is for --set sampling=shards, and above 0; add that, or leave it out.")
    device, world = options.device or "auto", world or World()
    threads = -(-recipe.threads // read_process_place().local_size)  # rounded up
    selected = select_device(recipe.precision, device, threads, training=True, exact=recipe.exact)
    device_config = replace(selected, world=world)
    if selected.device.type == "cuda" and selected.device.index is not None:
        torch.cuda.set_device(selected.device)  # of which torch says how much is free, and for which it pins memory
    count = TASKS[recipe.task].count_micro_batches(recipe, world)  # raises before anything takes time
    torch.set_num_threads(recipe.op_threads or max(1, device_config.threads // count))
    if world.size > 1 and device_config.device.index is not None:
        kind = device_config.device.type
        raise UsageError(f"several processes take one device each; give its kind, not {device!r}: --device {kind}.")
    if world.size > 1 and not can_exchange(device_config.device):
        raise UsageError(
            f"several processes cannot exchange gradients on {device_config.device.type} here; use one, or --device cpu."
        )
    recipe = replace(recipe, precision=device_config.precision)
    setup = TaskSetup(device_config, options, started_in or Path(), resuming=started_in is not None)
    with share_loading(world) as load_once:
        task = TASKS[recipe.task].build(recipe, replace(setup, load_once=load_once))
    if task.recipe.warmup in ("steps", "linear") and task.recipe.warmup_steps > task.recipe.steps:
        raise UsageError(
            f"the warm-up of {format_count(task.recipe.warmup_steps, 'step')} is longer than the run, "
            f"{task.recipe.steps:,}; shorten it."
        )
    if options.on_evaluate is not None and not len(task.held_out):
        raise UsageError("on_evaluate sees held-out images, and none are held out; add val_images=100.")
    task = divide_threads(task.fit_micro_batch(options.report) if options.fit_micro_batch else task)
    task = choose_kernels(task, options.report, resuming=started_in is not None)
    options.report(f"device: {task.device_config}")
    if sentence := describe_sum_order(task.recipe, task.num_micro_batches, world):
        options.report(sentence)
    if reason := task.reason_against_exact:
        options.report(f"{reason}, so another run, or a resumed one, may differ in its last bits")
    if device_config.device.type == "cpu" and threads > (cores := count_cores()):
        options.report(f"{threads} threads share {format_count(cores, 'core')}: threads={cores} is faster")
    named = recipes.find_named(task.recipe, default_precision(device_config.device), task.start_size)
    if changes := task.recipe.differences(named):
        options.report(f"recipe {task.recipe.name}, with {'; '.join(changes)}")
    if warning := recipes.describe_learning_rate(task.recipe):
        options.report(warning)
    if label := recipes.describe_budget(task.recipe):
        options.report(f"budget: {label}")
    return task


def check_resume(path: Path, task: str, overrides: Overrides, options: RunOptions) -> None:
    """Raises RunError or UsageError if `resume` would refuse the run; extends a finished run that is to be longer."""
    run = RunFolder.open(path)
    with run.lock():
        _read_run(run, task, overrides, options)


def read_result(run: RunFolder, task: type[Task]) -> TrainResult | None:
    """The result of a finished run; None if one of its files is missing or cannot be read, so that it is written again."""
    try:
        values = run.read_json("result.json") or {}
        read_tensor_file(run.model, "model file")
        result = task.result_type.from_json(
            values | {"run": str(run.path), "model": str(run.model), "report": str(run.report)}
        )
    except (ResNetLabError, KeyError, TypeError):
        return None
    return result if run.report.is_file() else None


class _RecordedRun(NamedTuple):
    """What a run folder records: the result (None if unfinished), the recipe and the environment."""

    result: TrainResult | None
    recipe: BaseRecipe
    environment: dict[str, Any] | None  # None before the run has begun
    moved_to: str = ""  # the place where the data are now, if it is another


def _join(stack: contextlib.ExitStack, options: RunOptions | None) -> tuple[World, RunOptions]:
    """The processes of this job, until the stack is closed; only the first one reports."""
    leave_if_imported_again()
    stack.enter_context(preserve_process_state())
    world, options = stack.enter_context(join_process_group()), options or RunOptions()
    check_trackers(options.trackers)
    return world, options if world.is_first else replace(options, report=ignore, on_progress=ignore)


def _reopen(
    stack: contextlib.ExitStack,
    world: World,
    path: Path,
    options: RunOptions,
    task_name: str,
    requested: Overrides | BaseRecipe,
) -> tuple[Task, RunContext] | TrainResult:
    """The task and the context of a run, whose folder is locked until the stack is closed; its result if it is finished.

    The first process reads and broadcasts, so the other processes need no access to the run folder.
    """
    run = RunFolder.open(path) if world.is_first else RunFolder(path)
    recorded = None
    if world.is_first:
        stack.enter_context(run.lock())
        recorded = _read_run(run, task_name, requested, options)
    result, recipe, before, moved_to = cast(_RecordedRun, world.broadcast(recorded))
    context = RunContext(run, options)
    if result is not None:
        options.report(f"{path} is finished; nothing to do.")
        return result
    if before is None:  # a folder with nothing but its recipe, as --procs makes it
        task = build_task(recipe, options, world)
        if world.is_first:
            _write_setup(run, task, options)
        return task, context
    options = replace(
        options,
        fit_micro_batch=False,  # the recipe records what was found
        data_dir=options.data_dir or Path(str(before.get("data_dir", "data"))),
        device=options.device or str(before.get("device", "auto")),
        epochs=None,  # the recipe has the steps
        dataset=options.dataset or moved_to or None,
    )
    task = build_task(recipe, options, world, Path(str(before.get("started_in", ""))))
    if moved_to and task.data["fingerprint"] != before.get("fingerprint", task.data["fingerprint"]):
        raise RunError(f"{moved_to} does not hold the data that {path} was started with; start a new run.")
    for sentence in describe_differences(before, describe_machine(task), recipe):
        options.report(sentence)
    if world.is_first:
        add_trackers(run, options.trackers)
    return task, context


def _read_run(run: RunFolder, task_name: str, requested: Overrides | BaseRecipe, options: RunOptions) -> _RecordedRun:
    """Reads a run, and checks that its recipe is the requested one; a finished run is extended if it is to be longer."""
    values = run.read_recipe()
    name = values.get("task", task_name)
    if name not in TASKS:
        raise RunError(f"{run.path} is a run of the task {name!r}, which this version of resnetlab does not know.")
    task = TASKS[name]
    if name != task_name:
        raise RunError(f"{run.path} is a run of another task; {task.how_to_resume(run)}")
    before, environment = task.recipe_type.from_values(values), run.read_json("environment.json")
    asked = requested.data if isinstance(requested, Overrides) and isinstance(before, Recipe) and environment else None
    moved_to = asked if asked and sources.may_have_moved(before.data, asked) else ""
    if isinstance(requested, Overrides) and moved_to:
        requested = replace(requested, data=None)
    # the recipe of a restarted job: its micro-batch was found when the run began
    requested = requested.with_micro_batch_of(before) if isinstance(requested, BaseRecipe) else requested.apply(before)
    if options.epochs is not None and environment is not None:
        if "train_images" not in environment:
            raise UsageError(f"{run.path} does not record how many images it trains on; give --steps, not --epochs.")
        requested = options.epochs.apply(requested, int(environment["train_images"]))
    result = read_result(run, task)
    ends_early = isinstance(before, Recipe) and before.early_stop > 0
    if result is not None and result.steps != before.steps and not ends_early:
        result = None  # an extension was interrupted
    if result is not None and requested.steps > before.steps:
        if isinstance(before, Recipe):  # what only the caller has is asked for before anything is changed
            if options.dataset is None:
                sources.refuse_objects(before.data)
            if before.net.startswith(OWN):
                require_own_network(before, options.net)
        return _extend(run, before, requested, options)._replace(moved_to=moved_to)
    recipe = replace(before.skip_bad_images_like(requested), threads=requested.threads)
    if changes := requested.resolve_like(recipe).differences(recipe):
        raise RunError(
            f"{run.path} was started with another recipe: you ask for {'; '.join(changes)}. Resume without it, "
            "or start a new run."
        )
    if result is None:
        advice = advise_on_password(str(values["data"]))
        upgrade_run(run, recipe)
        if advice is not None:
            options.report(f"the password in {run.path / 'recipe.toml'} is removed; {advice}")
    if recipe.to_json() != before.to_json():
        write_atomically(run.path / "recipe.toml", recipe.to_toml())
    run.remove_temporary_files()
    return _RecordedRun(result, recipe, environment, moved_to)


def _extend(run: RunFolder, before: BaseRecipe, requested: BaseRecipe, options: RunOptions) -> _RecordedRun:
    """Makes a finished run unfinished: its last checkpoint becomes one of the longer recipe.

    Its schedule is that of the longer run from there on. A finished run keeps no optimizer state, so that starts from zero.
    """
    if changes := requested.resolve_like(before).differences(before.rescale(requested.steps)):
        raise RunError(
            f"{run.path} is extended with its own recipe, but you ask for {'; '.join(changes)}; leave it out."
        )
    recipe = before.rescale(requested.steps)
    change_identity(run, before, recipe)
    environment = run.read_json("environment.json") or {}
    environment["extended_after"] = sorted({*environment.get("extended_after", []), before.steps})
    run.write_json("environment.json", environment)
    write_atomically(run.path / "recipe.toml", recipe.to_toml())
    (run.path / "result.json").unlink()
    options.report(
        f"{run.path} is extended from {before.steps:,} to {recipe.steps:,} steps: its schedule is that of the longer run "
        "from here on, and the optimizer starts without its momentum, so the result is not that of a run of this length"
    )
    return _RecordedRun(None, recipe, environment)


def _write_setup(run: RunFolder, task: Task, options: RunOptions) -> None:
    """Writes the files that a run folder has from the start."""
    write_atomically(run.path / "recipe.toml", task.recipe.to_toml())
    if task.holdout:
        run.write_json("holdout.json", {split: list(names) for split, names in task.holdout.items()})
    data_dir = options.data_dir or Path("data")
    paths = {"data_dir": str(data_dir.resolve()), "started_in": str(Path.cwd())}
    add_trackers(run, options.trackers)
    counts = {"train_images": task.num_train_images, "fingerprint": task.data["fingerprint"]}
    run.write_json("environment.json", describe_machine(task) | {"decoder": jpeg_decoder()} | paths | counts)
