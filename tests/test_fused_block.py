"""A residual block in one compiled call against the same block layer by layer, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import resnetlab
from resnetlab.nn import blocks, fused_block
from resnetlab.nn.batchnorm import FusedBatchNorm2d, fuse_batchnorm
from resnetlab.nn.blocks import ACTIVATION_ORDERS, Block, ShortcutOptions, make_basic_layers
from resnetlab.nn.convolution import use_winograd

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _count_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_block(layers: Any, x: Tensor) -> Tensor:
        CALLS.append(x.shape[1])
        return fused_block.run_block(layers, x)

    CALLS.clear()
    monkeypatch.setattr(blocks, "run_block", run_block)


def network(name: str, **values: Any) -> nn.Module:
    net = resnetlab.build(name, classes=10, seed=0, **values).to(memory_format=torch.channels_last).train()
    fuse_batchnorm(net)
    use_winograd(net)
    return net


def results(net: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Scores, every gradient, and every statistic after it."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet14", "plain14"])
@pytest.mark.parametrize("shape", [(5, 32, 32), (3, 33, 20)], ids=str)
def test_it_is_bit_identical_to_the_layers(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, height, width = shape
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    net = network(name)
    found = results(net, x, dtype)
    assert CALLS == [16, 16, 32, 64]  # the first blocks of the other stages change the shape
    monkeypatch.setattr(blocks, "fuses_block", lambda *_: False)
    expected = results(net, x, dtype)
    assert len(CALLS) == 4
    assert all(map(torch.equal, found, expected))


def test_values_that_are_not_finite_stay() -> None:
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = torch.nan
    block = next(module for module in network("resnet8").modules() if isinstance(module, Block))
    y = block(x.requires_grad_())
    assert CALLS == [16]
    assert y.isnan().any()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().any()


def test_a_map_of_other_channels_is_an_error() -> None:
    """Not a read behind the weights."""
    options = ShortcutOptions(
        name="none", zero_pad="end", scale=1, residual_scale=1, gate_bias=0, dropout=0
    )  # of a plain block
    block = nn.Sequential(Block(make_basic_layers(16, 32, 1, 2), ACTIVATION_ORDERS["original"], options, "inside"))
    fuse_batchnorm(block)
    use_winograd(block)
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 32"):
        block(torch.randn(2, 32, 8, 8, requires_grad=True))


@pytest.mark.parametrize(
    "case",
    [
        "a hook",
        "a hook on all modules",
        "evaluation",
        "fixed BN",
        "frozen weights",
        "no gradient",
        "several threads",
        "stochastic depth",
    ],
)
def test_other_blocks_go_layer_by_layer(case: str) -> None:
    block = next(module for module in network("resnet8").modules() if isinstance(module, Block))
    x, seen = torch.randn(2, 16, 8, 8, requires_grad=case != "no gradient"), []
    convs, norms = block.convs, [module for module in block.modules() if isinstance(module, FusedBatchNorm2d)]
    if case == "a hook":
        convs[1].register_forward_hook(lambda *_: seen.append(1))
    elif case == "evaluation":
        block.eval()
    elif case == "fixed BN":
        norms[0].fixed = True
    elif case == "frozen weights":
        convs[0].requires_grad_(False)
    elif case == "several threads":
        convs[0].threads = 2  # type: ignore[assignment]
    elif case == "stochastic depth":
        block.drop_path = 0.5
    on_all = contextlib.ExitStack()
    if case == "a hook on all modules":
        on_all.enter_context(
            register_module_forward_pre_hook(lambda module, _: seen.append(1) if module is convs[1] else None)
        )
    with on_all:
        block(x)
    assert CALLS == []
    assert seen == [1] * case.startswith("a hook")


def test_other_kinds_of_block_go_layer_by_layer() -> None:
    for name, values in (("preresnet8", {}), ("resnet8", {"shortcut": "dropout"}), ("resnet8", {"layers": 1})):
        network(name, **values)(torch.randn(2, 3, 16, 16, requires_grad=True))
    assert CALLS == []


def test_too_little_memory_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fused_block.load_kernel()

    class Full:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: 0

    monkeypatch.setattr(fused_block, "load_kernel", lambda: kernel._replace(library=Full()))
    block = next(module for module in network("resnet8").modules() if isinstance(module, Block))
    with pytest.raises(MemoryError, match="no memory for a block of 16 channels"):
        block(torch.randn(2, 16, 8, 8, requires_grad=True))
