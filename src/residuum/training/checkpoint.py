"""Checkpoints: everything that the next step depends on, in one safetensors file, written atomically; the last two are kept.

Randomness needs no state (it is a function of seed and step), so a checkpoint holds the network with BN's statistics, the
momentum, the step, the warm-up's measured end, and the figures gathered since the last line of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residuum.errors import ModelFileError, RunError
from residuum.models.bundle import read_safetensors, write_safetensors
from residuum.records import Run, writing_error
from residuum.training.optim import SGD


@dataclass
class State:
    """Where a run stands, apart from the network and the optimizer."""

    step: int = 0  # steps done
    warm_since: int | None = None  # under the warm-up rule "train-error": when it ended
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last record; scalars
    errors: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # of training and judging so far
    step_seconds: float = 0.0  # of training steps alone


def save_checkpoint(run: Run, net: nn.Module, optimizer: SGD, state: State, identity: str) -> Path:
    """Writes checkpoints/step-<n>.safetensors and removes all but the last two.

    Args:
        identity: what the run's result depends on (recipe and data); a checkpoint of another identity is not continued.

    Raises:
        RunError: no space or no permission; the checkpoints before it stay.
    """
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"momentum.{name}": v for name, v in optimizer.momentum.items()}
    if state.losses:
        tensors |= {"losses": torch.stack(state.losses), "errors": torch.stack(state.errors)}
    about = {
        "identity": identity,
        "step": state.step,
        "warm_since": state.warm_since,
        "seconds": state.seconds,
        "step_seconds": state.step_seconds,
    }
    try:
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise writing_error(run.checkpoints, error) from error
    path = run.checkpoints / f"step-{state.step:08d}.safetensors"
    write_safetensors(path, tensors, about)
    for old in [other for other in checkpoints(run) if _step(other) < state.step][:-1]:
        with contextlib.suppress(OSError):  # one too many does no harm
            old.unlink()
    return path


def checkpoints(run: Run) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.checkpoints.glob("step-*.safetensors") if p.stem.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def restore(run: Run, net: nn.Module, optimizer: SGD, identity: str) -> tuple[State, list[str]]:
    """Brings network and optimizer to the latest whole checkpoint; a fresh state where there is none.

    Returns:
        The state, and a sentence for every damaged checkpoint that was passed over.

    Raises:
        RunError: the checkpoint belongs to another recipe or other data, or every checkpoint is damaged.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            tensors, about = read_safetensors(path, "checkpoint")
        except ModelFileError as error:
            passed_over.append(f"{error} Going on from the checkpoint before it.")
            continue
        if about.get("identity") != identity:
            raise RunError(
                f"{path} was made with another recipe or other data; start a new run, or put back what was changed."
            )
        try:
            return _apply(tensors, about, net, optimizer), passed_over
        except (KeyError, RuntimeError, TypeError) as error:
            raise RunError(f"{path} does not fit this run's network: {error}") from error
    if passed_over:
        raise RunError(
            f"every checkpoint in {run.checkpoints} is damaged; start a new run, this one's metrics.jsonl stays."
        )
    return State(), []


def _apply(tensors: dict[str, Tensor], about: dict[str, Any], net: nn.Module, optimizer: SGD) -> State:
    net.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    for name, parameter in net.named_parameters():
        optimizer.momentum[name] = torch.empty_like(parameter.detach()).copy_(tensors[f"momentum.{name}"])
    device = next(net.parameters()).device
    return State(
        step=about["step"],
        warm_since=about["warm_since"],
        losses=list(tensors["losses"].to(device).unbind()) if "losses" in tensors else [],
        errors=list(tensors["errors"].to(device).unbind()) if "errors" in tensors else [],
        seconds=about["seconds"],
        step_seconds=about["step_seconds"],
    )
