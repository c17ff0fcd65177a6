"""Networks beside independent implementations: torchvision, timm, and a CIFAR net written out here.

State-dict keys are a contract: weights move both ways between those programs and ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import get_specification, list_network_names


def to_empty(make: Callable[[], nn.Module]) -> Any:
    """A network in float64 whose values are not set yet."""
    with torch.device("meta"):
        net = make().double()
    return net.to_empty(device="cpu")


def ours(name: str, **changes: Any) -> ResNet:
    return cast(ResNet, to_empty(lambda: ResNet(get_specification(name, **changes))))


def theirs(source: str, name: str) -> nn.Module:
    makers = {
        "torchvision": lambda: torchvision.models.get_model(name, weights=None),
        "timm": lambda: timm.create_model(name, pretrained=False),
    }
    return cast(nn.Module, to_empty(makers[source]))


def random_state(net: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values for every entry, statistics and affine ones too, so that none of them can be mistaken."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, old: Tensor) -> Tensor:
        if not old.is_floating_point():
            return torch.tensor(17)
        if name.endswith("running_var"):
            return torch.rand(old.shape, generator=generator, dtype=old.dtype) + 0.5
        scale = math.sqrt(2 / old[0].numel()) if old.dim() > 1 else 0.3
        new = scale * torch.randn(old.shape, generator=generator, dtype=torch.float32).double()
        return new + 0.6 if name.endswith("weight") and old.dim() == 1 else new

    return {name: value(name, old) for name, old in net.state_dict().items()}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same(net: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Equal logits in eval and train mode, and equal statistics after the step."""
    for train in (False, True):
        with torch.no_grad():
            found, expected = net.train(train)(x), other.train(train)(x)
        assert expected.isfinite().all() and expected.std(0).min() > 0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for (key, value), (other_key, expected) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        assert key == other_key
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("source", "name", "our_name"),
    [
        ("torchvision", "resnet18", "resnet18"),
        pytest.param("torchvision", "resnet34", "resnet34", marks=pytest.mark.slow),  # as resnet18, with more blocks
        ("torchvision", "resnet50", "resnet50v1.5"),
        pytest.param("torchvision", "resnet101", "resnet101v1.5", marks=pytest.mark.slow),
        pytest.param("torchvision", "resnet152", "resnet152v1.5", marks=pytest.mark.slow),
        ("timm", "resnet18", "resnet18"),
        pytest.param("timm", "resnet34", "resnet34", marks=pytest.mark.slow),
        ("timm", "resnet50", "resnet50v1.5"),
    ],
)
def test_weights_are_exchanged_in_both_directions(source: str, name: str, our_name: str) -> None:
    """Their state loads into ours and ours into theirs, strictly, and both compute the same."""
    net, other = ours(our_name), theirs(source, name)
    assert list(net.state_dict()) == list(other.state_dict())
    state = random_state(other)
    other.load_state_dict(state, strict=True)
    net.load_state_dict(other.state_dict(), strict=True)
    assert_same(net, other, images(2, 3, 75, 66))
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_deep_nets_have_the_same_layers(name: str) -> None:
    """The layers that compute, their settings, order and keys are torchvision's, so what is equal for 50 layers is for more."""
    with torch.device("meta"):
        net, other = ResNet(get_specification(f"{name}v1.5")), torchvision.models.get_model(name, weights=None)
    found, expected = (
        [
            (key, repr(part))
            for key, part in each.named_modules()
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
        ]
        for each in (net, other)
    )
    assert found == expected
    shapes, others = ([(key, value.shape) for key, value in each.state_dict().items()] for each in (net, other))
    assert shapes == others


@pytest.mark.parametrize(
    "name", ["resnet50", "resnet101", "resnet152", "resnet200", "preresnet50", "resnet164", "resnet1001"]
)
def test_v15_differs_by_stride_only(name: str) -> None:
    """In the first unit of a later stage v1 has the stride in the first 1x1, v1.5 in the 3x3; the states are alike."""
    with torch.device("meta"):
        first, moved = ResNet(get_specification(name)), ResNet(get_specification(f"{name}v1.5"))
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in moved.state_dict().items()}
    modules = dict(moved.named_modules())
    differing = {}
    for key, module in first.named_modules():
        if isinstance(module, nn.Conv2d) and repr(module) != repr(modules[key]):
            differing[key] = (module.stride, cast(nn.Conv2d, modules[key]).stride)
    later = range(2, len(first.spec.depths) + 1)
    assert differing == {
        f"layer{stage}.0.conv{i}": ((2, 2), (1, 1)) if i == 1 else ((1, 1), (2, 2)) for stage in later for i in (1, 2)
    }


def test_v1_is_torchvision_with_its_strides_moved() -> None:
    other = cast(Any, theirs("torchvision", "resnet50"))
    state = random_state(other)
    net, moved = ours("resnet50"), ours("resnet50v1.5")
    with pytest.warns(UserWarning, match=r"build 'resnet50v1\.5'"):
        net.load_state_dict(state)
    for each in (moved, other):
        each.load_state_dict(state)
    x = images(2, 3, 70, 75)
    with torch.no_grad():
        assert not torch.allclose(net.eval()(x), moved.eval()(x))
    for stage in (other.layer2, other.layer3, other.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert_same(net, other, x)


def cifar_net(state: dict[str, Tensor], x: Tensor, n: int, residual: bool, train: bool) -> Tensor:
    """The 6n+2 net of 2015 §4.2, written out; option A as fb.resnet.torch has it: 1x1 average pooling, zeros after."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, variance = (state[f"{bn}.running_{what}"].clone() for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, state[f"{bn}.weight"], state[f"{bn}.bias"], training=train)

    x = conv_bn(x, "conv1", "bn1").relu()
    for unit in range(3 * n):
        name = f"layer{unit // n + 1}.{unit % n}"
        stride = 2 if unit in (n, 2 * n) else 1
        y = conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
        y = conv_bn(y, f"{name}.conv2", f"{name}.bn2")
        if stride == 2:
            x = F.avg_pool2d(x, kernel_size=1, stride=2)
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        x = (x + y).relu() if residual else y.relu()
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "n", "residual"), [("resnet20", 3, True), ("resnet32", 5, True), ("plain20", 3, False)]
)
def test_cifar_nets(name: str, n: int, residual: bool, train: bool) -> None:
    net = ours(name)
    state = random_state(net)
    net.load_state_dict(state)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        expected = cifar_net(state, x, n, residual, train)
        assert expected.std(0).min() > 0
        torch.testing.assert_close(net.train(train)(x), expected, rtol=1e-10, atol=1e-10)


# Keys. "bn" stands for a BN layer's five entries, any other word for a weight.

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KEYS = {
    "resnet8": """conv1 bn1
        layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2
        layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2
        layer3.0.conv1 layer3.0.bn1 layer3.0.conv2 layer3.0.bn2 fc""",
    "preresnet8": """conv1 bn1
        layer1.0.conv1 layer1.0.conv2 layer1.0.bn2
        layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2
        layer3.0.conv1 layer3.0.bn1 layer3.0.conv2 layer3.0.bn2 bn_last fc""",
}
FIRST_UNITS = {
    "resnet164": "conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1",
    "preresnet164": "conv1 conv2 bn2 conv3 bn3 downsample.0",
    "resnet50": "conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1",
    "preresnet50": "conv1 conv2 bn2 conv3 bn3 downsample.0",
    "preresnet18": "conv1 conv2 bn2",
}


def expand_keys(words: str, prefix: str = "") -> list[str]:
    keys = []
    for word in words.split():
        is_bn = word.rpartition(".")[2].startswith("bn") or word.endswith("downsample.1")
        entries = BN if is_bn else ("weight", "bias") if word == "fc" else ("weight",)
        keys += [f"{prefix}{word}.{entry}" for entry in entries]
    return keys


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str) -> None:
    with torch.device("meta"):
        assert list(ResNet(get_specification(name)).state_dict()) == expand_keys(KEYS[name])


@pytest.mark.parametrize("name", FIRST_UNITS)
def test_keys_of_the_first_unit(name: str) -> None:
    with torch.device("meta"):
        keys = list(ResNet(get_specification(name)).state_dict())
    assert [key for key in keys if key.startswith("layer1.0.")] == expand_keys(FIRST_UNITS[name], "layer1.0.")
    assert ("bn_last.weight" in keys) == name.startswith("pre")


@pytest.mark.parametrize("shortcut", ["exclusive-gate", "shortcut-gate"])
def test_keys_of_a_gated_unit(shortcut: str) -> None:
    with torch.device("meta"):
        keys = list(ResNet(get_specification("resnet8", shortcut=shortcut)).state_dict())
    unit = [key for key in keys if key.startswith("layer2.0.")]
    assert unit == [
        *expand_keys("conv1 bn1 conv2 bn2", "layer2.0."),
        *(f"layer2.0.junction.conv.{e}" for e in ("weight", "bias")),
    ]


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet34", "resnet50"])
def test_plain_and_option_a_have_the_same_parameters(name: str) -> None:
    with torch.device("meta"):
        plain, a, b = (
            ResNet(get_specification(name, shortcut=shortcut)).state_dict() for shortcut in ("none", "A", "B")
        )
    assert [(k, v.shape) for k, v in plain.items()] == [(k, v.shape) for k, v in a.items()]
    assert all(".downsample." in key for key in b.keys() - a.keys()) and b.keys() > a.keys()


def test_every_bn_is_caffes() -> None:
    """eps 1e-5, as in the released models; 0.1 of the new batch enters the running statistics."""
    for name in [*list_network_names()[:3], "preresnet50", "resnet50v1.5"]:
        with torch.device("meta"):
            norms = [m for m in ResNet(get_specification(name)).modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum, m.affine, m.track_running_stats) for m in norms} == {(1e-5, 0.1, True, True)}
