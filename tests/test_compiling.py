"""When torch.compile is used, that it computes the same, and that a compiled run resumes bit-identically."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnetlab.device import DeviceConfig, select_device
from resnetlab.models.resnet import build
from resnetlab.models.spec import get_specification
from resnetlab.training.compilation import choose_compilation
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import paper_cifar, photos
from resnetlab.training.verify import verify_resume

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
    engine = choose_compilation(CPU, recipe, NET)
    assert engine.compiled == compiled and why in engine.reason
    assert ("compiled (" in str(engine)) == compiled


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no C++ compiler" in choose_compilation(CPU, replace(paper_cifar(), bn_batch=0), NET).reason


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
