"""Names and specifications: their values, their errors, and the networks that are built from them."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnetlab.errors import ModelFileError, UsageError
from resnetlab.models.resnet import ResNet, SmallImageWarning, build, build_from_spec, init_weights
from resnetlab.models.spec import (
    CIFAR_DEPTHS,
    IMAGENET_DEPTHS,
    Specification,
    get_specification,
    list_network_names,
    parse_changes,
)
from resnetlab.nn import shortcuts
from resnetlab.nn.blocks import ACTIVATION_ORDERS

# Names.


@pytest.mark.parametrize("name", list_network_names())
def test_every_known_name_builds_and_its_depth_is_its_number(name: str) -> None:
    spec = get_specification(name)
    number = int(name.removesuffix("v1.5").lstrip("abcdefghijklmnopqrstuvwxyz"))
    assert spec.depth == number
    with torch.device("meta"):
        net = ResNet(spec)
    convolutions = sum(isinstance(m, nn.Conv2d) for k, m in net.named_modules() if "downsample" not in k)
    assert convolutions + 1 == number
    assert len(list(net.blocks())) == sum(spec.depths)


def test_the_known_names() -> None:
    assert (CIFAR_DEPTHS, tuple(IMAGENET_DEPTHS)) == ((20, 32, 44, 56, 110, 1202), (18, 34, 50, 101, 152, 200))
    depths = {18, 20, 32, 34, 44, 50, 56, 101, 110, 152, 164, 200, 1001, 1202}
    names = {f"{prefix}{depth}" for prefix in ("resnet", "plain", "preresnet") for depth in depths}
    assert set(list_network_names()) == names | {f"resnet{depth}v1.5" for depth in (50, 101, 152, 200)}


CIFAR20 = Specification(block="basic", depths=(3, 3, 3), widths=(16, 32, 64), stem="cifar", shortcut="A", classes=10)
RESNET50 = Specification(
    block="bottleneck", depths=(3, 4, 6, 3), widths=(64, 128, 256, 512), stem="imagenet", shortcut="B"
)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet20", CIFAR20),
        ("plain20", replace(CIFAR20, shortcut="none")),
        ("preresnet20", replace(CIFAR20, activation_order="preact")),
        ("resnet8", replace(CIFAR20, depths=(1, 1, 1))),
        ("preresnet26", replace(CIFAR20, depths=(4, 4, 4), activation_order="preact")),
        ("resnet1202", replace(CIFAR20, depths=(200, 200, 200))),
        ("resnet164", replace(CIFAR20, block="bottleneck", depths=(18, 18, 18), shortcut="B")),
        (
            "preresnet1001",
            replace(CIFAR20, block="bottleneck", depths=(111, 111, 111), shortcut="B", activation_order="preact"),
        ),
        ("resnet34", replace(RESNET50, block="basic")),
        ("plain18", replace(RESNET50, block="basic", depths=(2, 2, 2, 2), shortcut="none")),
        ("resnet50", RESNET50),
        ("resnet50v1.5", replace(RESNET50, stride_in="3x3")),
        ("resnet101", replace(RESNET50, depths=(3, 4, 23, 3))),
        ("resnet152v1.5", replace(RESNET50, depths=(3, 8, 36, 3), stride_in="3x3")),
        ("preresnet200", replace(RESNET50, depths=(3, 24, 36, 3), activation_order="preact")),
        ("preresnet164v1.5", replace(get_specification("preresnet164"), stride_in="3x3")),
    ],
)
def test_specifications_of_names(name: str, spec: Specification) -> None:
    assert get_specification(name) == spec


def test_defaults_that_the_papers_leave_open() -> None:
    """The defaults are recorded in docs/differences.md, and in every model file."""
    assert get_specification("resnet18").to_json() == {
        "block": "basic",
        "depths": [2, 2, 2, 2],
        "widths": [64, 128, 256, 512],
        "stem": "imagenet",
        "shortcut": "B",
        "activation_order": "original",
        "stride_in": "first",
        "layers": 2,
        "zero_pad": "append",
        "preact_transition": "shared",
        "shortcut_scale": 0.5,
        "residual_scale": 0.5,
        "gate_bias": -6.0,
        "shortcut_dropout": 0.5,
        "maxpool": "padded",
        "conv1_bias": False,
        "channels": 3,
        "classes": 1000,
    }


def test_changes_override_the_name() -> None:
    spec = get_specification("plain20", shortcut="A", activation_order="preact", classes=3, depths=[1, 2, 3])
    assert spec == replace(CIFAR20, activation_order="preact", classes=3, depths=(1, 2, 3))
    assert hash(spec) == hash(get_specification("preresnet20", classes=3, depths=(1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("resnet-20", {}, "unknown network 'resnet-20'; did you mean 'resnet20'?"),
        ("ResNet50", {}, "unknown network 'ResNet50'; did you mean 'resnet50'?"),
        ("resnet050", {}, "unknown network 'resnet050'; did you mean 'resnet50'?"),
        ("preactresnet18", {}, "unknown network 'preactresnet18'; did you mean 'preresnet18'?"),
        ("resnet50v15", {}, "unknown network 'resnet50v15'; did you mean 'resnet50v1.5'?"),
        ("fancynet", {}, "unknown network 'fancynet'; known: " + ", ".join(list_network_names()) + "."),
        (
            "vgg",
            {},
            (
                "'vgg' is not one of the papers' networks, which are built here (`resnetlab models` lists them); any "
                "torch.nn.Module, of torchvision or timm too, is trained from Python: resnetlab.train(data, net=module)."
            ),
        ),
        (
            "resnet18v1.5",
            {},
            "'resnet18v1.5': v1.5 moves a bottleneck's stride, and depth 18 has no bottlenecks; use resnet18.",
        ),
        ("resnet20", {"shorcut": "B"}, "unknown key of a network's specification 'shorcut'; did you mean 'shortcut'?"),
        ("resnet20", {"activation_order": "pre-act"}, "unknown activation_order 'pre-act'; did you mean 'preact'?"),
        ("resnet20", {"zero_pad": "center"}, "unknown zero_pad 'center'; did you mean 'centre'?"),
        ("resnet20", {"stem": "x"}, "unknown stem 'x'; known: cifar, imagenet."),
        ("resnet20", {"block": "bottlenek"}, "unknown block 'bottlenek'; did you mean 'bottleneck'?"),
        ("resnet20", {"classes": 0}, "classes must be a whole number from 1 up, not 0."),
        ("resnet20", {"channels": 1.5}, "channels must be a whole number from 1 up, not 1.5."),
        ("resnet20", {"layers": True}, "layers must be a whole number from 1 up, not True."),
        ("resnet50", {"layers": 5}, "a bottleneck always has three layers, so layers=5 has no effect; leave it out."),
        ("resnet20", {"depths": 3}, "depths must be whole numbers from 1 up, one for each stage, not 3."),
        ("resnet20", {"depths": ()}, "depths must be whole numbers from 1 up, one for each stage, not ()."),
        (
            "resnet20",
            {"depths": (1, True, 1)},
            "depths must be whole numbers from 1 up, one for each stage, not (1, True, 1).",
        ),
        (
            "resnet20",
            {"widths": (8, 0, 8)},
            "widths must be whole numbers from 1 up, one for each stage, not (8, 0, 8).",
        ),
        (
            "resnet20",
            {"widths": (8, 16)},
            "depths (3, 3, 3) and widths (8, 16) differ in length; give one of each per stage.",
        ),
        (
            "resnet20",
            {"widths": (8, 4, 8)},
            "widths (8, 4, 8) shrink, but shortcut 'A' only adds channels; use 'B'.",
        ),
        ("resnet20", {"shortcut_dropout": 1.0}, "shortcut_dropout must be in [0, 1), not 1.0."),
        ("resnet20", {"gate_bias": "-6"}, "gate_bias must be a finite number, not '-6'."),
        ("resnet20", {"shortcut_scale": math.inf}, "shortcut_scale must be a finite number, not inf."),
    ],
)
def test_messages_for_wrong_names_keys_and_values(name: str, changes: dict[str, Any], sentence: str) -> None:
    for make in (get_specification, build):
        with pytest.raises(UsageError) as error:
            make(name, **changes)
        assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("depth", "low", "high"), [(21, 20, 26), (5, 8, 14), (25, 20, 26), (48, 44, 56), (149, 140, 146), (163, 158, 170)]
)
def test_an_invalid_depth_suggests_the_nearest(depth: int, low: int, high: int) -> None:
    """50, 152, 164 and 200 have 6n+2 layers too, but are names of other nets, so they are not suggested."""
    with pytest.raises(UsageError) as error:
        get_specification(f"plain{depth}")
    assert str(error.value) == (
        f"unknown network 'plain{depth}': CIFAR nets have 6n+2 layers, so the nearest depths are {low} and {high}; "
        "ImageNet nets have 18, 34, 50, 101, 152, 200."
    )
    assert (get_specification(f"plain{low}").depth, get_specification(f"plain{high}").depth) == (low, high)


def test_changes_given_as_text() -> None:
    pairs = {"depths": "1, 2,3", "classes": "7", "gate_bias": "-3", "shortcut": "exclusive-gate"}
    spec = get_specification("resnet20", **parse_changes(pairs))
    assert spec == replace(CIFAR20, depths=(1, 2, 3), classes=7, gate_bias=-3.0, shortcut="exclusive-gate")


# The specification as JSON.


def widths_and_depths(shrinking: bool) -> st.SearchStrategy[dict[str, Any]]:
    stages = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6)), min_size=1, max_size=4)
    return stages.map(
        lambda s: {"depths": [d for d, _ in s], "widths": [w for _, w in s] if shrinking else sorted(w for _, w in s)}
    )


@st.composite
def specifications(draw: st.DrawFn) -> Specification:
    """Any valid specification of a small network."""
    shortcut = draw(st.sampled_from(shortcuts.SHORTCUTS))
    block = draw(st.sampled_from(["basic", "bottleneck"]))
    numbers = st.floats(-10, 10)
    return Specification(
        **draw(widths_and_depths(shortcut in ("none", "B", "C", "conv"))),
        block=block,
        stem=draw(st.sampled_from(["cifar", "imagenet"])),
        shortcut=shortcut,
        activation_order=draw(st.sampled_from(list(ACTIVATION_ORDERS))),
        stride_in=draw(st.sampled_from(["first", "3x3"])),
        layers=2 if block == "bottleneck" else draw(st.integers(1, 3)),
        zero_pad=draw(st.sampled_from(["append", "centre"])),
        preact_transition=draw(st.sampled_from(["shared", "raw"])),
        shortcut_scale=draw(numbers),
        residual_scale=draw(numbers),
        gate_bias=draw(numbers),
        shortcut_dropout=draw(st.floats(0, 0.9)),
        channels=draw(st.integers(1, 7)),
        classes=draw(st.integers(1, 5)),
    )


@given(specifications())
@settings(max_examples=100, deadline=None)
def test_json_round_trip(spec: Specification) -> None:
    assert Specification.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(specifications(), st.integers(33, 70), st.integers(33, 70), st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_valid_specification_is_a_network(spec: Specification, height: int, width: int, train: bool) -> None:
    net = build_from_spec(spec, seed=0).train(train)
    with warnings.catch_warnings(action="ignore", category=SmallImageWarning), torch.no_grad():
        x = torch.linspace(-2, 2, 2 * spec.channels * height * width).view(2, spec.channels, height, width).sin()
        maps, logits = net.features(x), net(x)
    assert logits.shape == (2, spec.classes) and logits.isfinite().all()
    assert [maps[f"C{i}"].shape[1] for i in range(2, len(maps) + 1)] == list(spec.out_widths)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"shortcuts": "A", "activation": "relu"},
            (
                "the specification has unknown keys ['activation', 'shortcuts']; "
                "it was written by a newer version of resnetlab."
            ),
        ),
        (
            {"activation_order": "postact"},
            "the specification cannot be used: unknown activation_order 'postact'; did you mean 'preact'?",
        ),
        (
            {"depths": 3},
            "the specification cannot be used: depths must be whole numbers from 1 up, one for each stage, not 3.",
        ),
        ({"gate_bias": None}, "the specification cannot be used: gate_bias must be a finite number, not None."),
    ],
)
def test_json_that_this_version_cannot_use(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelFileError) as error:
        Specification.from_json(CIFAR20.to_json() | change)
    assert str(error.value) == sentence


def test_json_with_a_key_missing() -> None:
    values = CIFAR20.to_json()
    del values["stem"]
    with pytest.raises(ModelFileError, match="'stem'"):
        Specification.from_json(values)
    assert Specification.from_json({k: v for k, v in CIFAR20.to_json().items() if k != "zero_pad"}) == CIFAR20


# Images of any kind.


@pytest.mark.parametrize("name", ["resnet8", "preresnet8", "resnet18"])
@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [(33, 47), (32, 32), (65, 101)])
def test_images_of_any_size_and_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    if name == "resnet18":
        size = (size[0] + 65, size[1] + 65)
    net = build(name, channels=channels, classes=5, seed=0).eval()
    assert net.conv1.in_channels == channels
    with torch.no_grad():
        x = torch.randn(2, channels, *size)
        maps, logits = net.features(x), net(x)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    shrinks = [1, 1, 2, 4] if net.spec.stem == "cifar" else [2, 4, 8, 16, 32]
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(-(-size[0] // s), -(-size[1] // s)) for s in shrinks]


@pytest.mark.parametrize(("size", "left"), [((64, 64), "2x2"), ((28, 28), "1x1"), ((200, 33), "7x2")])
def test_small_images_in_an_imagenet_net(size: tuple[int, int], left: str) -> None:
    sentence = (
        f"images of {size[0]}x{size[1]} pixels in a network with ImageNet's 7x7 stem, "
        f"which leaves them {left} at the end; enlarge them, or use a CIFAR net such as resnet20 or resnet56, which are for "
        "classifiers."
    )
    net = build("resnet18", classes=2, seed=0).eval()
    with pytest.warns(SmallImageWarning) as caught:
        last = net.forward_features(torch.zeros(1, 3, *size))
    assert [(str(w.message), w.filename) for w in caught] == [(sentence, __file__)]
    assert f"{last.shape[2]}x{last.shape[3]}" == left
    with warnings.catch_warnings(action="error"):
        net(torch.zeros(1, 3, *size))  # once a network


def test_the_small_image_warning_depends_on_the_number_of_stages() -> None:
    net = build("resnet18", depths=(1, 1), widths=(4, 8), seed=0).eval()
    with pytest.warns(SmallImageWarning, match="leaves them 6x8 at the end"):
        assert net.features(torch.zeros(1, 3, 41, 63))["C3"].shape[2:] == (6, 8)


@pytest.mark.parametrize(("name", "side"), [("resnet18", 65), ("resnet20", 64), ("resnet20", 28)])
def test_no_warning(name: str, side: int) -> None:
    with warnings.catch_warnings(action="error"), torch.no_grad():
        build(name, seed=0).eval()(torch.zeros(1, 3, side, side))


# Initialisation.


@pytest.mark.parametrize("init", ["fan_in", "fan_out"])
@pytest.mark.parametrize("name", ["resnet56", "resnet18", "preresnet164", "resnet50v1.5"])
def test_convolutions_are_normal_with_the_he_deviation(name: str, init: str) -> None:
    """N(0, sqrt(2/n)), n = k² C_in or k² C_out: mean, deviation and tails of each layer within five standard errors."""
    net = build(name, init=init, seed=0)
    for key, module in net.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        w = module.weight.detach().double()
        n = module.kernel_size[0] ** 2 * (module.in_channels if init == "fan_in" else module.out_channels)
        deviation, error = math.sqrt(2 / n), 5 / math.sqrt(w.numel())
        assert abs(w.mean().item()) < error * deviation, key
        assert abs(w.std().item() / deviation - 1) < error / math.sqrt(2), key
        beyond = (w.abs() > 2 * deviation).double().mean().item()  # 0.0455 of a normal distribution
        assert abs(beyond - 0.0455) < error * math.sqrt(0.0455), key


def test_fan_in_and_fan_out_differ_where_channels_do() -> None:
    stds = []
    for init in ("fan_in", "fan_out"):
        weight = build("resnet164", init=init, seed=0).get_parameter("layer1.0.downsample.0.weight")
        stds.append(weight.std().item())
    assert stds == pytest.approx([0.354, 0.177], rel=0.1)


@pytest.mark.parametrize("name", ["resnet20", "preresnet20", "resnet50"])
@pytest.mark.parametrize("shortcut", ["B", "exclusive-gate"])
def test_every_value_is_set(name: str, shortcut: str) -> None:
    """Nothing is left of what stood there before; the values that are not random are the papers'."""
    net = build_from_spec(get_specification(name, shortcut=shortcut, gate_bias=-4.0, depths=(1, 1), widths=(16, 32)))
    for value in net.state_dict().values():
        value.fill_(math.nan if value.is_floating_point() else 99)
    init_weights(net, seed=0)
    for key, value in net.state_dict().items():
        kind, _, entry = key.rpartition(".")
        if entry in ("running_mean", "num_batches_tracked") or (entry == "bias" and "junction" not in kind):
            assert not value.any(), key
        elif entry == "running_var" or (value.dim() == 1 and entry == "weight"):
            assert (value == 1).all(), key
        elif entry == "bias":
            assert (value == -4).all(), key
        else:
            assert value.isfinite().all() and len(value.unique()) > 0.9 * value.numel(), key
    bound = 1 / math.sqrt(net.fc.in_features)
    assert 0.9 * bound < net.fc.weight.abs().max().item() <= bound


def bits(seed: int | None) -> dict[str, torch.Tensor]:
    return build("resnet20", shortcut="shortcut-gate", seed=seed).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[bool]:
    """For every random entry, whether it is the same."""
    return {torch.equal(a[key], b[key]) for key in a if key.endswith("weight") and a[key].dim() > 1}


def test_seeds() -> None:
    assert same(bits(1), bits(1)) == {True}
    assert same(bits(0), bits(0)) == {True}
    assert same(bits(1), bits(2)) == same(bits(0), bits(1)) == {False}
    torch.manual_seed(4)
    first, second = bits(None), bits(None)
    assert same(first, second) == {False}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert same(bits(7), bits(7)) == {True} and torch.equal(torch.get_rng_state(), state)
    assert same(bits(None), first) == {True}


def test_an_unknown_initialisation() -> None:
    with pytest.raises(UsageError) as error:
        build("resnet20", init="xavier")
    assert str(error.value) == "init must be 'fan_in' or 'fan_out', not 'xavier'."
