"""The fused BN, addition and ReLU against torch's own in float64, and the library that is compiled for it."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnetlab
from resnetlab import compiled
from resnetlab.compiled import CompiledLibrary
from resnetlab.errors import UsageError
from resnetlab.nn import batchnorm, kernel
from resnetlab.nn.batchnorm import FixedBatchNorm, FusedBatchNorm2d, fix_bn, fuse_batchnorm
from resnetlab.nn.kernel import load_kernel
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recipe import Recipe
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task
from tiny_runs import tiny

needs_kernel = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
SHAPES = [
    (2, 3, 5, 7),
    (4, 16, 8, 8),
    (1, 1, 3, 1),
    (3, 100, 2, 3),
    (2, 300, 3, 3),
    (64, 16, 9, 9),
    (1, 64, 33, 1),
]


def fused(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    parent = nn.Sequential(copy.deepcopy(norm))
    fuse_batchnorm(parent)
    assert isinstance(parent[0], FusedBatchNorm2d)
    return parent[0]


def apply_batchnorm(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
    """relu(norm(x) + residual), in one function or in three."""
    if isinstance(norm, FusedBatchNorm2d):
        return norm(x, residual, relu)
    y = norm(x) if residual is None else residual + norm(x)
    return F.relu(y) if relu else y


def run(norm: nn.BatchNorm2d, x: Tensor, z: Tensor | None, gradient: Tensor, relu: bool) -> dict[str, Tensor]:
    """Output, gradients and statistics."""
    x, z = x.clone().requires_grad_(), None if z is None else z.clone().requires_grad_()
    y = apply_batchnorm(norm, x, z, relu=relu)
    y.backward(gradient)
    found = {"y": y.detach(), "x": x.grad, "z": None if z is None else z.grad, "weight": norm.weight.grad}
    found |= {"bias": norm.bias.grad, "mean": norm.running_mean, "variance": norm.running_var}
    return {name: value.double() for name, value in found.items() if value is not None}


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Odd numbers of channels and of positions, with and without an addition and ReLU; bf16 is one rounding away."""
    generator = torch.Generator().manual_seed(sum(shape))
    reference = nn.BatchNorm2d(shape[1]).double()
    with torch.no_grad():
        for values in (reference.weight, reference.bias, reference.running_mean):
            values.normal_(generator=generator)
    single = nn.BatchNorm2d(shape[1])
    single.load_state_dict(reference.state_dict())
    x, z, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    x = x * 2 + 3
    for relu, added, live in (
        (True, True, True),
        (True, False, True),
        (False, True, True),
        (False, False, True),
        (True, True, False),
    ):
        ours, theirs = fused(single).train(live), copy.deepcopy(reference).train(live)
        found = run(ours, x, z if added else None, gradient, relu)
        expected = run(theirs, x.double(), z.double() if added else None, gradient.double(), relu)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            limit = 4e-3 if dtype == torch.bfloat16 and name in ("x", "y") else 2e-6
            size = value.norm() + (1e-2 if name == "x" else 1e-6)  # where all terms of a gradient cancel
            assert (found[name] - value).norm() <= 2 * limit * size, (name, relu, added, live)


@needs_kernel
@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradients_are_those_of_the_function() -> None:
    norm = fused(nn.BatchNorm2d(5)).train()
    x, z = (torch.randn(3, 5, 4, 3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    weight, bias = norm.weight, norm.bias
    for relu in (False, True):

        def function(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, relu: bool = relu) -> Tensor:
            return batchnorm._FusedBatchNorm.apply(x, weight, bias, z, batchnorm._Form(norm, relu, True))

        assert torch.autograd.gradcheck(function, (x, z, weight, bias), eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=0.0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_and_channels_without_variance(dtype: torch.dtype) -> None:
    """They stay what torch makes of them: a diverged run is noticed."""
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 0, 2, 2], x[1, 1, 0, 0], x[:, 2], x[0, 3, 0, 0] = torch.nan, torch.inf, 7.0, -torch.inf
    z = torch.zeros_like(x)
    z[2, 4, 1, 1] = torch.nan
    found, expected = (
        run(norm, x, z, torch.ones_like(x), True) for norm in (fused(nn.BatchNorm2d(6)), nn.BatchNorm2d(6))
    )
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name
    assert found["y"][2, 4, 1, 1].isnan() and not found["y"][:, 5].isnan().any()
    assert found["y"][:, 2].abs().max() == 0 and found["variance"][2] == pytest.approx(0.9)


@needs_kernel
def test_what_it_does_not_take_torch_computes() -> None:
    norm, twin = fused(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3)
    for a, z in ((x.double(), None), (x, torch.ones(2, 4, 3, 3, dtype=torch.bfloat16)), (x, torch.ones(4, 1, 1))):
        one, other = (apply_batchnorm(each.to(a.dtype), a, z, relu=True) for each in (norm, twin))
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.float()(torch.ones(1, 4, 1, 1))


@needs_kernel
@pytest.mark.parametrize("order", ["original", "preact", "bn-after-add", "relu-before-add", "relu-only-preact"])
def test_networks_compute_the_same(order: str) -> None:
    """Every activation order, with option B's projections, live and fixed."""
    net = resnetlab.build("resnet8", seed=0, activation_order=order, shortcut="B")
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for fixed in (False, True):
        if fixed:
            fix_bn(net)
        other = copy.deepcopy(net)
        fuse_batchnorm(other)
        assert not any(type(m) in (nn.BatchNorm2d, FixedBatchNorm) for m in other.modules())
        for each in (net, other):
            each.zero_grad()
            each(x).square().mean().backward()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@needs_kernel
def test_a_run_records_its_form_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network itself, whose weights the run saves, stays as it is; older runs have torch's form."""
    recipe = tiny(bn_batch=16, fused_bn="on")
    states = [TrainState.create(build_task(replace(recipe, threads=n), RunOptions(device="cpu"))) for n in (1, 2)]
    for each in states:
        train_step(each, each.task.micro_batches(0), 0.1, select_gradients(each, print))
    one, two = states
    assert "fused BN" in str(one.task.device_config) and two.task.device_config.side_by_side == 2
    assert all(torch.equal(x, two.tensors()[name]) for name, x in one.tensors().items())
    assert not any(isinstance(m, FusedBatchNorm2d) for m in one.task.net.modules())
    assert int(one.task.net.bn1.num_batches_tracked) == 1 and one.task.net.bn1.running_mean.any()
    values = one.recipe.to_json()
    assert values["fused_bn"] == "on" and one.recipe.key != replace(one.recipe, fused_bn="off").key
    assert Recipe.from_values({k: v for k, v in values.items() if k != "fused_bn"}).fused_bn == "off"
    with pytest.raises(UsageError, match="fused_bn=on cannot be used: it uses one thread"):
        build_task(replace(recipe, threads=4), RunOptions(device="cpu"))
    kernel = CompiledLibrary(None, "", "there is no C++ compiler")
    monkeypatch.setattr("resnetlab.training.side_by_side.load_kernel", lambda: kernel)
    with pytest.raises(UsageError, match="fused_bn=on cannot be used: there is no C"):
        build_task(recipe, RunOptions(device="cpu"))
    messages: list[str] = []
    resumed = build_task(one.recipe, RunOptions(device="cpu", report=messages.append), started_in=Path())
    assert resumed.recipe == one.recipe and not resumed.device_config.fused_bn
    assert "cannot be used here (there is no C++ compiler), so its last bits will differ" in "\n".join(messages)
    torch.set_num_threads(1)


FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1.0; exit; fi
echo called >> "$0.log"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def test_the_library_is_built_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "fake", tmp_path / "fake.log"
    compiler.write_text(FAKE)
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded: list[Path] = []
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda name: loaded.append(Path(name)))
    monkeypatch.setattr(kernel, "_declare", lambda library: library)
    load = load_kernel.__wrapped__
    load(), load()
    assert len(log.read_text().split()) == 1 and loaded[0] == loaded[1] and loaded[0].read_text() == "library\n"
    loaded[0].write_text("damaged")
    load()
    assert len(log.read_text().split()) == 2 and loaded[2].read_text() == "library\n"
    loaded[2].chmod(0o777)  # others may have written it
    load()
    assert len(log.read_text().split()) == 3 and os.stat(loaded[3]).st_mode & 0o022 == 0
    loaded[3].parent.chmod(0o777)
    assert "can be written by others" in load().reason and len(loaded) == 4
    compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    assert str(load()) == f"fused BN and ReLU, Winograd's convolution: not used, since {compiler} failed (it is broken)"
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    assert "there is no C++ compiler (install g++)" in str(load())
