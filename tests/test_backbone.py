"""Backbones: the same maps as torchvision's and timm's, dilation, fixed BN, and the interfaces of other libraries."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork

from resnetlab.errors import UsageError
from resnetlab.models.backbone import Backbone, Encoder, Features, dilate, freeze, levels
from resnetlab.models.resnet import ResNet, build
from resnetlab.nn.batchnorm import FixedBatchNorm, fix_bn

ALL = {f"C{i + 2}": str(i) for i in range(4)}


def prepare(net: ResNet) -> ResNet:
    """Eval mode, float64, BN with statistics that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 5)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net.double().eval()


def image(size: int = 96, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_maps_are_those_of_torchvisions_fpn_backbone() -> None:
    theirs = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d)
    net = build("resnet50v1.5", seed=0)
    prepare(net)
    missing, unexpected = theirs.body.load_state_dict(net.state_dict(), strict=False)
    assert missing == [] and {k.split(".")[0] for k in unexpected} == {"fc"}
    body, ours = theirs.body.double().eval(), Backbone(net, ALL)
    with torch.no_grad():
        a, b = body(image()), ours(image())
    assert list(a) == list(b) == ["0", "1", "2", "3"]
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-10)
    pyramid = FeaturePyramidNetwork(ours.channels, 256)
    assert pyramid({k: v.float() for k, v in b.items()})["3"].shape == (2, 256, 3, 3)


def test_weights_of_torchvisions_layout_move_in_both_directions() -> None:
    theirs = resnet50(weights=None)
    net = build("resnet50v1.5", seed=1)
    net.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(net.state_dict())


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("ours", "theirs"), [("resnet18", "resnet18"), ("resnet50v1.5", "resnet50")])
def test_dilation_is_timms(ours: str, theirs: str, output_stride: int) -> None:
    other = timm.create_model(theirs, pretrained=False, output_stride=output_stride, num_classes=1000).double().eval()
    net = prepare(build(ours, seed=0))
    other.load_state_dict(net.state_dict())
    dilate(net, output_stride)
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(image()), other.forward_features(image()), rtol=0, atol=1e-9)
    assert levels(net)["C5"].stride == output_stride


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet18", {}),
        ("resnet50", {}),  # the stride in the first 1x1: timm has no such dilation
        ("preresnet18", {}),
        ("preresnet50", {"shortcut": "C"}),
        ("resnet34", {"shortcut": "A", "layers": 3, "depths": (1, 2, 2, 1)}),
        ("resnet18", {"shortcut": "exclusive-gate"}),
        ("plain18", {}),
    ],
)
@pytest.mark.parametrize("size", [96, 101])
def test_a_dilated_network_sampled_at_its_old_stride_is_the_old_network(
    name: str, changes: dict[str, object], size: int
) -> None:
    plain = prepare(build(name, seed=0, widths=(8, 16, 16, 24), **changes))
    dilated = prepare(build(name, seed=0, widths=(8, 16, 16, 24), **changes))
    dilate(dilated, 8)
    with torch.no_grad():
        a, b = plain.features(image(size)), dilated.features(image(size))
    for level, step in (("C3", 1), ("C4", 2), ("C5", 4)):
        torch.testing.assert_close(b[level][:, :, ::step, ::step], a[level], rtol=0, atol=1e-9)


def test_dilation_of_a_cifar_net_and_invalid_strides() -> None:
    net = build("resnet20", seed=0)
    dilate(net, 2)
    assert [level.stride for level in levels(net).values()] == [1, 1, 2, 2]
    assert net(image(32).float()).shape == (2, 10)
    with pytest.raises(UsageError, match="dilated already"):
        dilate(net, 1)
    with pytest.raises(UsageError, match=r"output_stride must be one of 4, 8, 16, 32, not 12\."):
        dilate(build("resnet18"), 12)


def test_levels_describe_the_maps_of_features() -> None:
    for name in ("resnet18", "resnet50", "preresnet20", "resnet20"):
        net = build(name, seed=0)
        x = torch.zeros(1, 3, 128, 128)
        for level, (key, value) in zip(levels(net).values(), net.features(x).items(), strict=True):
            assert level.name == key and value.shape == (1, level.channels, 128 // level.stride, 128 // level.stride)
    assert list(net.features(x, "C2")) == ["C1", "C2"]


def test_fixed_bn_computes_the_same_and_does_not_train() -> None:
    net, fixed = prepare(build("resnet18", seed=0)), prepare(build("resnet18", seed=0))
    fix_bn(fixed)
    fixed.train()
    with torch.no_grad():
        torch.testing.assert_close(fixed.forward_features(image()), net.forward_features(image()), rtol=0, atol=1e-10)
    before = {k: v.clone() for k, v in fixed.state_dict().items()}
    assert before.keys() == net.state_dict().keys()
    fixed.forward_features(image()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in fixed.state_dict().items())
    trainable = {k for k, p in fixed.named_parameters() if p.requires_grad}
    assert trainable == {k for k in dict(net.named_parameters()) if "bn" not in k and "downsample.1" not in k}


def test_frozen_stages_do_not_train_and_others_do() -> None:
    net = build("resnet18", seed=0)
    freeze(net, "C2")
    names = {k.split(".")[0] for k, p in net.named_parameters() if p.requires_grad}
    assert names == {"layer2", "layer3", "layer4", "fc"}
    assert isinstance(net.bn1, FixedBatchNorm) and type(net.layer2[0].bn1) is nn.BatchNorm2d
    with pytest.raises(UsageError, match="did you mean 'C5'"):
        freeze(net, "C55")


def test_maps_are_named_by_their_modules_too() -> None:
    net, same = build("resnet20", seed=0), build("resnet20", seed=0)
    freeze(net, "layer1")
    freeze(same, "C2")
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in same.parameters()]
    assert list(Backbone(net, {"layer3": "b", "C2": "a"}).names.items()) == [("C4", "b"), ("C2", "a")]
    assert Features(net, ("layer1", "C3")).feature_info.module_name() == ["layer1", "layer2"]
    with pytest.raises(UsageError, match=r"a map is one of 'C1' \(bn1\), 'C2' \(layer1\).*, not 2\."):
        freeze(net, 2)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"unknown map 'conv1'; .*layer1, layer2"):
        freeze(net, "conv1")


def test_lists_are_timms() -> None:
    theirs = timm.create_model("resnet18", pretrained=False, features_only=True)
    ours = Features(build("resnet18", seed=0))
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    x = torch.zeros(1, 3, 96, 96)
    assert [m.shape for m in ours(x)] == [m.shape for m in theirs(x)]
    assert [entry["num_chs"] for entry in ours.feature_info] == [64, 64, 128, 256, 512]


def test_an_encoder_gives_the_image_and_every_map() -> None:
    encoder = Encoder(build("resnet18", seed=0))
    assert encoder.out_channels == [3, 64, 64, 128, 256, 512] and encoder.output_stride == 32
    x = torch.zeros(1, 3, 96, 96)
    assert [m.shape[1] for m in encoder(x)] == encoder.out_channels


def test_an_encoder_has_the_interface_of_segmentation_models_pytorch() -> None:
    encoder = Encoder(net=build("resnet18", seed=0), depth=4, output_stride=8)
    encoder.set_in_channels(3, pretrained=False)
    encoder.make_dilated(8)
    assert encoder.out_channels == [3, 64, 64, 128, 256] and encoder.output_stride == 8
    assert [m.shape[2] for m in encoder(torch.zeros(1, 3, 96, 96))] == [96, 48, 24, 12, 12]
    with pytest.raises(UsageError, match="of 3 channels, not 1"):
        encoder.set_in_channels(1)


@pytest.mark.parametrize("name", ["Unet", "FPN", "PSPNet"])
def test_segmentation_models_pytorch_decodes_our_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoders compute the same on our network as on its own encoder with the same weights."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    theirs = getattr(smp, name)("resnet18", encoder_weights=None, classes=3).eval()
    net = build("resnet18", seed=0, classes=1)
    ours = {k.removeprefix("encoder."): v for k, v in theirs.state_dict().items() if k.startswith("encoder.")}
    assert net.load_state_dict(ours, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    monkeypatch.setitem(smp.encoders.encoders, "ours", {"encoder": Encoder, "params": {"net": net}})
    model = getattr(smp, name)("ours", encoder_weights=None, classes=3).eval()
    heads = {k: v for k, v in theirs.state_dict().items() if not k.startswith("encoder.")}
    model.load_state_dict(heads, strict=False)
    x = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
