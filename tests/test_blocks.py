"""Blocks compared with independent computations in float64: activation orders, shortcuts, the 2016 paper's identities.

A program lists the operations of the paper's Fig. 4 from top to bottom: W2 is the second convolution, N2 the second BN,
R a ReLU, "|" the split of the shortcut from F, "+" their junction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import Specification
from resnetlab.nn.blocks import ACTIVATION_ORDERS, Block
from resnetlab.nn.shortcuts import ZeroPad

PROGRAMS = {
    ("original", "basic"): "| W1 N1 R W2 N2 + R",
    ("bn-after-add", "basic"): "| W1 N1 R W2 + N2 R",
    ("relu-before-add", "basic"): "| W1 N1 R W2 N2 R +",
    ("relu-only-preact", "basic"): "| R W1 N1 R W2 N2 +",
    ("preact", "basic"): "| N1 R W1 N2 R W2 +",
    ("original", "bottleneck"): "| W1 N1 R W2 N2 R W3 N3 + R",
    ("bn-after-add", "bottleneck"): "| W1 N1 R W2 N2 R W3 + N3 R",
    ("relu-before-add", "bottleneck"): "| W1 N1 R W2 N2 R W3 N3 R +",
    ("relu-only-preact", "bottleneck"): "| R W1 N1 R W2 N2 R W3 N3 +",
    ("preact", "bottleneck"): "| N1 R W1 N2 R W2 N3 R W3 +",
}
Path = Callable[[Tensor], Tensor]
Join = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the unit's input, its shortcut and F


def place_first_activation(program: str, entry: str) -> str:
    """The program with its first activation inside F, shared with the shortcut, or omitted."""
    head, rest = program.split("W1", 1)
    activation = head.removeprefix("| ")
    return {"inside": program, "shared": f"{activation}| W1{rest}", "done": f"| W1{rest}"}[entry]


def randomise(net: ResNet, seed: int = 0) -> ResNet:
    """The net in float64 with every parameter and statistic random, so that each affects the result."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point():
            low, high = (0.5, 2.0) if name.endswith("running_var") else (-1.0, 1.0)
            value.data.uniform_(low, high, generator=generator)
    return net


def make_small_net(**changes: Any) -> ResNet:
    """Two units of one width and one that halves the maps: layer1.0, layer1.1, layer2.0."""
    values: dict[str, Any] = {"block": "basic", "depths": (2, 1), "widths": (4, 8), "stem": "cifar", "classes": 3}
    return randomise(build_from_spec(Specification(**values | changes), seed=1))


def get_block(net: ResNet, name: str) -> Block:
    return dict(net.blocks())[name]


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class ReferenceBlock:
    """An independent implementation of a block with a copy of its state, including BN's running statistics."""

    def __init__(self, unit: Block, train: bool) -> None:
        self.state = {k: v.clone() for k, v in unit.state_dict().items()}
        self.convs = {k: m for k, m in unit.named_modules() if isinstance(m, nn.Conv2d)}
        self.train = train

    def conv(self, name: str, x: Tensor) -> Tensor:
        unit = self.convs[name]
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), unit.stride, unit.padding)

    def bn(self, name: str, x: Tensor) -> Tensor:
        state = self.state
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if self.train:
            count = x.numel() // x.shape[1]
            batch_mean = x.mean((0, 2, 3))
            batch_variance = (x - batch_mean[:, None, None]).square().mean((0, 2, 3))
            state[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            state[f"{name}.running_var"] = 0.9 * variance + 0.1 * batch_variance * count / (count - 1)
            state[f"{name}.num_batches_tracked"] += 1
            mean, variance = batch_mean, batch_variance
        scale = state[f"{name}.weight"] / torch.sqrt(variance + 1e-5)
        y: Tensor = (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]
        return y

    def run(self, program: str, x: Tensor, path: Path, join: Join) -> Tensor:
        split = x
        for step in program.split():
            if step == "|":
                split = x
            elif step == "+":
                x = join(split, path(split), x)
            elif step == "R":
                x = x.clamp(min=0)
            else:
                x = self.conv(f"conv{step[1]}", x) if step[0] == "W" else self.bn(f"bn{step[1]}", x)
        return x


def option_a(c_out: int, stride: int, offset: int = 0) -> Path:
    """Every stride-th pixel; the input's channels from `offset` on, zeros elsewhere."""

    def path(x: Tensor) -> Tensor:
        x = x[:, :, ::stride, ::stride]
        y = x.new_zeros(x.shape[0], c_out, *x.shape[2:])
        y[:, offset : offset + x.shape[1]] = x
        return y

    return path


def shape_of(unit: Block) -> tuple[int, int, int]:
    """C_in, C_out and the stride of a block."""
    convs = [cast(nn.Conv2d, unit.get_submodule(f"conv{i}")) for i in range(1, unit.num_convs + 1)]
    return convs[0].in_channels, convs[-1].out_channels, max(conv.stride[0] for conv in convs)


def assert_equals_program(
    unit: Block, program: str, path: str, join: Join = lambda x, shortcut, y: shortcut + y
) -> None:
    """Runs a block in eval and in train mode beside the program; `path` names what its shortcut does to shapes."""
    c_in, c_out, stride = shape_of(unit)
    for train in (False, True):
        unit.train(train)
        hand = ReferenceBlock(unit, train)
        paths: dict[str, Path] = {
            "none": lambda x: x.new_zeros(()),
            "identity": lambda x: x,
            "pad": option_a(c_out, stride),
            "centre": option_a(c_out, stride, (c_out - c_in) // 2),
            "project": lambda x, hand=hand: hand.conv("downsample.0", x),  # type: ignore[misc]
            "project-bn": lambda x, hand=hand: hand.bn("downsample.1", hand.conv("downsample.0", x)),  # type: ignore[misc]
        }
        x = random_input(3, c_in, 7, 6)
        before = x.clone()
        found = unit(x)
        torch.testing.assert_close(found, hand.run(program, x, paths[path], join), rtol=1e-11, atol=1e-11)
        assert torch.equal(x, before), "a block must leave its input alone"
        for key, value in unit.state_dict().items():
            torch.testing.assert_close(value, hand.state[key], msg=f"{key} after a forward pass with {train=}")


# The orders.

VARIANTS = {
    # changes; the path where the shape stays and where it changes; where a pre-activated unit has its first activation
    # then (layer1.0 has it from the stem)
    "none": ({"shortcut": "none"}, "none", "none", "inside", "shared"),
    "A": ({"shortcut": "A"}, "identity", "pad", "inside", "shared"),
    "A-centre": ({"shortcut": "A", "zero_pad": "centre"}, "identity", "centre", "inside", "shared"),
    "A-raw": ({"shortcut": "A", "preact_transition": "raw"}, "identity", "pad", "inside", "inside"),
    "B": ({"shortcut": "B"}, "identity", "project", "inside", "shared"),
    "B-raw": (
        {"shortcut": "B", "preact_transition": "raw"},
        "identity",
        "project",
        "inside",
        "shared",
    ),  # preact_transition has no effect on it
    "C": ({"shortcut": "C"}, "project", "project", "shared", "shared"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("order", "kind"), PROGRAMS, ids=str)
def test_orders(order: str, kind: str, variant: str) -> None:
    changes, stays, changed, entry_stays, entry_changed = VARIANTS[variant]
    for name, unit in make_small_net(activation_order=order, block=kind, **changes).blocks():
        c_in, c_out, _ = shape_of(unit)
        assert (c_in != c_out) == (name == "layer2.0" or (name == "layer1.0" and kind == "bottleneck"))
        path, entry = (changed, entry_changed) if c_in != c_out else (stays, entry_stays)
        if path == "project" and order != "preact":
            path = "project-bn"
        if order not in ("relu-only-preact", "preact"):
            entry = "inside"
        elif name == "layer1.0":
            entry = "done"
        assert_equals_program(unit, place_first_activation(PROGRAMS[order, kind], entry), path)


@pytest.mark.parametrize("order", ["original", "preact"])
@pytest.mark.parametrize(("shortcut", "path"), [("A", "pad"), ("B", "project")])
def test_maps_that_halve_at_the_same_width(shortcut: str, path: str, order: str) -> None:
    """A stride alone is a change of shape."""
    unit = get_block(make_small_net(activation_order=order, shortcut=shortcut, widths=(4, 4)), "layer2.0")
    entry, bn = ("shared", "") if order == "preact" else ("inside", "-bn")
    assert_equals_program(
        unit, place_first_activation(PROGRAMS[order, "basic"], entry), path + bn if path == "project" else path
    )


@pytest.mark.parametrize("order", ["original", "bn-after-add", "relu-before-add", "relu-only-preact", "preact"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_layers_of_f(layers: int, order: str) -> None:
    """F may have any number of layers (2015 §3.2)."""
    inner, final = {
        "original": ("W# N# R", "W# N# + R"),
        "bn-after-add": ("W# N# R", "W# + N# R"),
        "relu-before-add": ("W# N# R", "W# N# R +"),
        "relu-only-preact": ("R W# N#", "R W# N# +"),
        "preact": ("N# R W#", "N# R W# +"),
    }[order]
    steps = [(inner if i < layers else final).replace("#", str(i)) for i in range(1, layers + 1)]
    for name, unit in make_small_net(activation_order=order, layers=layers).blocks():
        assert sum(child.startswith("conv") for child in unit._modules) == layers
        if name == "layer1.1":
            assert_equals_program(unit, "| " + " ".join(steps), "identity")


def test_all_orders_are_covered() -> None:
    assert set(ACTIVATION_ORDERS) == {order for order, _ in PROGRAMS}


# The shortcuts.


def gate(unit: Block) -> Path:
    """g = sigmoid(Wx + b), element-wise."""
    conv = cast(nn.Conv2d, unit.get_submodule("junction.conv"))
    weight, bias, stride = conv.weight.detach()[:, :, 0, 0], cast(Tensor, conv.bias).detach(), conv.stride[0]

    def g(x: Tensor) -> Tensor:
        z = torch.einsum("bchw,oc->bohw", x[:, :, ::stride, ::stride], weight) + bias[:, None, None]
        return 1 / (1 + torch.exp(-z))

    return g


def constant(unit: Block) -> Join:
    return lambda x, shortcut, y: 0.3 * shortcut + 0.7 * y


def exclusive(unit: Block) -> Join:
    g = gate(unit)
    return lambda x, shortcut, y: (1 - g(x)) * shortcut + g(x) * y


def shortcut_only(unit: Block) -> Join:
    g = gate(unit)
    return lambda x, shortcut, y: (1 - g(x)) * shortcut + y


JOINS = {"constant": constant, "exclusive-gate": exclusive, "shortcut-gate": shortcut_only}


@pytest.mark.parametrize("order", ["original", "preact"])
@pytest.mark.parametrize("shortcut", JOINS)
def test_scaling_and_gates(shortcut: str, order: str) -> None:
    """2016 §3.1; the path is option A's, the gate looks at what the shortcut starts from."""
    for name, unit in make_small_net(
        shortcut=shortcut, activation_order=order, shortcut_scale=0.3, residual_scale=0.7
    ).blocks():
        entry = (
            {"layer1.0": "done", "layer1.1": "inside", "layer2.0": "shared"}[name] if order == "preact" else "inside"
        )
        assert_equals_program(
            unit, place_first_activation(PROGRAMS[order, "basic"], entry), "pad", JOINS[shortcut](unit)
        )


def test_half_and_half_is_the_default_scaling() -> None:
    for _, unit in make_small_net(shortcut="constant", activation_order="preact").blocks():
        assert unit.junction is not None
        ones = torch.ones(1)
        assert unit.junction(ones, 4 * ones, 6 * ones).item() == 5.0


@pytest.mark.parametrize("shortcut", ["exclusive-gate", "shortcut-gate"])
@pytest.mark.parametrize("bias", [-6.0, 0.0])
def test_gates_start_from_their_bias(shortcut: str, bias: float) -> None:
    """With an image of zeros the gate is sigmoid(b_g): 1/2 for 0, 0.0025 for -6."""
    net = build_from_spec(
        Specification(block="basic", depths=(1,), widths=(4,), stem="cifar", shortcut=shortcut, gate_bias=bias)
    )
    junction = get_block(net, "layer1.0").junction
    assert junction is not None
    x, ones = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    g = 1 / (1 + 2.718281828459045**-bias)
    torch.testing.assert_close(junction(x, ones, 0 * ones), (1 - g) * ones)
    torch.testing.assert_close(junction(x, 0 * ones, ones), (g if shortcut == "exclusive-gate" else 1.0) * ones)


def test_conv_is_option_c() -> None:
    nets = [make_small_net(shortcut=name) for name in ("conv", "C")]
    x = random_input(2, 3, 9, 9)
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    assert torch.equal(*(net(x) for net in nets))


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_on_the_shortcut(rate: float) -> None:
    """Nothing in eval mode; in train mode the shortcut alone is dropped, scaled by 1/(1-rate), the same by seed."""
    net = make_small_net(shortcut="dropout", shortcut_dropout=rate, activation_order="preact", widths=(32, 64))
    unit = get_block(net, "layer1.1").eval()
    x = random_input(4, 32, 8, 8)
    torch.testing.assert_close(unit(x), x + unit.residual(x))
    unit.train()
    shortcuts = []
    for _ in range(2):
        torch.manual_seed(3)
        shortcuts.append(unit(x) - unit.residual(x))
    assert torch.equal(*shortcuts)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), rate)
    torch.testing.assert_close(shortcuts[0], mask * x)
    assert set(mask.flatten().tolist()) == {0.0, 1 / (1 - rate)}
    assert abs((mask == 0).double().mean().item() - rate) < 0.03


@pytest.mark.parametrize(("zeros", "offset"), [("append", 0), ("centre", 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_option_a(zeros: str, offset: int, stride: int) -> None:
    """Every stride-th pixel, the other channels zero, nothing to learn (2015 §3.3)."""
    pad = ZeroPad(5, 11, stride, zeros)
    x = random_input(2, 5, 7, 6)
    y = pad(x)
    assert y.shape == (2, 11, -(-7 // stride), -(-6 // stride))
    assert torch.equal(y[:, offset : offset + 5], x[:, :, ::stride, ::stride])
    rest = [i for i in range(11) if not offset <= i < offset + 5]
    assert not y[:, rest].any()
    assert not list(pad.parameters()) and not list(pad.buffers())


@pytest.mark.parametrize("stride", [1, 2])
def test_option_a_keeps_channels_last(stride: int) -> None:
    """Output and gradient too, so that the additions that follow do not mix two layouts; the values are those of NCHW."""
    pad, found = ZeroPad(4, 8, stride), []
    for layout in (torch.channels_last, torch.contiguous_format):
        x = random_input(2, 4, 7, 6).to(memory_format=layout).requires_grad_()
        y = pad(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        assert y.is_contiguous(memory_format=layout) and dx.is_contiguous(memory_format=layout)
        found.append((y, dx))
    assert all(map(torch.equal, *found))


# The identities of 2016, eq. 4 and 5.


@pytest.mark.parametrize("order", ["preact", "relu-only-preact", "relu-before-add"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_deep_unit_is_a_shallow_one_plus_a_sum(kind: str, order: str) -> None:
    """x_L = x_l + Σ F(x_i) and dE/dx_l = dE/dx_L + (∂ΣF/∂x_l)ᵀ dE/dx_L: after the addition the way is free."""
    net = make_small_net(activation_order=order, block=kind, depths=(5, 1)).eval()
    units = [unit for name, unit in net.blocks() if name.startswith("layer1.")][1:]
    x_l = random_input(2, shape_of(units[0])[0], 6, 6).requires_grad_()
    x, total = x_l, torch.zeros(())
    for unit in units:
        total = total + unit.residual(x)
        x = unit(x)
    torch.testing.assert_close(x, x_l + total, rtol=1e-11, atol=1e-11)
    upstream = random_input(*x.shape).cos()
    (direct,) = torch.autograd.grad(x, x_l, upstream, retain_graph=True)
    (through_f,) = torch.autograd.grad(total, x_l, upstream)
    torch.testing.assert_close(direct, upstream + through_f, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("preact", lambda x: x),
        ("relu-only-preact", lambda x: x),
        ("relu-before-add", lambda x: x),
        ("original", lambda x: x.clamp(min=0)),
        ("bn-after-add", lambda x: (x / (1 + 1e-5) ** 2).clamp(min=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_units_without_a_residual(order: str, expected: Path) -> None:
    """With F = 0, only the orders with a free path hand on what came, negative values too."""
    spec = Specification(block="basic", depths=(5,), widths=(4,), stem="cifar", activation_order=order)
    net = build_from_spec(spec, seed=0).double().eval()
    units = nn.Sequential(*list(net.stages[0])[1:])
    for module in units.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    x = random_input(2, 4, 5, 5)
    torch.testing.assert_close(units(x), expected(x), rtol=1e-12, atol=1e-12)


def test_a_whole_pre_activated_net_without_residuals_is_its_shortcuts() -> None:
    """Stem, subsampling, zero channels, last activation: the path that 2016 Fig. 1 calls clean."""
    net = make_small_net(activation_order="preact", preact_transition="raw", depths=(3, 2)).eval()
    for _, unit in net.blocks():
        for i in (1, 2):
            nn.init.zeros_(cast(nn.Conv2d, unit.get_submodule(f"conv{i}")).weight)
    maps = net.features(random_input(2, 3, 9, 8))
    assert torch.equal(net.stages[0](maps["C1"]), maps["C1"])
    assert torch.equal(net.stages[1](maps["C1"]), option_a(8, 2)(maps["C1"]))
    last = cast(nn.BatchNorm2d, net.bn_last)
    assert torch.equal(maps["C3"], F.relu(last(option_a(8, 2)(maps["C1"]))))


@pytest.mark.parametrize("train", [False, True])
def test_the_last_activation_and_the_classifier(train: bool) -> None:
    """One extra activation after the last addition, then average pooling, then fc (2016, appendix)."""
    for order, steps in {"preact": "BN R", "relu-only-preact": "R", "original": "", "relu-before-add": ""}.items():
        net = make_small_net(activation_order=order).train(train)
        x = random_input(2, 3, 9, 8)
        found = net(x)
        y = net.stages[1](net.stages[0](F.relu(net.bn1(net.conv1(x)))))
        if "BN" in steps:
            assert cast(nn.BatchNorm2d, net.bn_last).weight.shape == (8,)
            y = cast(nn.BatchNorm2d, net.bn_last)(y)
        else:
            assert net.bn_last is None
        y = y.clamp(min=0) if "R" in steps else y
        logits = y.sum((2, 3)) / (y.shape[2] * y.shape[3]) @ net.fc.weight.T + net.fc.bias
        torch.testing.assert_close(found, logits, rtol=1e-11, atol=1e-11)
