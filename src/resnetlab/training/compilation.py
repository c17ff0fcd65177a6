"""How training steps are executed: whether torch.compile pays off for a run, and whether a CUDA graph is tried."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace

from torch import nn

from resnetlab.device import DeviceConfig
from resnetlab.errors import UsageError
from resnetlab.models.cost import compute_cost
from resnetlab.models.own_network import OwnSpecification
from resnetlab.models.resnet import SmallImageWarning
from resnetlab.models.spec import Specification
from resnetlab.training.exchange import BUCKET_BYTES
from resnetlab.training.recipe import Recipe

# Measured on two cores with bf16 (docs/log.md) for a CIFAR net: the share of a step that compiling saves, what compiling costs,
# and the speed without it, counting 6 operations per multiply-add. At 224 pixels it saves nothing.
SAVED_SHARE, COMPILE_SECONDS, OPERATIONS_PER_SECOND = 0.04, 60.0, 240e9
MAX_COMPILED_SIZE = 64  # pixels on a side
# torch's modes that record CUDA graphs, whose memory the next forward pass takes again
GRAPH_MODES = ("reduce-overhead", "max-autotune")
# Recording takes the time of about ten steps. --verify-resume runs this many, so that it covers what runs do.
MIN_GRAPH_STEPS = 25


def choose_compilation(
    device_config: DeviceConfig, recipe: Recipe, spec: Specification | OwnSpecification, gradient_bytes: int
) -> DeviceConfig:
    """The device config with `compiled` and `cuda_graph` set from the recipe's `compile`, and the reason.

    Args:
        gradient_bytes: `count_gradient_bytes` of the network.

    Raises UsageError for one of torch.compile's modes that this device, or a run of this kind, cannot have.
    """
    if recipe.compile in ("on", "off"):
        reason = f"compile {recipe.compile} as requested"
        return replace(device_config, compiled=recipe.compile == "on", reason=f"{device_config.reason}; {reason}")
    if recipe.compile != "auto":
        _check_mode(device_config, recipe)
        return replace(device_config, compiled=True, compile_mode=recipe.compile)
    if device_config.device.type == "cuda":
        against = _reason_against_graph(device_config, recipe, gradient_bytes)
        reason = against or "steps are replayed if that is bit-identical"
        return replace(device_config, cuda_graph=not against, reason=f"{device_config.reason}; {reason}")
    against = _reason_not_to_compile(device_config, recipe, spec)
    reason = against or "the run is long enough for compiling to pay off"
    return replace(device_config, compiled=not against, reason=f"{device_config.reason}; {reason}")


def count_gradient_bytes(net: nn.Module) -> int:
    """Bytes of the gradients that several processes exchange in a step."""
    return sum(p.nbytes for p in net.parameters() if p.requires_grad)


def _check_mode(device_config: DeviceConfig, recipe: Recipe) -> None:
    mode = recipe.compile
    if device_config.device.type != "cuda":
        raise UsageError(f"compile={mode} is a mode for NVIDIA's GPUs; on this device use --compile on.")
    if mode.startswith("max-autotune") and recipe.exact:
        raise UsageError(
            f"compile={mode} chooses kernels by their speed, so a resumed run may differ in its last bits; allow that: "
            "--set exact=false."
        )
    if mode in GRAPH_MODES and device_config.world.size > 1:
        raise UsageError(
            f"compile={mode} replays CUDA graphs, in which several processes cannot communicate; use --compile on or "
            "max-autotune-no-cudagraphs."
        )


def _reason_not_to_compile(device_config: DeviceConfig, recipe: Recipe, spec: Specification | OwnSpecification) -> str:
    """Why not to compile; empty if compiling pays off."""
    if device_config.device.type != "cpu":
        return "not compiled: its effect was not measured on this kind of device"
    if isinstance(spec, OwnSpecification):
        return "not compiled: its effect was not measured on networks of others"
    if recipe.image_size > MAX_COMPILED_SIZE:
        return "not compiled: that saves nothing on images this large"
    if recipe.recompute or recipe.bn_sync:
        return "not compiled: recompute and bn_sync interrupt the graph"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    with warnings.catch_warnings(action="ignore", category=SmallImageWarning):  # the network itself warns
        cost = compute_cost(spec, (recipe.image_size, recipe.image_size))
    work = 6.0 * cost.multiply_adds * recipe.batch * recipe.steps
    if SAVED_SHARE * work / OPERATIONS_PER_SECOND < COMPILE_SECONDS:
        return "not compiled: the run is too short for compiling to pay off"
    if recipe.bn_batch and recipe.batch > recipe.bn_batch:
        return "not compiled: that does not speed up micro-batches side by side"
    return "" if compiler else "not compiled: there is no C++ compiler"


def _reason_against_graph(device_config: DeviceConfig, recipe: Recipe, gradient_bytes: int) -> str:
    """Why not to replay steps from a CUDA graph; empty if it is tried.

    A process exchanges its gradients after a replay. Those of a small network travel after the backward pass in any case.
    """
    if device_config.world.size > 1 and recipe.bn_sync:
        return "no CUDA graph: synchronised BN communicates in every layer"
    if device_config.world.size > 1 and gradient_bytes > BUCKET_BYTES:
        return "no CUDA graph: gradients are exchanged beside the backward pass"
    if recipe.recompute:
        return "no CUDA graph: recompute saves the random generator's state, which a graph cannot"
    return "" if recipe.steps >= MIN_GRAPH_STEPS else "no CUDA graph: the run is too short to pay for one"
