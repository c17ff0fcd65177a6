"""The machine that a run trains on, and how it differs from the one that the run started on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resnetlab.device import environment
from resnetlab.training.recipe import BaseRecipe
from resnetlab.training.tasks.base import Task


def describe_machine(task: Task) -> dict[str, object]:
    """Versions and hardware of this machine."""
    device, processes = task.device_config.device, task.device_config.world.size
    return environment(device) | {
        "device": device.type,
        "processes": processes,
        "exact_resume": not task.reason_against_exact,
    }


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any], recipe: BaseRecipe) -> list[str]:
    """Sentences on differences between this machine and the one that the run started on."""
    sentences, keys = [], ("device", "cpu", "gpu", "torch")
    if other := [f"{key} {before.get(key)} (now {now[key]})" for key in keys if before.get(key) != now[key]]:
        sentences.append(
            f"the run started on another machine or version, so its last bits may differ: {', '.join(other)}"
        )
    fixed_bn = getattr(recipe, "bn", "") == "fixed" or getattr(recipe, "frozen_bn", False)
    same_bn = fixed_bn or recipe.bn_batch or getattr(recipe, "bn_sync", False)
    if (count := before.get("processes", 1)) != now["processes"] and not same_bn:
        sentences.append(
            f"the run started in {count} process{'es' * (count > 1)} (now {now['processes']}): BN sees each one's share "
            "of a step, so the result will differ; the images and their order do not."
        )
    return sentences
