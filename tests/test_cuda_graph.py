"""A recorded step is used only if it is bit-identical to the step; recording itself is tested on a GPU."""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from process_groups import call_in_processes
from resnetlab import graph_capture
from resnetlab.device import DeviceConfig
from resnetlab.distributed import World
from resnetlab.graph_capture import Compute, GraphedFunction
from resnetlab.models.backbone import Backbone, prepare_backbone
from resnetlab.models.resnet import build
from resnetlab.models.spec import get_specification
from resnetlab.run_folder import RunFolder
from resnetlab.stopping import StopRequest
from resnetlab.training import backbone_graph, cuda_graph
from resnetlab.training.average import set_train_mode
from resnetlab.training.backbone_graph import BackboneGraph
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.compilation import choose_compilation
from resnetlab.training.cuda_graph import GraphGradients
from resnetlab.training.exchange import BUCKET_BYTES
from resnetlab.training.micro_batches import TreeMean
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import paper_cifar
from resnetlab.training.recorder import Recorder, RunContext
from resnetlab.training.step import Gradients, compute_gradients, train_step
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.train import RunOptions, build_task
from resnetlab.training.verify import STEPS
from tiny_runs import make_train_state, tiny

BF16: dict[str, Any] = {"precision": "bf16"}  # the default on a GPU
GPU = DeviceConfig(torch.device("cuda"), "bf16", 2, "for the test")


def anew(compute: Compute) -> Compute:
    """A CUDA graph in Python: the same function of the same tensors, into the same results."""
    results = compute()

    def replay() -> list[torch.Tensor]:
        for x, y in zip(results, compute(), strict=True):
            x.copy_(y)
        return results

    return replay


def trained(recipe: Recipe, gradients: Gradients, device: str = "cpu", world: World | None = None) -> TrainState:
    task = build_task(recipe, RunOptions(device=device), world)
    here = TrainState.create(task)
    set_train_mode(task.net)
    for t in range(4):
        train_step(here, here.task.micro_batches(t), 0.1 / (t + 1), gradients)
    return here


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bn_batch": 8},
        {"ema_decay": 0.9, "clip_norm": 0.5},
        {"stochastic_depth": 0.5},
        BF16,
        BF16 | {"bn_batch": 8},
    ],
)
def test_recorded_steps_are_bit_identical(values: dict[str, Any]) -> None:
    messages: list[str] = []
    recipe = tiny(**values)
    one, other = trained(recipe, GraphGradients(messages.append, anew)), trained(recipe, compute_gradients)
    assert messages == ["CUDA graph: full steps are replayed from one recording"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def fail_to_record(compute: Compute) -> Compute:
    compute()
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "values", [{"bn_batch": 8}, {"bn_batch": 16, "stochastic_depth": 0.5}, BF16 | {"bn_batch": 16, "clip_norm": 0.5}]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_processes_that_exchange_after_a_replay_are_bit_identical_to_one(values: dict[str, Any], mixed: bool) -> None:
    """Also where one process cannot record and computes every step, and exchanges while it does."""
    recipe = tiny(**values)

    def train(world: World) -> tuple[dict[str, Any], list[str], int]:
        messages: list[str] = []
        record = fail_to_record if mixed and world.rank == 1 else anew
        here = trained(recipe, GraphGradients(messages.append, record), world=world)
        return (
            {name: tensor.float().numpy() for name, tensor in here.tensors().items()},
            messages,
            here.state.replayed_steps,
        )

    expected = trained(recipe, compute_gradients).tensors()
    for rank, (tensors, messages, replayed) in enumerate(call_in_processes(2, train)):
        fails = mixed and rank == 1
        assert (replayed, "recording failed" in messages[0]) == ((0, True) if fails else (4, False)), messages
        for name, tensor in expected.items():
            assert torch.equal(torch.from_numpy(tensors[name]), tensor.float()), name


def test_the_first_process_alone_records_how_its_steps_are_executed(tmp_path: Path) -> None:
    """The others may have no access to the run folder."""
    here, said = make_train_state(tiny()), list[str]()
    context = RunContext(RunFolder(tmp_path / "run"), RunOptions(device="cpu", report=said.append))
    for rank in (1, 0):
        if rank == 0:
            assert not (tmp_path / "run").exists()
            (tmp_path / "run").mkdir()
        task: Any = replace(here.task, device_config=replace(here.task.device_config, world=World(rank, 2)))  # type: ignore[type-var]
        recorder = Recorder(replace(here, task=task), context, StopRequest())
        with recorder.closing():
            recorder.report_graph("CUDA graph: used")
    assert said == ["CUDA graph: used"]
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {"steps": "CUDA graph: used"}


def test_a_recording_has_the_scale_of_the_step() -> None:
    """fp16's scale changes while a run overflows; a recording has its address, not its value."""
    recipe, ended = tiny(precision="fp16"), []
    for gradients in (GraphGradients(lambda _: None, anew), compute_gradients):
        here = make_train_state(recipe)
        here.state.loss_scale = 2.0**34
        for t in range(4):
            train_step(here, here.task.micro_batches(t), 0.1, gradients)
        ended.append(here)
    assert ended[0].state.skipped_updates == ended[1].state.skipped_updates > 0
    assert ended[0].state.replayed_steps == 4
    for name, tensor in ended[1].tensors().items():
        assert torch.equal(ended[0].tensors()[name], tensor), name


@pytest.mark.parametrize(("error", "used"), [(1e-5, True), (0.1, False)])
def test_with_exact_false_a_recording_may_differ_in_its_last_bits(error: float, used: bool) -> None:
    def nearly(compute: Compute) -> Compute:
        replay = anew(compute)
        return lambda: [x * (1 + error) for x in replay()]

    for exact in (True, False):
        messages: list[str] = []
        here = make_train_state(tiny(exact=exact))
        train_step(here, here.task.micro_batches(0), 0.1, GraphGradients(messages.append, nearly))
        assert ("replayed from one recording" in messages[0]) is (used and not exact)


def test_what_differs_when_replayed_is_not() -> None:
    """A network that draws in every micro-batch: a recording has the seed of the first one only."""
    messages: list[str] = []
    recipe = tiny(bn_batch=8, stochastic_depth=0.5)
    one, other = trained(recipe, GraphGradients(messages.append, anew)), trained(recipe, compute_gradients)
    assert messages == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def test_a_failed_recording_changes_nothing() -> None:
    messages: list[str] = []
    one, other = trained(tiny(), GraphGradients(messages.append, fail_to_record)), trained(tiny(), compute_gradients)
    assert messages == [
        "CUDA graph: not used, since recording failed (operation not permitted when stream is capturing)"
    ]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


@pytest.mark.parametrize("frozen_bn", [False, True])
def test_a_recording_that_computes_nothing_is_not_used(frozen_bn: bool, tmp_path: Path) -> None:
    """Simulates work on another stream, which a graph misses: results that do not depend on the images."""

    def stale(compute: Compute) -> Compute:
        results = compute()
        return lambda: results

    make_train_state(tiny()).task.trained_model({}).save(tmp_path / "m.safetensors")  # type: ignore[attr-defined]
    recipe = tiny(start_from=str(tmp_path / "m.safetensors"), frozen_bn=frozen_bn)
    messages: list[str] = []
    one, other = trained(recipe, GraphGradients(messages.append, stale)), trained(recipe, compute_gradients)
    assert messages == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in other.tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name


def test_a_recording_that_holds_the_weights_is_not_used() -> None:
    """Simulates a copy of the weights made before the recording, as in autocast's cache: right in the first step only."""
    here, twin, messages = make_train_state(tiny()), make_train_state(tiny()), []
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

    gradients = GraphGradients(messages.append, holding)
    for t in range(2):
        train_step(here, here.task.micro_batches(t), 0.1, gradients)
        train_step(twin, twin.task.micro_batches(t), 0.1)
    assert messages == ["CUDA graph: not used, since a replayed step differs from the step itself"]
    for name, tensor in twin.tensors().items():
        assert torch.equal(here.tensors()[name], tensor), name


def test_a_shorter_step_is_made_by_itself() -> None:
    """Unreadable images make a step smaller than the recording."""
    here, twin, graph = make_train_state(tiny()), make_train_state(tiny()), GraphGradients(lambda _: None, anew)
    for t, count in enumerate((32, 20, 32)):
        for each, gradients in ((here, graph), (twin, compute_gradients)):
            (part,) = each.task.micro_batches(t)
            made = train_step(each, [type(part)(*(x[:count] for x in part))], 0.1, gradients)
        assert made.loss.isfinite()
    for name, tensor in twin.tensors().items():
        assert torch.equal(here.tensors()[name], tensor), name


def take(train_state: TrainState, t: int, count: int) -> list[Any]:
    """The first `count` images of a step."""
    (batch,) = train_state.task.micro_batches(t)
    return [type(batch)(*(x[:count] for x in batch))]


def test_the_first_full_step_is_recorded_and_replays_are_counted() -> None:
    here, messages = make_train_state(tiny()), []
    graph = GraphGradients(messages.append, anew)
    for t, count in enumerate((20, 32, 32, 20, 32)):
        train_step(here, take(here, t, count), 0.1, graph)
        assert (here.state.replayed_steps, bool(messages)) == ((0, 1, 2, 2, 3)[t], t > 0)
    assert messages == ["CUDA graph: full steps are replayed from one recording"]


def test_a_graph_that_leaves_no_memory_for_a_short_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    here, twin, messages = make_train_state(tiny()), make_train_state(tiny()), []
    graph, loss, short = GraphGradients(messages.append, anew), ClassificationTask.loss, [True]

    def short_of_memory(task: ClassificationTask, batch: Any) -> Any:
        result = loss(task, batch)
        if len(batch[0]) == 20 and short:
            short.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return result

    monkeypatch.setattr(ClassificationTask, "loss", short_of_memory)
    for t, count in enumerate((32, 20, 32)):
        train_step(here, take(here, t, count), 0.1, graph)
        train_step(twin, take(twin, t, count), 0.1)
    assert len(messages) == 2 and "given up" in messages[1] and here.state.replayed_steps == 1
    for name, tensor in twin.tensors().items():
        assert torch.equal(here.tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("device_config", "recipe", "graphs", "why"),
    [
        (GPU, paper_cifar(), True, "replayed if that is bit-identical"),
        (GPU, paper_cifar().rescale(20), False, "too short"),
        (GPU, paper_cifar().rescale(STEPS + 1), True, "replayed"),  # so that --verify-resume proves what runs do
        (GPU, replace(paper_cifar(), recompute=True), False, "recompute"),
        (GPU, replace(paper_cifar(), compile="off"), False, "as requested"),
        (replace(GPU, world=World(0, 2)), paper_cifar(), True, "replayed if that is bit-identical"),
        (replace(GPU, world=World(0, 2)), replace(paper_cifar(), bn_sync=True), False, "synchronised BN communicates"),
    ],
)
def test_when_a_graph_is_tried(device_config: DeviceConfig, recipe: Recipe, graphs: bool, why: str) -> None:
    spec = get_specification("resnet20", classes=10)
    chosen = choose_compilation(device_config, recipe, spec, BUCKET_BYTES)
    assert (chosen.cuda_graph, chosen.compiled) == (graphs, False) and why in str(chosen)
    larger = choose_compilation(device_config, recipe, spec, BUCKET_BYTES + 1)  # its exchange has work to hide behind
    assert larger.cuda_graph is (graphs and device_config.world.size == 1)


def record_cuda_graph_nowhere(compute: Compute) -> Compute:
    compute()
    raise RuntimeError("no stream\nmore")


class Weights(torch.nn.Module):
    """A network with several results, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls, self.recording = torch.nn.Conv2d(3, 4, 3), 0, False

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not (self.recording and torch.is_autocast_cache_enabled()), "casts of the weights would be freed"
        self.calls += 1
        y = self.conv(x)
        return {"a": y, "b": y.amax((2, 3))}


@torch.no_grad()
def test_predictions_of_a_shape_that_comes_again_are_replayed() -> None:
    net, recorded = Weights(), [0]

    def record(compute: Compute) -> Compute:
        recorded[0] += 1
        net.recording = True
        replay = anew(compute)
        net.recording = False

        def replay_without_calls() -> list[torch.Tensor]:  # kernels are launched, not the function called
            calls, results = net.calls, replay()
            net.calls = calls
            return results

        return replay_without_calls

    function = GraphedFunction(net.forward, 2, record)
    images = [torch.randn(n, 3, 8, 8) for n in (1, 1, 2, 3, 2, 1, 3, 3)]
    kept = []
    for i, x in enumerate(images):
        calls, found = net.calls, function(x)
        assert all(torch.equal(found[key], value) for key, value in net(x).items())
        kept.append((found, {key: value.clone() for key, value in found.items()}))
        # the first of a size calls the network, the second records it, later ones replay; the third size has no graph
        assert (net.calls - calls == 1) is (i == 5) and recorded[0] == (0, 1, 1, 1, 2, 2, 2, 2)[i]
    assert all(torch.equal(x[key], y[key]) for x, y in kept for key in x), "a replay overwrites earlier results"
    with torch.enable_grad():
        assert function(torch.randn(1, 3, 8, 8))["a"].requires_grad
    again = pickle.loads(pickle.dumps(GraphedFunction(net.forward, 2)))
    assert torch.equal(again(images[0])["a"], net(images[0])["a"])
    with torch.autocast("cpu", torch.bfloat16):
        assert [function(images[0])["a"].dtype for _ in range(3)] == [torch.bfloat16] * 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("record", "why"),
    [
        (lambda compute: partial(lambda results: results, compute()), "a replay differs from the network itself"),
        (record_cuda_graph_nowhere, "no stream"),
    ],
    ids=["stale", "failed"],
)
def test_predictions_whose_recording_is_wrong_are_computed_as_before(record: Any, why: str) -> None:
    net, x = Weights(), torch.randn(2, 3, 8, 8)
    function = GraphedFunction(net.forward, 2, record)
    expected = net(x)
    assert torch.equal(function(x)["b"], expected["b"])
    with pytest.warns(UserWarning, match=rf"CUDA graph: not used for predictions \({why}\)"):
        assert torch.equal(function(x)["b"], expected["b"])
    with warnings.catch_warnings(action="error"):
        assert torch.equal(function(x)["b"], expected["b"])


class Held(dict[str, list[torch.Tensor]]):
    """What a graph in Python holds."""

    alive: ClassVar[weakref.WeakSet[Held]] = weakref.WeakSet()
    __hash__ = object.__hash__


def graph_in_python(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    """torch.cuda.make_graphed_callables in Python: input, results and gradients have fixed addresses."""
    (x,), parameters, forward = arguments, [p for p in module.parameters() if p.requires_grad], module.forward
    held = Held()
    Held.alive.add(held)
    structure = tree_flatten(forward(x))[1]  # the warm-up, which moves BN's averages

    def overwrite(key: str, values: Any) -> list[torch.Tensor]:
        values = [value.detach() for value in values]
        for buffer, value in zip(held.setdefault(key, [v.clone() for v in values]), values, strict=True):
            buffer.copy_(value)
        return [buffer.detach() for buffer in held[key]]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor, *_: torch.Tensor) -> Any:
            x.copy_(y)
            with torch.enable_grad():
                ctx.results = tree_flatten(forward(x))[0]
            return tuple(overwrite("maps", ctx.results))

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return None, *overwrite("grads", torch.autograd.grad(ctx.results, parameters, grads))

    def replay(y: torch.Tensor) -> Any:
        return tree_unflatten(list(Graphed.apply(y, *parameters)), structure)

    module.forward = replay  # as torch does
    return module


def wrong_graph_in_python(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    stale = [y.detach().requires_grad_() for y in tree_flatten(module(*arguments))[0]]
    structure, anchor = tree_flatten(module(*arguments))[1], sum(p.sum() * 0 for p in module.parameters())
    return lambda _: tree_unflatten([y + anchor for y in stale], structure)


def failing_graph(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    module(*arguments)
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (graph_in_python, ["replayed for batches of one size", "given up, since a batch has another size"]),
        (wrong_graph_in_python, ["not used, since a replay differs from the backbone itself"]),
        (failing_graph, ["not used, since recording failed (operation not permitted when stream is capturing)"]),
    ],
)
def test_a_backbone_is_replayed_while_batches_have_one_size(make: Any, said: list[str]) -> None:
    """Weights, statistics and results after micro-batches, steps, an evaluation and a batch of another size."""
    ended: list[dict[str, torch.Tensor]] = []
    messages: list[str] = []
    for graphed in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Module()
        net.backbone = Backbone(build("resnet18", seed=0, widths=(8,) * 4, depths=(1,) * 4), {"C3": "0", "C5": "1"})
        prepare_backbone(net.backbone.body, "C2", "live")
        if graphed:
            BackboneGraph(net.backbone, True, messages.append, make)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01)
        for step, side in enumerate((66, 66, 66, 66, 66, 70, 66)):
            mean = TreeMean(World())
            for _ in range(2):
                maps = net.backbone(torch.rand(2, 3, side, side))
                sum(y.square().mean() for y in maps.values()).backward()
                mean.add([p.grad for p in net.parameters() if p.grad is not None])
                net.zero_grad()
            for p, grad in zip([p for p in net.parameters() if p.requires_grad], mean.result(), strict=True):
                p.grad = grad
            optimizer.step()
            net.zero_grad()
            net.eval()
            with torch.inference_mode():
                maps = net.backbone(torch.rand(1, 3, 68, 68))
            net.train()
            if graphed:  # two micro-batches a step: at the fourth, and where another size comes
                assert len(messages) == (0, 1, 1, 1, 1, len(said), len(said))[step]
                assert bool(Held.alive) is (make is graph_in_python and 0 < step < 5), (
                    "a graph that is given up is freed"
                )
        ended.append({**net.state_dict(), **maps})
    assert all(m.startswith(f"CUDA graph of the backbone: {x}") for m, x in zip(messages, said, strict=True))
    for name, value in ended[1].items():
        assert torch.equal(ended[0][name], value), name


@pytest.mark.parametrize("given", [{}, {"stream": "torch's own", "capture_error_mode": "global"}])
def test_a_backbone_is_captured_on_its_device_beside_threads_that_pin_memory(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a version of torch gives to its captures: a call of such a thread would end one whose mode is global."""
    devices, captured = [], []

    def make(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.nn.Module:
        with torch.cuda.graph("a graph", pool="a pool", **given):  # type: ignore[arg-type]
            assert graph_capture.capturing.locked()
        return module

    monkeypatch.setattr(torch.cuda, "device", lambda x: devices.append(x) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: f"a stream of {devices[-1]}")
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **kwargs: captured.append(kwargs) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    capture = torch.cuda.graph
    backbone_graph.make_graphed_callables(torch.nn.Identity(), (torch.zeros(1),))
    assert captured == [{"pool": "a pool", "stream": "a stream of cpu", "capture_error_mode": "thread_local"}]
    assert torch.cuda.graph is capture


class Stream:
    """A stream of a GPU that is not there."""

    def __init__(self, *_: object) -> None:
        self.wait_stream = lambda _: None


def test_captures_for_predictions_share_memory_and_let_other_threads_synchronise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured: list[tuple[Any, Any]] = []
    switched: list[Any] = []

    class Garbage:
        """A graph of an earlier run, which is part of a cycle."""

        def __init__(self) -> None:
            self.itself = self

    def capture(graph: Any, pool: Any, *, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local" and graph_capture.capturing.locked() and garbage() is None
        captured.append((pool, stream))
        return contextlib.nullcontext()

    for name, fake in {
        **dict.fromkeys(("device", "stream"), contextlib.nullcontext),
        **dict.fromkeys(("Stream", "current_stream", "graph_pool_handle"), Stream),
        **dict.fromkeys(("empty_cache", "get_sync_debug_mode"), lambda: 0),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": capture,
        "set_sync_debug_mode": switched.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    garbage = weakref.ref(Garbage())
    function = GraphedFunction(lambda x: x.new_ones(2), 4)
    for mode in (torch.inference_mode, torch.no_grad):  # what is captured in one mode is used in the other
        for count in (1, 1, 2, 2):
            with mode():
                assert function(torch.zeros(count)).tolist() == [1, 1]
    assert len(captured) == 2 and captured[0] == captured[1] and not switched
    graph_capture.record_cuda_graph(list, torch.device("cpu"), fail_on_sync=True)
    assert switched == ["error", 0] and captured[2][0] is None and captured[2][1] is not captured[0][1]
    asked: list[Any] = []

    def record(compute: Any, *, on_capture: Callable[[int], None], **given: Any) -> Any:
        asked.append(given)
        on_capture(431)
        return anew(compute)

    monkeypatch.setattr(cuda_graph, "record_cuda_graph", record)
    here = make_train_state(tiny())
    train_step(here, here.task.micro_batches(0), 0.1, GraphGradients(asked.append))
    assert here.state.replayed_steps == 1 and asked == [
        {"device": torch.device("cpu"), "fail_on_sync": True},
        "CUDA graph: full steps are replayed from one recording of 431 kernels, copies and fills",
    ]


def test_what_a_graph_holds_is_counted_where_the_driver_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Callable[[Any], None]] = []
    graph = SimpleNamespace(replay=lambda: None, raw_cuda_graph=lambda: 77, register_capture_end_hook=hooks.append)

    @contextlib.contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        yield
        for hook in hooks:
            hook(graph)

    def get_nodes(handle: Any, nodes: None, count: Any) -> int:
        count._obj.value = handle.value + 1
        return 0

    for name, fake in {
        **dict.fromkeys(("device", "stream"), contextlib.nullcontext),
        **dict.fromkeys(("Stream", "current_stream"), Stream),
        "empty_cache": lambda: None,
        "CUDAGraph": lambda: graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def find_driver(_: str) -> SimpleNamespace:
        return SimpleNamespace(cuGraphGetNodes=get_nodes)

    def find_none(name: str) -> SimpleNamespace:
        raise OSError(f"{name} cannot be opened")

    for find, count in ((find_driver, 78), (find_none, 0), (lambda _: SimpleNamespace(), 0)):
        monkeypatch.setattr(graph_capture.ctypes, "CDLL", find)
        found: list[int] = []
        graph_capture.record_cuda_graph(list, torch.device("cpu"), on_capture=found.append)
        assert found == [count]
        hooks.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("values", [{}, {"bn_batch": 8}, BF16, BF16 | {"bn_batch": 8}])
def test_on_a_gpu(values: dict[str, Any]) -> None:
    messages: list[str] = []
    recipe = tiny(**values)
    one = trained(recipe, GraphGradients(messages.append), "cuda")
    assert messages == ["CUDA graph: full steps are replayed from one recording"]
    for name, tensor in trained(recipe, compute_gradients, "cuda").tensors().items():
        assert torch.equal(one.tensors()[name], tensor), name
