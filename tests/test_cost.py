"""The output of `inspect`: layers, shapes, costs, and the papers' published figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnetlab.errors import UsageError
from resnetlab.models import cost as costs
from resnetlab.models.cost import compute_cost, count_parameters, default_image_size
from resnetlab.models.resnet import ResNet, SmallImageWarning, build
from resnetlab.models.spec import get_specification

EVERY_KIND: list[tuple[str, dict[str, Any]]] = [
    ("resnet20", {}),
    ("plain20", {}),
    ("resnet20", {"shortcut": "C", "channels": 1}),
    ("resnet20", {"shortcut": "exclusive-gate"}),
    ("resnet20", {"shortcut": "constant", "activation_order": "preact"}),
    ("preresnet164", {"depths": (2, 2, 2)}),
    ("resnet18", {"classes": 7}),
    ("preresnet50", {}),
    ("resnet50v1.5", {}),
    ("resnet50", {"maxpool": "ceil"}),
    ("resnet20", {"activation_order": "bn-after-add", "layers": 3}),
    ("resnet20", {"activation_order": "relu-only-preact", "shortcut": "B"}),
]


def run_layers(net: ResNet, size: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and output shapes of the layers, in the order of a forward pass on the meta device."""
    layers: list[tuple[str, tuple[int, ...]]] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_hook(lambda _, __, y, name=name: layers.append((name, tuple(y.shape[1:]))))
    net(torch.empty(1, net.spec.channels, *size, device="meta"))
    return layers


@pytest.mark.parametrize(("name", "changes"), EVERY_KIND, ids=lambda value: str(value))
@pytest.mark.parametrize("size", [None, (71, 90)], ids=["own", "71x90"])
def test_layers_add_up(name: str, changes: dict[str, Any], size: tuple[int, int] | None) -> None:
    """The sums of the layers are the totals; the totals are those of torch's flop counter and of the parameters."""
    spec = get_specification(name, **changes)
    counted = compute_cost(spec, size)
    assert counted.image_size == (size or (default_image_size(spec),) * 2)
    assert sum(layer.parameters for layer in counted.layers) == counted.parameters
    assert sum(layer.multiply_adds for layer in counted.layers) == counted.multiply_adds
    with torch.device("meta"):
        net = ResNet(spec).eval()
        flops = FlopCounterMode(display=False)
        with flops:
            net(torch.empty(3, spec.channels, *counted.image_size))
    assert flops.get_total_flops() == 3 * 2 * counted.multiply_adds
    assert count_parameters(net) == counted.parameters
    assert len({layer.name for layer in counted.layers}) == len(counted.layers)
    kinds = [layer.kind for layer in counted.layers]
    assert kinds.count("Conv2d") == counted.convolutions and kinds.count("Linear") == 1
    assert set(kinds) == {"Conv2d", "BatchNorm2d", "Linear"}
    assert [(layer.name, layer.output) for layer in counted.layers] == run_layers(net, counted.image_size)


def test_counting_has_no_side_effects() -> None:
    before = torch.get_rng_state()
    first = compute_cost(get_specification("resnet20"))
    assert torch.equal(torch.get_rng_state(), before)
    assert compute_cost(get_specification("resnet20")) == first
    assert torch.empty(1).device.type == "cpu"
    assert count_parameters(build("resnet20", seed=0)) == first.parameters


STAGES = {
    # name: the height of every map after the stem and each stage, the channels of each
    "resnet18": ((112, 56, 28, 14, 7), (64, 64, 128, 256, 512)),
    "resnet34": ((112, 56, 28, 14, 7), (64, 64, 128, 256, 512)),
    "resnet50": ((112, 56, 28, 14, 7), (64, 256, 512, 1024, 2048)),
    "resnet50v1.5": ((112, 56, 28, 14, 7), (64, 256, 512, 1024, 2048)),
    "preresnet152": ((112, 56, 28, 14, 7), (64, 256, 512, 1024, 2048)),
    "plain34": ((112, 56, 28, 14, 7), (64, 64, 128, 256, 512)),
    "resnet20": ((32, 32, 16, 8), (16, 16, 32, 64)),
    "plain56": ((32, 32, 16, 8), (16, 16, 32, 64)),
    "preresnet110": ((32, 32, 16, 8), (16, 16, 32, 64)),
    "resnet164": ((32, 32, 16, 8), (16, 64, 128, 256)),
    "preresnet164": ((32, 32, 16, 8), (16, 64, 128, 256)),
}


@pytest.mark.parametrize("name", STAGES)
def test_shapes_of_stages(name: str) -> None:
    """2015 Table 1 (224x224) and §4.2 (32x32)."""
    sizes, channels = STAGES[name]
    spec = get_specification(name)
    with torch.device("meta"):
        maps = ResNet(spec).eval().features(torch.empty(2, 3, default_image_size(spec), default_image_size(spec)))
    assert {key: tuple(value.shape) for key, value in maps.items()} == {
        f"C{i}": (2, c, size, size) for i, (size, c) in enumerate(zip(sizes, channels, strict=True), 1)
    }
    outputs = {layer.name: layer.output for layer in compute_cost(spec).layers}
    assert outputs["conv1"] == (channels[0], sizes[0], sizes[0])
    assert outputs["fc"] == (spec.classes,)
    last = 3 if spec.block == "bottleneck" else 2
    for stage, (size, c) in enumerate(zip(sizes[1:], channels[1:], strict=True), 1):
        assert outputs[f"layer{stage}.0.conv{last}"] == (c, size, size)


def test_published_figures() -> None:
    """2015 Table 1 and Table 6; the exact counts round, or are cut, to them."""
    printed = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}
    for depth, figure in printed.items():
        counted = compute_cost(get_specification(f"resnet{depth}"))
        assert (counted.paper_multiply_adds, counted.paper_parameters) == (figure, None)
        assert abs(counted.multiply_adds - figure) < 0.07e9
    printed = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6}
    for depth, figure in printed.items():
        counted = compute_cost(get_specification(f"resnet{depth}"))
        assert (counted.paper_parameters, counted.paper_multiply_adds) == (figure, None)
        assert counted.parameters == pytest.approx(figure, rel=0.02)
    assert costs.PAPER_PARAMETERS[1202] == 19.4e6
    small, deep = (compute_cost(get_specification(f"preresnet{depth}")) for depth in (164, 1001))
    assert (small.paper_parameters, deep.paper_parameters, deep.source) == (1.7e6, 10.2e6, "2016 Table 4")
    norms = sum(layer.parameters for layer in deep.layers if layer.kind == "BatchNorm2d")
    assert deep.parameters - norms == 10_178_490  # what the paper's 10.2M counts


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain20", {}),
        ("resnet20", {"zero_pad": "centre"}),
        ("plain34", {}),
        ("resnet34", {"shortcut": "A"}),
        ("resnet18", {"shortcut": "A", "zero_pad": "centre"}),
    ],
)
def test_figures_that_also_hold_for_variants(name: str, changes: dict[str, Any]) -> None:
    """Plain nets and option A have the printed cost too; the place of the zeros changes nothing."""
    counted = compute_cost(get_specification(name, **changes))
    assert (counted.paper_parameters or counted.paper_multiply_adds) is not None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preresnet20", {}),
        ("resnet20", {"shortcut": "B"}),
        ("resnet20", {"shortcut": "C"}),
        ("resnet20", {"classes": 100}),
        ("resnet20", {"channels": 1}),
        ("resnet20", {"activation_order": "bn-after-add"}),
        ("resnet20", {"layers": 1, "depths": (6, 6, 6)}),  # depth 20, another net
        ("resnet20", {"depths": (2, 3, 4)}),  # depth 20, another net
        ("resnet20", {"widths": (32, 64, 128)}),
        ("resnet164", {}),
        ("resnet164", {"depths": (2, 2, 2), "shortcut": "A"}),  # depth 20, another net
        ("resnet26", {}),
        ("resnet50v1.5", {}),
        ("resnet50", {"shortcut": "A"}),  # 3.50e9, not the 3.8e9 of option B
        ("resnet50", {"shortcut": "C"}),
        ("plain50", {}),
        ("preresnet50", {}),
        ("resnet34", {"shortcut": "C"}),
        ("resnet34", {"depths": (4, 4, 4, 4)}),  # depth 34, another net
        ("resnet18", {"depths": (6, 6, 6, 6), "block": "basic"}),  # depth 50, another net
        ("resnet200", {}),
        ("resnet18", {"stem": "cifar"}),
    ],
)
def test_networks_without_published_figures(name: str, changes: dict[str, Any]) -> None:
    counted = compute_cost(get_specification(name, **changes))
    assert (counted.paper_parameters, counted.paper_multiply_adds) == (None, None)


@pytest.mark.parametrize(("name", "size"), [("resnet18", (320, 320)), ("resnet18", (224, 225)), ("resnet20", (28, 28))])
def test_no_published_figure_for_another_size(name: str, size: tuple[int, int]) -> None:
    counted = compute_cost(get_specification(name), size)
    assert (counted.paper_parameters, counted.paper_multiply_adds) == (None, None)


@pytest.mark.parametrize("size", [(0, 32), (32, 0), (-1, 5)])
def test_empty_images_are_rejected(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError) as error:
        compute_cost(get_specification("resnet20"), size)
    assert str(error.value) == f"an image of {size[0]}x{size[1]} pixels has no pixel; give a size from 1 up."


def test_an_image_of_one_pixel() -> None:
    """Every map is one pixel then, so each weight of a convolution or of fc is used once."""
    with pytest.warns(SmallImageWarning, match="enlarge them, or use a CIFAR net"):
        counted = compute_cost(get_specification("resnet18"), (1, 1))
    assert counted.multiply_adds == sum(x.parameters for x in counted.layers if x.kind == "Conv2d") + 512 * 1000


def test_json() -> None:
    """The keys that `inspect --json` prints are a contract; the document is plain."""
    document = compute_cost(get_specification("resnet20")).to_json()
    assert json.loads(json.dumps(document)) == document
    layers = document.pop("layers")
    assert document == {
        "image_size": [32, 32],
        "depth": 20,
        "convolutions": 19,
        "parameters": 269_722,
        "multiply_adds": 40_551_040,
        "paper_parameters": 0.27e6,
        "paper_multiply_adds": None,
        "source": "2015 Table 6",
    }
    assert [layer["name"] for layer in layers[:4]] == ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"]
    assert layers[0] == {
        "name": "conv1",
        "kind": "Conv2d",
        "output": [16, 32, 32],
        "parameters": 432,
        "multiply_adds": 442_368,
    }
    assert layers[1]["multiply_adds"] == 0 and layers[1]["parameters"] == 32
    assert layers[-1] == {"name": "fc", "kind": "Linear", "output": [10], "parameters": 650, "multiply_adds": 640}
