"""When torch.compile is worth its minute, that it computes the same, and that a compiled run resumes exactly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from residuum.models.resnet import build
from residuum.models.spec import specification
from residuum.runtime import Engine, pick_engine
from residuum.training.compiling import compiling
from residuum.training.recipe import Recipe
from residuum.training.recipes import paper_cifar, photos
from residuum.training.verify import verify

CPU = Engine(torch.device("cpu"), "bf16", 2, "for the test")
NET = specification("resnet20", classes=10)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize(
    ("recipe", "compiled", "why"),
    [
        (paper_cifar(), True, "long enough"),
        (paper_cifar().shrunk(2000), False, "too short"),
        (replace(paper_cifar().shrunk(2000), compile="on"), True, "as asked"),
        (replace(paper_cifar(), compile="off"), False, "as asked"),
        (replace(paper_cifar(), recompute=True), False, "interrupt"),
        (replace(photos(), steps=10**6), False, "pictures this large"),
    ],
)
def test_long_runs_on_small_pictures_are_compiled(recipe: Recipe, compiled: bool, why: str) -> None:
    engine = compiling(CPU, recipe, NET)
    assert engine.compiled == compiled and why in engine.why
    assert ("compiled (" in str(engine)) == compiled


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not compiling(CPU, paper_cifar(), NET).compiled


@needs_compiler
@pytest.mark.slow
def test_compiled_training_computes_the_same() -> None:
    engine = replace(pick_engine("fp32", "cpu", 1), compiled=True)
    net, twin = (build("resnet8", classes=10, seed=0).train() for _ in range(2))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = [forward(x).square().mean() for forward in (engine.forward(net), twin)]
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4)
    assert torch.equal(net.bn1.num_batches_tracked, twin.bn1.num_batches_tracked)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = replace(paper_cifar(), data="digits", net="resnet8", size=8, batch=32, bn_batch=0, threads=1, compile="on")
    assert verify(recipe, tmp_path, "cpu", None, print).startswith("exact")
