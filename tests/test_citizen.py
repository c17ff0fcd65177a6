"""A network behaves as PyTorch's own: devices, compile, tracing, hooks, heads, torch.hub, weights of other places."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import resnetlab
from resnetlab.device import select_device
from resnetlab.errors import UsageError
from resnetlab.models.resnet import ResNet
from resnetlab.models.resnet import build as build_plain
from resnetlab.nn.blocks import ACTIVATION_ORDERS
from resnetlab.nn.shortcuts import SHORTCUTS

SMALLEST: dict[str, Any] = {"depths": (1, 1), "widths": (4, 8)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet8", {}),
    "plain": ("plain8", {}),
    "bottleneck": ("resnet50", SMALLEST),
    "v1.5": ("resnet50v1.5", SMALLEST),
    "imagenet stem": ("resnet18", SMALLEST),
    **{f"order {order}": ("resnet8", SMALLEST | {"activation_order": order}) for order in ACTIVATION_ORDERS},
    **{f"shortcut {kind}": ("resnet8", SMALLEST | {"shortcut": kind}) for kind in SHORTCUTS},
    "preact bottleneck": ("preresnet50", {"depths": (2, 1), "widths": (4, 8)}),
}
SMALL = "ignore:images of .* in a network with ImageNet's 7x7 stem"


def make(family: str) -> ResNet:
    name, changes = FAMILIES[family]
    return build_plain(name, seed=0, **{"classes": 5} | changes).eval()


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_can_be_extracted_by_torchvision(family: str) -> None:
    net, x = make(family), images()
    found = create_feature_extractor(net, {"layer1": "low", "fc": "logits"})(x)
    assert torch.equal(
        found["low"], net.features(x)["C2"] if "order" not in family or "preact" not in family else found["low"]
    )
    assert torch.equal(found["logits"], net(x))


def test_scripting_is_answered() -> None:
    for module in (make("basic"), nn.Sequential(make("basic"))):
        with warnings.catch_warnings(action="ignore"), pytest.raises(UsageError, match=r"use torch\.compile"):
            torch.jit.script(module)


def test_networks_of_other_packages_are_answered() -> None:
    for name in ("wide_resnet50_2", "resnext50_32x4d", "resnet50d", "seresnet50", "convnext_tiny", "ViT_b_16"):
        with pytest.raises(UsageError, match=f"'{name}' is not one of the papers' networks.*net=module"):
            resnetlab.build(name)
    for name in ("ResNet50", "resnet_50", "preact_resnet18"):
        with pytest.raises(UsageError, match="did you mean"):
            resnetlab.build(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_compile_without_a_graph_break(family: str) -> None:
    torch._dynamo.reset()
    net, x = make(family), images()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_every_layer_see_what_the_layer_gave(family: str) -> None:
    """In place, the ReLU after a BN changed the tensor that a hook on the BN had kept: 7,821 of its values were below 0."""
    net, x = make(family).train(), images().requires_grad_()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(0)
    expected = net(x)
    net.load_state_dict(state)
    kept: list[tuple[str, Tensor, Tensor]] = []
    for name, module in net.named_modules():
        if name:
            module.register_forward_hook(lambda m, i, out, name=name: kept.append((name, out, out.detach().clone())))
            module.register_full_backward_hook(lambda m, i, o: None)
    torch.manual_seed(0)
    out = net(x)
    assert torch.equal(out, expected)
    changed = [name for name, tensor, then in kept if not torch.equal(tensor, then)]
    assert changed == [] and any((then < 0).any() for name, _, then in kept if "bn" in name)
    out.sum().backward()


def test_relu_is_in_place_again_without_hooks_and_can_be_switched_off() -> None:
    net, x = make("basic"), images()
    bn = net.get_submodule("layer1.0.bn1")
    kept: list[Tensor] = []
    hook = bn.register_forward_hook(lambda m, i, out: kept.append(out))
    net(x)
    assert bool((kept[0] < 0).any())
    hook.remove()
    bn.forward = lambda x, forward=bn.forward: kept.append(forward(x)) or kept[-1]  # type: ignore[method-assign]
    net(x)
    assert not bool((kept[1] < 0).any())
    for _, block in net.blocks():
        block.inplace = False
    net(x)
    assert bool((kept[2] < 0).any())


def test_contexts_and_the_default_device_are_respected() -> None:
    with torch.device("meta"):
        assert resnetlab.build("resnet50").conv1.weight.is_meta
    assert resnetlab.build("resnet20", device="meta").fc.weight.is_meta
    torch.set_default_device("meta")
    try:
        assert resnetlab.build("resnet20").fc.weight.is_meta
        here = resnetlab.build("resnet20", device="cpu", seed=0)
    finally:
        torch.set_default_device(None)
    assert torch.equal(here.fc.weight, resnetlab.build("resnet20", seed=0).fc.weight)
    with pytest.raises(UsageError, match="device 'nowhere' cannot be used"):
        resnetlab.build("resnet20", device="nowhere")


def test_auto_takes_mps_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(UsageError, match="device 'mps' is not available"):  # it is not, so torch refuses it
        select_device()
    with pytest.raises(UsageError, match="device 'cuda:7' is not available"):
        select_device(device="7")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *_, **__: ones(1))  # as if it were there
    chosen = select_device(training=True)
    assert str(chosen) == "mps, fp32, channels_last (half precision on MPS was not checked)"


def test_heads_are_as_timms() -> None:
    net, x = make("basic"), images()
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), net(x))
    assert torch.equal(net.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert net.num_features == 64 and net.get_classifier() is net.fc
    net.reset_classifier(3)
    assert net.num_classes == 3
    assert net(x).shape == (2, 3) and net.spec.classes == 3 and bool((net.fc.bias == 0).all())
    assert float(net.fc.weight.detach().abs().max()) <= 1 / 8
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity) and torch.equal(net(x), features.mean((2, 3)))
    assert net.num_classes == 0
    assert torch.equal(resnetlab.build("resnet8", num_classes=0)(x), net(x)) is False  # other weights
    assert resnetlab.build("resnet8", num_classes=0)(x).shape == (2, 64)
    trained = resnetlab.build("resnet20", weights="cifar10:resnet20", num_classes=0).eval()
    assert trained.num_classes == 0 and trained(x).shape == (2, 64)
    net.fc = nn.Linear(64, 9)
    assert net.num_classes == 9  # also of a head that was put there
    net.reset_classifier(4, global_pool="avg")
    assert net.num_classes == 4


def test_torch_fx_traces_a_network_that_recomputes_in_training() -> None:
    net, x = resnetlab.build("resnet8", seed=0), images()
    net.set_grad_checkpointing()
    traced = torch.fx.symbolic_trace(net)
    assert net.recompute and torch.equal(traced(x), net(x))


def test_torch_jit_traces_without_a_warning() -> None:
    net, x = resnetlab.build("resnet18", widths=(2, 2, 2, 2), classes=2, seed=0).eval(), torch.rand(1, 3, 96, 96)
    with warnings.catch_warnings(action="ignore"):  # torch has deprecated it
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    assert torch.equal(traced(x), net(x))


def test_torch_hub_loads_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    repository = str(Path(__file__).resolve().parents[1])
    net = torch.hub.load(repository, "resnet20", source="local", num_classes=7, seed=0)
    assert torch.equal(net.fc.weight, resnetlab.build("resnet20", num_classes=7, seed=0).fc.weight)
    assert torch.hub.load(repository, "resnet50v1_5", source="local", **SMALLEST).spec.stride_in == "3x3"


def test_pretrained_names_the_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, changes: object) -> Any:
        asked.append(name)
        raise UsageError("no network here")

    monkeypatch.setattr("resnetlab.inference.build.load_start", download)
    with pytest.raises(UsageError, match="no network here"):
        resnetlab.build("resnet50", pretrained=True)
    assert asked == ["torchvision:resnet50.IMAGENET1K_V2"]
    with pytest.raises(UsageError, match=r"ImageNet weights of resnet18, .*there are none of resnet20"):
        resnetlab.build("resnet20", pretrained=True)


def test_train_starts_from_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def load(name: str, *_: object) -> Any:
        asked.append(name)
        raise UsageError("no network here")

    monkeypatch.setattr("resnetlab.training.tasks.starting_network.load_start", load)
    with pytest.raises(UsageError, match="no network here"):
        resnetlab.train("digits", net="resnet18", pretrained=True, progress=False, out=tmp_path / "run")
    assert asked == ["torchvision:resnet18.IMAGENET1K_V1"] and not (tmp_path / "run").exists()


def test_list_models_takes_a_pattern() -> None:
    assert "resnet50v1.5" in resnetlab.list_models("resnet50*") and resnetlab.list_models("vgg*") == []
    assert len(resnetlab.list_models()) > 40
