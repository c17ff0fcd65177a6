"""Winograd's 3x3 convolution against torch's own in float64, and runs that train with it."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import resnetlab
from process_groups import call_in_processes
from resnetlab.compiled import CompiledLibrary
from resnetlab.distributed import World
from resnetlab.errors import UsageError
from resnetlab.nn import convolution as convolution_module
from resnetlab.nn.convolution import WinogradConv2d, use_winograd
from resnetlab.nn.kernel import load_kernel
from resnetlab.training import side_by_side
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recipe import Recipe
from resnetlab.training.side_by_side import SideBySideGradients
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task
from tiny_runs import tiny

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
SHAPES = [  # B, C, K, H, W
    (2, 16, 16, 8, 8),
    (3, 16, 48, 5, 7),
    (1, 32, 16, 1, 1),
    (2, 48, 32, 3, 13),
    (70, 16, 16, 4, 9),
    (1, 144, 160, 9, 6),
    (0, 16, 16, 4, 4),
]


def convolution(channels: int, outputs: int, seed: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return conv.to(memory_format=torch.channels_last)


def winograd(conv: nn.Conv2d) -> nn.Conv2d:
    parent = nn.Sequential(copy.deepcopy(conv))
    use_winograd(parent)
    return parent[0]


def run(conv: nn.Conv2d, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    y = conv(x)
    y.backward(gradient)
    assert x.grad is not None and conv.weight.grad is not None
    return [y.detach(), x.grad, conv.weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_convolution_without_memory_is_an_error(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = f"winograd_{name}_{str(dtype).removeprefix('torch.')}"
    many = 2**20  # channels, whose weights at 36 points are more than an address reaches
    pointers = [None] * 3 if name == "forward" else [None, None, None, 64, 64]  # nothing is written there
    assert getattr(load_kernel().library, function)(*pointers, 0, 4, 4, many, many, 2) == 0
    library = SimpleNamespace(**{function: lambda *_: 0})
    monkeypatch.setattr(convolution_module, "load_kernel", lambda: SimpleNamespace(library=library))
    x = torch.zeros(1, 16, 4, 4, dtype=dtype)
    with pytest.raises(MemoryError, match="no memory for a convolution of 16 to 16 channels"):
        convolution_module._run_kernel(name, (x, x, x), (1, 4, 4, 16, 16, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_float64(shape: tuple[int, ...]) -> None:
    """Sizes that are no multiple of a tile, several blocks of tiles, and maps of every memory format."""
    batch, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    conv = convolution(channels, outputs)
    x = torch.randn(batch, channels, height, width, generator=generator)
    gradient = torch.randn(batch, outputs, height, width, generator=generator)
    expected = run(copy.deepcopy(conv).double(), x.double(), gradient.double())
    ours = winograd(conv)
    assert isinstance(ours, WinogradConv2d)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours.weight.grad = None
        found = run(ours, x.to(memory_format=memory_format), gradient.to(memory_format=memory_format))
        for each, exact in zip(found, expected, strict=True):
            assert each.shape == exact.shape and each.dtype == torch.float32
            assert (each.double() - exact).norm() <= 1e-5 * exact.norm()
    assert found[2].stride() == ours.weight.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_maps_under_autocast_are_computed_in_float32(shape: tuple[int, ...]) -> None:
    """Only maps are rounded to bf16, once; torch rounds the weights too."""
    batch, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    conv = convolution(channels, outputs)
    x = torch.randn(batch, channels, height, width, generator=generator).bfloat16()
    gradient = torch.randn(batch, outputs, height, width, generator=generator).bfloat16()
    expected = run(copy.deepcopy(conv).double(), x.double(), gradient.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = run(winograd(conv), x, gradient)
        rounded = run(winograd(conv), x.float(), gradient)  # autocast rounds what is not bf16
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    for each, exact, dtype, error in zip(found, expected, dtypes, (2e-3, 2e-3, 1e-5), strict=True):
        assert each.shape == exact.shape and each.dtype == dtype
        assert (each.double() - exact).norm() <= error * exact.norm()
    assert torch.equal(found[0], rounded[0]) and torch.equal(found[2], rounded[2]) and rounded[1].dtype == torch.float32


def test_gradients_that_nobody_needs_are_left_out() -> None:
    conv = winograd(convolution(16, 16))
    x = torch.ones(1, 16, 4, 4)
    conv(x).sum().backward()
    assert x.grad is None and conv.weight.grad is not None
    both = run(copy.deepcopy(conv), x, torch.ones(1, 16, 4, 4))
    assert torch.equal(conv.weight.grad, both[2])
    conv.requires_grad_(False)
    assert not conv(x).requires_grad
    x.requires_grad_()
    conv(x).sum().backward()
    assert torch.equal(x.grad, both[1])


def test_what_it_does_not_take_torch_computes() -> None:
    kinds = {"stride": 2, "dilation": 2, "groups": 2, "bias": True, "padding_mode": "circular"}
    for name, value in kinds.items():
        conv = nn.Conv2d(16, 16, 3, **{"padding": 1, "bias": False} | {name: value})
        assert type(winograd(conv)) is nn.Conv2d, name
    assert type(winograd(convolution(16, 3))) is nn.Conv2d and type(winograd(convolution(20, 16))) is nn.Conv2d
    conv, x = convolution(16, 16), torch.randn(1, 16, 5, 5)
    assert torch.equal(winograd(conv).double()(x.double()), copy.deepcopy(conv).double()(x.double()))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(winograd(conv)(x), conv(x)) and conv(x).dtype == torch.float16
    half = x.bfloat16()  # without autocast the weights are of another dtype
    with pytest.raises(RuntimeError, match="same"):
        winograd(conv)(half)
    with pytest.raises(RuntimeError, match="to have 16 channels"):
        winograd(conv)(torch.ones(1, 32, 5, 5))


def test_wide_convolutions_of_a_run_in_bf16_stay_torchs() -> None:
    net = resnetlab.build("resnet18", seed=0)
    use_winograd(net, precision="bf16")
    kinds = [type(net.get_submodule(f"layer{i}")[1].conv2) for i in range(1, 5)]
    assert kinds == [WinogradConv2d, WinogradConv2d, nn.Conv2d, nn.Conv2d]  # of 64 to 512 channels


@pytest.mark.parametrize("shape", [SHAPES[0], (70, 16, 16, 4, 9), (1, 144, 160, 9, 6), (0, 16, 16, 4, 4)], ids=str)
def test_threads_share_an_operation(shape: tuple[int, ...]) -> None:
    """Their number decides the last bits of the weights' gradient, of nothing else, and each number repeats."""
    batch, channels, outputs, height, width = shape
    x, gradient = (
        torch.randn(batch, c, height, width, generator=torch.Generator().manual_seed(c)) for c in (channels, outputs)
    )
    one = run(winograd(convolution(channels, outputs)), x, gradient)
    for threads in (2, 3, 7):
        parents = [nn.Sequential(convolution(channels, outputs)) for _ in range(2)]
        for parent in parents:
            use_winograd(parent, threads)
        first, again = (run(parent[0], x, gradient) for parent in parents)
        assert all(map(torch.equal, first, again)) and all(map(torch.equal, first[:2], one[:2]))
        assert (first[2] - one[2]).norm() <= 1e-5 * one[2].norm()


def test_batches_evaluated_side_by_side_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation would start as many as a step's, for each batch that is evaluated at once."""
    seen: list[int] = []
    monkeypatch.setattr(convolution_module, "_run_kernel", lambda name, tensors, sizes: seen.append(sizes[-1]))
    conv, before = WinogradConv2d(16, 16, 3, padding=1, bias=False), torch.get_num_threads()
    conv.threads = 3
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            for training in (True, False):
                conv.train(training)(torch.zeros(1, 16, 4, 4))
    finally:
        torch.set_num_threads(before)
    assert seen == [3, 1, 3, 3]


def test_values_that_are_not_finite_stay_so() -> None:
    """A diverged run is noticed."""
    x = torch.zeros(1, 16, 9, 9)
    x[0, 3, 4, 4], x[0, 5, 8, 8] = torch.nan, torch.inf
    y = winograd(convolution(16, 16))(x)
    assert y[0, :, 4, 4].isnan().all() and not y[0, :, 8, 8].isfinite().any() and y[0, :, 0, 8].isfinite().all()


@pytest.mark.parametrize("name", ["resnet8", "preresnet14"])
def test_networks_compute_the_same(name: str) -> None:
    net = resnetlab.build(name, seed=1)
    other = copy.deepcopy(net)
    use_winograd(other)
    assert (
        sum(isinstance(m, WinogradConv2d) for m in other.modules()) >= 3
        and other.state_dict().keys() == net.state_dict().keys()
    )
    x = torch.randn(
        4, 3, 16, 16, generator=torch.Generator().manual_seed(11)
    )  # no ReLU's input is at rounding's distance from 0
    for each in (net, other):
        each(x).square().mean().backward()
    here, there = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (other, net))
    assert (here - there).norm() <= 1e-4 * there.norm()


def test_a_run_records_its_form_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network itself, whose weights the run saves, keeps torch's layers; older runs have torch's form."""
    recipe = tiny(bn_batch=16, winograd="on", fused_bn="on", precision="fp32")
    states = [TrainState.create(build_task(replace(recipe, threads=n), RunOptions(device="cpu"))) for n in (1, 2)]
    for each in states:
        train_step(each, each.task.micro_batches(0), 0.1, select_gradients(each, print))
    one, two = states
    assert "fused BN, Winograd" in str(one.task.device_config) and two.task.device_config.side_by_side == 2
    assert all(torch.equal(x, two.tensors()[name]) for name, x in one.tensors().items())
    assert not any(isinstance(m, WinogradConv2d) for m in one.task.net.modules())
    plain = TrainState.create(build_task(replace(recipe, winograd="off", threads=1), RunOptions(device="cpu")))
    train_step(plain, plain.task.micro_batches(0), 0.1, select_gradients(plain, print))
    weights = [each.task.net.layer1[0].conv1.weight.detach() for each in (one, plain)]
    assert not torch.equal(*weights) and (weights[0] - weights[1]).norm() < 1e-4 * weights[1].norm()
    values = one.recipe.to_json()
    assert values["winograd"] == "on" and one.recipe.key != replace(one.recipe, winograd="off").key
    assert Recipe.from_values({k: v for k, v in values.items() if k != "winograd"}).winograd == "off"
    assert replace(one.recipe, winograd=True) == one.recipe.with_values({"winograd": "true"}) == one.recipe
    bf16 = build_task(replace(recipe, precision="bf16"), RunOptions(device="cpu"))
    assert bf16.device_config.winograd and bf16.recipe.winograd == "on"
    with pytest.raises(UsageError, match="winograd=on cannot be used: it takes fp32 and bf16, and this run is in fp16"):
        build_task(replace(recipe, fused_bn="off", precision="fp16"), RunOptions(device="cpu"))
    inside = build_task(replace(recipe, fused_bn="off", threads=4), RunOptions(device="cpu"))
    assert (inside.device_config.side_by_side, inside.device_config.op_threads, inside.device_config.winograd) == (
        2,
        2,
        True,
    )
    train_state = TrainState.create(inside)
    replicas = SideBySideGradients(inside)
    train_step(train_state, inside.micro_batches(0), 0.1, replicas)
    assert {m.threads for m in replicas._replicas.get().task.net.modules() if isinstance(m, WinogradConv2d)} == {2}
    monkeypatch.setattr(
        "resnetlab.training.side_by_side.load_kernel", lambda: CompiledLibrary(None, "", "there is no compiler")
    )
    messages: list[str] = []
    resumed = build_task(one.recipe, RunOptions(device="cpu", report=messages.append), started_in=Path())
    assert resumed.recipe == one.recipe and not resumed.device_config.winograd
    assert "Winograd's convolution, which cannot be used here (there is no compiler)" in "\n".join(messages)
    torch.set_num_threads(1)


def test_long_runs_take_them_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(**values: object) -> tuple[str, str]:
        recipe = tiny(**{"precision": "fp32", "threads": 2, "bn_batch": 16} | values)
        task = build_task(recipe, RunOptions(device="cpu"))
        assert (task.device_config.winograd, task.device_config.fused_bn) == (
            task.recipe.winograd == "on",
            task.recipe.fused_bn == "on",
        )
        return task.recipe.winograd, task.recipe.fused_bn

    assert decide() == ("off", "off")  # compiling takes longer than this run
    monkeypatch.setattr(side_by_side, "LONG", 1)
    assert decide() == ("on", "on") and decide(fused_bn="off") == ("on", "off")
    assert decide(bn_batch=0, batch=32) == ("on", "off")  # two threads work inside operations
    assert decide(bn_batch=0, batch=32, threads=4) == ("off", "off")  # four inside were not measured
    assert decide(compile="on") == ("off", "off")
    for flags, form in (({"avx512_bf16"}, "on"), ({"avx512_bf16", "amx_bf16"}, "off"), (set(), "off")):
        monkeypatch.setattr(side_by_side, "cpu_flags", lambda flags=flags: flags)
        assert decide(precision="bf16") == (form, form) and decide() == ("on", "on")
    monkeypatch.setattr(
        "resnetlab.training.side_by_side.load_kernel", lambda: CompiledLibrary(None, "", "there is no compiler")
    )
    assert decide() == ("off", "off")
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_processes_take_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them has no compiler, none does: their micro-batches would have other bits."""
    monkeypatch.setattr(side_by_side, "LONG", 1)
    recipe = tiny(precision="fp32", bn_batch=16)

    def train(world: World, without: int | None = None) -> tuple[str, str, bytes]:
        if world.rank == without:  # this process ends with the test
            side_by_side.load_kernel = lambda: CompiledLibrary(None, "", "there is no compiler")
        state = TrainState.create(build_task(recipe, RunOptions(device="cpu"), world))
        assert state.task.device_config.winograd == state.task.device_config.fused_bn == (without is None)
        train_step(state, state.task.micro_batches(0), 0.1, select_gradients(state, print))
        weights = torch.cat([p.detach().flatten() for p in state.task.net.parameters()])
        return state.recipe.winograd, state.recipe.fused_bn, weights.numpy().tobytes()

    one = train(World())
    assert one[:2] == ("on", "on") and call_in_processes(2, train) == [one, one]
    first, second = call_in_processes(2, partial(train, without=1))
    assert first == second and first[:2] == ("off", "off") and first[2] != one[2]
