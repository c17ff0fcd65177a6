"""A recorded step is used only where it gives the step's own bits; the recording itself is tried where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from residuum.models.spec import specification
from residuum.runtime import Engine
from residuum.training.average import learn
from residuum.training.checkpoint import Learner
from residuum.training.compiling import compiling
from residuum.training.cuda_graph import Compute, GraphStep
from residuum.training.recipe import Recipe
from residuum.training.recipes import paper_cifar
from residuum.training.running import prepare_task
from residuum.training.step import Step, train_step
from residuum.training.verify import STEPS
from residuum.world import World
from test_learning import learner, tiny

GPU = Engine(torch.device("cuda"), "bf16", 2, "for the test")


def anew(compute: Compute) -> Compute:
    """What a CUDA graph does, without one: the same function of the same tensors, into the same results."""
    results = compute()

    def replay() -> list[torch.Tensor]:
        for x, y in zip(results, compute(), strict=True):
            x.copy_(y)
        return results

    return replay


def trained(recipe: Recipe, step: Step, device: str = "cpu") -> Learner:
    task, recipe = prepare_task(recipe, Path("data"), device, lambda _: None)
    here = Learner.fresh(task, recipe)
    learn(task.net)
    for t in range(4):
        step(here, here.task.parts(t), 0.1 / (t + 1))
    return here


@pytest.mark.parametrize("values", [{}, {"bn_batch": 8}, {"ema": 0.9, "clip_norm": 0.5}, {"stochastic_depth": 0.5}])
def test_recorded_steps_give_the_same_bits(values: dict[str, float]) -> None:
    said: list[str] = []
    recipe = tiny(**values)
    one, other = trained(recipe, GraphStep(said.append, anew)), trained(recipe, train_step)
    assert said == ["CUDA graph: every step is replayed from one recording"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def test_what_differs_when_replayed_is_not() -> None:
    """A network that draws anew in every part: a recording knows the first part's seed alone."""
    said: list[str] = []
    recipe = tiny(bn_batch=8, stochastic_depth=0.5)
    one, other = trained(recipe, GraphStep(said.append, anew)), trained(recipe, train_step)
    assert said == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def test_a_failed_recording_changes_nothing() -> None:
    def fails(compute: Compute) -> Compute:
        compute()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    said: list[str] = []
    one, other = trained(tiny(), GraphStep(said.append, fails)), trained(tiny(), train_step)
    assert said == ["CUDA graph: not used, since recording failed (operation not permitted when stream is capturing)"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


@pytest.mark.parametrize("frozen_bn", [False, True])
def test_a_recording_that_computes_nothing_is_not_used(frozen_bn: bool, tmp_path: Path) -> None:
    """What CUDA leaves of work that went to another stream: results that stand there, whatever the pictures are."""

    def stale(compute: Compute) -> Compute:
        results = compute()
        return lambda: results

    learner(tiny()).task.bundle({}, {}).save(tmp_path / "m.safetensors")  # type: ignore[attr-defined]
    recipe = tiny(start_from=str(tmp_path / "m.safetensors"), frozen_bn=frozen_bn)
    said: list[str] = []
    one, other = trained(recipe, GraphStep(said.append, stale)), trained(recipe, train_step)
    assert said == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def test_a_recording_that_holds_the_weights_is_not_used() -> None:
    """What a copy of them made before the recording would be, in autocast's cache, say: right in the first step alone."""
    here, twin, said = learner(tiny()), learner(tiny()), []
    weights = [p.detach() for p in here.task.net.parameters()]

    def holding(compute: Compute) -> Compute:
        then, replay = [w.clone() for w in weights], anew(compute)

        def held() -> list[torch.Tensor]:
            now = [w.clone() for w in weights]
            torch._foreach_copy_(weights, then)
            found = replay()
            torch._foreach_copy_(weights, now)
            return found

        return held

    step = GraphStep(said.append, holding)
    for t in range(2):
        step(here, here.task.parts(t), 0.1)
        train_step(twin, twin.task.parts(t), 0.1)
    assert said == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in twin.tensors().items():
        assert torch.equal(here.tensors()[name], tensor), name


def test_a_shorter_step_is_made_by_itself() -> None:
    """Pictures that cannot be read leave a step shorter than the recording."""
    step, here, twin = GraphStep(lambda _: None, anew), learner(tiny()), learner(tiny())
    for t, count in enumerate((32, 20, 32)):
        for each, by in ((here, step), (twin, train_step)):
            (part,) = each.task.parts(t)
            made = by(each, [type(part)(*(x[:count] for x in part))], 0.1)
        assert made.loss.isfinite()
    for name, tensor in twin.tensors().items():
        assert torch.equal(here.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("engine", "recipe", "graphs", "why"),
    [
        (GPU, paper_cifar(), True, "replayed where that gives the same bits"),
        (GPU, paper_cifar().shrunk(20), False, "too short"),
        (GPU, paper_cifar().shrunk(STEPS + 1), True, "replayed"),  # so that --verify-resume proves what runs do
        (GPU, replace(paper_cifar(), recompute=True), False, "recompute"),
        (GPU, replace(paper_cifar(), compile="off"), False, "as asked"),
        (replace(GPU, world=World(0, 2)), paper_cifar(), False, "several processes"),
    ],
)
def test_when_a_graph_is_tried(engine: Engine, recipe: Recipe, graphs: bool, why: str) -> None:
    chosen = compiling(engine, recipe, specification("resnet20", classes=10))
    assert (chosen.graphs, chosen.compiled) == (graphs, False) and why in str(chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("values", [{}, {"bn_batch": 8}])
def test_on_a_gpu(values: dict[str, float]) -> None:
    said: list[str] = []
    recipe = tiny(**values)
    one = trained(recipe, GraphStep(said.append), "cuda")
    assert said == ["CUDA graph: every step is replayed from one recording"]
    for name, tensor in trained(recipe, train_step, "cuda").tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name
