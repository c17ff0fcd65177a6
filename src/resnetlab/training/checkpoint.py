"""Checkpoints: everything that the next step depends on, in one safetensors file, written atomically; the last two are kept.

Randomness needs no state (it is a function of seed and step), so a checkpoint holds the network with its BN statistics, the
optimizer's state, the moving average of the weights, the counters of `RunState`, and the losses and errors since the last line
of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from resnetlab import migrate_v01
from resnetlab.errors import ModelFileError, RunError
from resnetlab.random import seed_for
from resnetlab.run_folder import RunFolder, get_step, list_checkpoints, write_atomically, writing
from resnetlab.tensor_file import read_tensor_file, write_tensor_file
from resnetlab.training.average import WeightAverage
from resnetlab.training.exchange import GradientExchange
from resnetlab.training.micro_batches import BatchNormStatistics
from resnetlab.training.optim import OPTIMIZERS, Optimizer
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.run_state import RunState
from resnetlab.training.tasks.base import Task

BEST = "best.safetensors"  # beside the checkpoints: the weights of the lowest held-out error
_OPTIONAL_COUNTERS = ["replayed_steps", "loss_scale", "steps_at_scale", "skipped_updates"]  # one left out is 0
_COUNTERS = [f.name for f in fields(RunState) if f.name not in ("losses", "errors", *_OPTIONAL_COUNTERS)]


@dataclass
class TrainState:
    """Everything that a step changes: network (in `task`), optimizer, weight average and run state.

    Attributes:
        loss_scale: for fp16 a scalar on the device that losses are multiplied by before their backward pass.
    """

    task: Task
    optimizer: Optimizer
    average: WeightAverage
    statistics: BatchNormStatistics
    state: RunState
    exchange: GradientExchange | None = None  # of the gradients with the other processes, if there are any
    loss_scale: Tensor | None = None

    @staticmethod
    def create(task: Task) -> TrainState:
        """The state before the first step."""
        net, recipe = task.net, task.recipe
        average, config = WeightAverage(net, recipe.ema_decay), task.device_config
        optimizer = OPTIMIZERS[recipe.optimizer](net, recipe)
        exchange = None
        if config.world.size > 1:
            parameters = list(optimizer.parameters.values())
            reduce, compression = recipe.grad_reduce, recipe.grad_compression
            exchange = GradientExchange(parameters, config.world, reduce=reduce, compression=compression)
        scale = torch.empty((), device=config.device) if config.precision == "fp16" else None
        return TrainState(task, optimizer, average, BatchNormStatistics(net), RunState(), exchange, scale)

    @property
    def recipe(self) -> BaseRecipe:
        return self.task.recipe

    @property
    def is_done(self) -> bool:
        """Whether no step is left: all are done, or the held-out error has not fallen for long enough."""
        patience = self.recipe.early_stop if isinstance(self.recipe, Recipe) else 0
        return self.state.step >= self.recipe.steps or 0 < patience <= self.state.since_best

    def network_seed(self, micro_batch: int) -> int:
        """The seed of what the network draws (stochastic depth): a function of run, step and the micro-batch's number."""
        return seed_for(self.recipe.seed, "network", self.state.step, *([micro_batch] if micro_batch else []))

    def seed_network(self, micro_batch: int) -> None:
        """Seeds torch's global generator with `network_seed`."""
        torch.manual_seed(self.network_seed(micro_batch))

    @property
    def identity(self) -> str:
        """Hashes of recipe and data; a checkpoint with another identity is not continued."""
        return self._identify(self.recipe)

    def _identify(self, recipe: BaseRecipe) -> str:
        data = self.task.data
        return "/".join((recipe.ignoring_bad_images().key, data["fingerprint"], data.get("start_from", "")))

    def continues(self, identity: object) -> bool:
        """Whether a checkpoint of that identity is continued.

        A run that replays its steps from a CUDA graph keeps compile=auto and one that is not compiled has off: either goes on
        where the other was, on another device too.
        """
        forms = [self.recipe]
        if isinstance(self.recipe, Recipe) and self.recipe.compile in ("auto", "off"):
            forms = [replace(self.recipe, compile=form) for form in ("auto", "off")]
        return any(identity == self._identify(form) for form in forms)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, but for the losses and errors."""
        return {
            **{f"net.{k}": v for k, v in self.task.net.state_dict().items()},
            **self.optimizer.state,
            **{f"average.{k}": v for k, v in self.average.tensors.items()},
        }


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, each from a copy, while training goes on."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, train_state: TrainState) -> None:
        """Copies the state and starts writing it, after the checkpoint before is written; raises the errors of that one."""
        self.wait()
        _make_folder(self._run)
        state, tensors = train_state.state, train_state.tensors()
        if state.losses:
            tensors |= {"losses": torch.stack(state.losses), "errors": torch.stack(state.errors)}
        counters = _COUNTERS + [name for name in _OPTIONAL_COUNTERS if getattr(state, name)]
        metadata = {"identity": train_state.identity} | {name: getattr(state, name) for name in counters}
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._writing = self._pool.submit(_write_checkpoint, self._run, state.step, copies, metadata)

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written, as `wait` does, without waiting for one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            RunError: no space or no permission; earlier checkpoints remain.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread, after what it writes."""
        self._pool.shutdown()


def _make_folder(run: RunFolder) -> None:
    with writing(run.checkpoints):
        run.checkpoints.mkdir(exist_ok=True)


def _write_checkpoint(run: RunFolder, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes checkpoints/step-<n>.safetensors and removes all but the last two."""
    write_tensor_file(run.checkpoints / f"step-{step:08d}.safetensors", tensors, metadata)
    for old in [other for other in list_checkpoints(run) if get_step(other) < step][:-1]:
        with contextlib.suppress(OSError):  # an extra checkpoint does no harm
            old.unlink()


def save_best(run: RunFolder, train_state: TrainState) -> None:
    """Writes the network as it is now as the best one so far; a resumed run repeats that from its checkpoint on."""
    _make_folder(run)
    metadata = {"identity": train_state.identity, "step": train_state.state.step}
    write_tensor_file(run.checkpoints / BEST, dict(train_state.task.net.state_dict()), metadata)


def load_best(run: RunFolder, train_state: TrainState) -> None:
    """Puts the best weights into the network, in every process. Raises RunError if the file is missing or another run's."""
    world, problem = train_state.task.device_config.world, ""
    state = train_state.task.net.state_dict()
    if world.is_first:
        try:
            tensors, metadata = read_tensor_file(run.checkpoints / BEST, "checkpoint")
            # the data's part of the identity: a run may have been extended
            known = str(metadata.get("identity")).partition("/")[2], metadata.get("step")
            if known == (train_state.identity.partition("/")[2], train_state.state.best_step):
                for name, value in state.items():
                    value.copy_(tensors[name])
            else:
                problem = "is of another run or step"
        except (ModelFileError, KeyError, RuntimeError) as error:
            problem = f"cannot be read ({error})"
    if problem := world.broadcast(problem):
        raise RunError(f"{run.checkpoints / BEST} {problem}; remove the newest checkpoint there, and resume.")
    if world.size > 1:
        world.broadcast(None, *state.values())


def upgrade_run(run: RunFolder, recipe: BaseRecipe) -> None:
    """Rewrites the files of an unfinished run of version 0.1, or with a password in recipe.toml, so that it resumes.

    recipe.toml comes last. Damaged checkpoints, and those of another recipe, stay as they are: restoring them reports it.
    """
    values, resumed = run.read_raw_recipe(), recipe.ignoring_bad_images()
    if migrate_v01.is_recipe(values):
        old_key = migrate_v01.recipe_key(values)
    elif values["data"] != recipe.data:
        old_key = resumed.key_with_data(values["data"])
    else:
        return
    for path in list_checkpoints(run):
        with contextlib.suppress(ModelFileError):
            tensors, metadata = read_tensor_file(path, "checkpoint")
            del metadata["format"]
            if (identity := str(metadata["identity"])).startswith(old_key):
                write_tensor_file(path, tensors, metadata | {"identity": identity.replace(old_key, resumed.key, 1)})
    for old, new in migrate_v01.RUN_FILES.items():
        if migrate_v01.is_recipe(values) and (content := run.read_json(old)) is not None:
            run.write_json(new, migrate_v01.migrate_environment(content))
    write_atomically(run.path / "recipe.toml", recipe.to_toml())


def change_identity(run: RunFolder, before: BaseRecipe, recipe: BaseRecipe) -> None:
    """Makes the last checkpoint of a finished run one of another recipe; raises RunError if there is none.

    It may have been changed by an extension that was interrupted.
    """
    new = recipe.ignoring_bad_images().key
    for path in list_checkpoints(run)[-1:]:
        tensors, metadata = read_tensor_file(path, "checkpoint")
        _, _, data = str(metadata.get("identity")).partition("/")
        if metadata.get("step") == before.steps:
            return write_tensor_file(path, tensors, metadata | {"identity": f"{new}/{data}"})
        if getattr(before, "early_stop", 0):
            raise RunError(
                f"{run.path} ended early, after step {metadata.get('step')} of {before.steps:,}, since its held-out error "
                f"fell no more; start a new run from its weights with --start-from {run.model}."
            )
    raise RunError(
        f"{run.checkpoints} has no checkpoint of the last step, so the run cannot be extended; start a new one with "
        f"--start-from {run.model}."
    )


def drop_optimizer_state(run: RunFolder) -> None:
    """Removes what a finished run no longer needs: all checkpoints but the last, and the optimizer's state in that one."""
    for last in list_checkpoints(run)[-1:]:
        with contextlib.suppress(ModelFileError, RunError):  # no space: the run is finished all the same
            tensors, metadata = read_tensor_file(last, "checkpoint")
            write_tensor_file(last, {k: v for k, v in tensors.items() if not _is_optimizer_state(k)}, metadata)
    for other in list_checkpoints(run)[:-1]:
        with contextlib.suppress(OSError):
            other.unlink()


def _is_optimizer_state(name: str) -> bool:
    return not name.startswith(("net.", "average.")) and name not in ("losses", "errors")


def restore_checkpoint(run: RunFolder, train_state: TrainState) -> list[str]:
    """Loads the latest intact checkpoint into the state; does nothing if there is none.

    The first process reads and broadcasts, so the other processes need no access to the run folder.

    Returns:
        A sentence for every damaged checkpoint that was skipped.

    Raises:
        RunError: the checkpoint belongs to another recipe or other data, or every checkpoint is damaged.
    """
    world = train_state.task.device_config.world
    skipped = _read_latest(run, train_state) if world.is_first else []
    if world.size > 1:
        state, device = train_state.state, train_state.task.device_config.device
        on_cpu = replace(state, losses=[x.cpu() for x in state.losses], errors=[x.cpu() for x in state.errors])
        state, skipped, moving = world.broadcast((on_cpu, skipped, bool(train_state.optimizer.state)))
        state.losses, state.errors = [x.to(device) for x in state.losses], [x.to(device) for x in state.errors]
        train_state.state = state
        if moving and not world.is_first:
            train_state.optimizer.init_state()
        world.broadcast(None, *train_state.tensors().values())
    return skipped


def _read_latest(run: RunFolder, train_state: TrainState) -> list[str]:
    skipped: list[str] = []
    for path in reversed(list_checkpoints(run)):
        try:
            tensors, metadata = read_tensor_file(path, "checkpoint")
        except ModelFileError as error:
            skipped.append(f"{error} Resuming from the checkpoint before it.")
            continue
        if not train_state.continues(metadata.get("identity")):
            raise RunError(
                f"{path} was made with another recipe or other data; start a new run, or put back what was changed."
            )
        try:
            _apply(tensors, metadata, train_state)
        except (KeyError, RuntimeError, TypeError) as error:
            raise RunError(f"{path} does not fit this run's network: {error}") from error
        return skipped
    if skipped:
        raise RunError(
            f"every checkpoint in {run.checkpoints} is damaged; start a new run, this one's metrics.jsonl stays."
        )
    return []


@torch.no_grad()
def _apply(tensors: dict[str, Tensor], metadata: dict[str, Any], train_state: TrainState) -> None:
    if any(map(_is_optimizer_state, tensors)):
        train_state.optimizer.init_state()  # a finished run has none
    for name, tensor in train_state.tensors().items():
        tensor.copy_(tensors[name])
    device = train_state.task.device_config.device
    unrecorded: dict[str, Any] = {
        k: list(tensors[k].to(device).unbind()) if k in tensors else [] for k in ("losses", "errors")
    }
    counters = [name for name in _COUNTERS + _OPTIONAL_COUNTERS if name in metadata]  # older runs have fewer
    train_state.state = RunState(**{name: metadata[name] for name in counters}, **unrecorded)
