"""When torch.compile is used, that it computes the same, and that a compiled run resumes bit-identically."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnetlab.device import DeviceConfig, select_device
from resnetlab.distributed import World
from resnetlab.errors import UsageError
from resnetlab.models.resnet import build
from resnetlab.models.spec import get_specification
from resnetlab.training.compilation import choose_compilation
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import paper_cifar, photos
from resnetlab.training.step import compute_gradients
from resnetlab.training.verify import verify_resume
from tiny_runs import make_train_state, tiny

CPU = DeviceConfig(torch.device("cpu"), "bf16", 2, "for the test")
NET = get_specification("resnet20", classes=10)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("recipe", "compiled", "why"),
    [
        (replace(paper_cifar(), bn_batch=0), True, "long enough"),
        (paper_cifar(), False, "micro-batches side by side"),
        (paper_cifar().rescale(2000), False, "too short"),
        (replace(paper_cifar().rescale(2000), compile="on"), True, "as requested"),
        (replace(paper_cifar(), compile="off"), False, "as requested"),
        (replace(paper_cifar(), recompute=True), False, "interrupt"),
        (replace(photos(), steps=10**6), False, "images this large"),
    ],
)
def test_long_runs_on_small_images_are_compiled(recipe: Recipe, compiled: bool, why: str) -> None:
    engine = choose_compilation(CPU, recipe, NET, 0)
    assert engine.compiled == compiled and why in engine.reason
    assert ("compiled (" in str(engine)) == compiled


def test_the_choice_says_nothing_of_small_images() -> None:
    small = replace(photos(), image_size=64, bn_batch=0)  # the network that is trained warns; warnings are errors here
    assert "too short" in choose_compilation(CPU, small, get_specification("resnet18"), 0).reason


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no C++ compiler" in choose_compilation(CPU, replace(paper_cifar(), bn_batch=0), NET, 0).reason


GPU = replace(CPU, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("device_config", "values", "problem"),
    [
        (CPU, {"compile": "reduce-overhead"}, "a mode for NVIDIA's GPUs; on this device use --compile on"),
        (GPU, {"compile": "max-autotune"}, "may differ in its last bits; allow that: --set exact=false"),
        (replace(GPU, world=World(0, 2)), {"compile": "reduce-overhead"}, "several processes cannot communicate"),
        (replace(GPU, world=World(0, 2)), {"compile": "max-autotune", "exact": False}, "several processes cannot"),
    ],
)
def test_a_mode_that_a_run_cannot_have_is_refused(
    device_config: DeviceConfig, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        choose_compilation(device_config, replace(paper_cifar(), **values), NET, 0)


@pytest.mark.parametrize("mode", ["on", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_mode_on_a_gpu_is_the_compilers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda net, **options: asked.update(options) or net)
    recipe = replace(paper_cifar(), compile=mode, exact=mode != "max-autotune-no-cudagraphs")
    chosen = choose_compilation(GPU, recipe, NET, 0)
    assert (chosen.compiled, chosen.cuda_graph) == (True, False)
    assert ("compiled (" if mode == "on" else f"compiled for {mode} (") in str(chosen)
    with torch.backends.cudnn.flags(deterministic=recipe.exact):
        chosen.forward_fn(torch.nn.Identity())(torch.ones(1))
    expected = {"reduce-overhead": {"triton.cudagraphs"}, "on": set()}.get(
        mode, {"max_autotune", "coordinate_descent_tuning"}
    )
    assert {key for key, value in asked["options"].items() if value} == expected | (
        {"deterministic"} if recipe.exact else set()
    )
    assert asked["options"]["deterministic"] is recipe.exact


def test_gradients_that_a_graph_of_the_compiler_holds_are_copied() -> None:
    """The memory of a replayed graph is written again by the next micro-batch."""
    plain, reused = (make_train_state(tiny(bn_batch=16, batch=64)) for _ in range(2))
    config = replace(reused.task.device_config, compile_mode="reduce-overhead", side_by_side=1)
    reused.task = replace(reused.task, device_config=config)  # type: ignore[type-var]
    memory: dict[str, Tensor] = {}

    def write_into_memory(name: str, p: Tensor) -> None:
        memory.setdefault(name, torch.empty_like(p)).copy_(p.grad)  # type: ignore[arg-type]
        p.grad = memory[name]

    for name, p in reused.optimizer.parameters.items():
        p.register_post_accumulate_grad_hook(lambda p, name=name: write_into_memory(name, p))  # type: ignore[attr-defined]
    for here in (plain, reused):
        compute_gradients(here, here.task.micro_batches(0))
    for mine, theirs in zip(plain.optimizer.grads(), reused.optimizer.grads(), strict=True):
        assert torch.equal(mine, theirs)


@needs_compiler
@pytest.mark.slow
def test_compiled_training_computes_the_same() -> None:
    device_config = replace(select_device("fp32", "cpu", 1), compiled=True)
    net, twin = (build("resnet8", classes=10, seed=0).train() for _ in range(2))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = [forward(x).square().mean() for forward in (device_config.forward_fn(net), twin)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4)
    assert torch.equal(net.bn1.num_batches_tracked, twin.bn1.num_batches_tracked)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_bit_identically(tmp_path: Path) -> None:
    recipe = replace(
        paper_cifar(), data="digits", net="resnet8", image_size=8, batch=32, bn_batch=0, threads=1, compile="on"
    )
    assert verify_resume(recipe, tmp_path, "cpu", None, print).startswith("exact")
