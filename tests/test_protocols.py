"""Test protocols: the pixels that are show_views, and how answers become one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.transforms import v2

from resnetlab.device import select_device
from resnetlab.errors import UsageError
from resnetlab.evaluation.protocols import EXAMPLES, Protocol, generate_views, parse_protocol
from resnetlab.evaluation.scores import Member, score_images
from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import get_specification
from resnetlab.preprocessing import Preprocessing, pil_to_tensor, tensor_to_pil

EXACT = select_device("fp32", "cpu")
ZERO, ONE = torch.zeros(3), torch.ones(3)


def photograph(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 (H, W, C): smooth enough for resizing to matter, and nowhere symmetric."""
    noise = torch.randint(0, 256, (9, 11, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return pil_to_tensor(tensor_to_pil(noise).resize((width, height)))


def random_network(spec: Any, seed: int = 0) -> ResNet:
    """A network with random weights and BN statistics."""
    net = build_from_spec(spec, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in (
                (module.weight, 0.5),
                (module.bias, -0.3),
                (module.running_mean, -0.3),
                (module.running_var, 0.5),
            ):
                cast(Tensor, value).data.copy_(torch.rand(cast(Tensor, value).shape, generator=draw) + low)
    net.fc.weight.data.mul_(3)
    return net.eval()


def show_views(images: list[Tensor], protocol: str, preprocessing: Preprocessing) -> Iterator[tuple[int, Tensor]]:
    """(position, pixels as the network sees them) of every view, in order."""
    for where, pixels, mirrored in generate_views(images, parse_protocol(protocol), preprocessing):
        yield from zip(where.tolist(), pixels.flip(2) if mirrored else pixels, strict=True)


@given(st.integers(40, 90), st.integers(40, 90), st.sampled_from(["bilinear", "bicubic"]), st.sampled_from([37, 40]))
@settings(max_examples=25, deadline=None)
def test_ten_crops_are_torchvisions(height: int, width: int, interpolation: str, resize: int) -> None:
    """Of the whole resized image, whatever its shape; and the one crop is Resize and CenterCrop."""
    image = photograph(height, width)
    preprocessing = Preprocessing(3, (32, 32), resize, ZERO, ONE, interpolation)
    theirs = v2.Resize(resize, v2.InterpolationMode(interpolation), antialias=True)(tensor_to_pil(image))
    expected = [v2.functional.pil_to_tensor(crop).permute(1, 2, 0) for crop in v2.TenCrop(32)(theirs)]
    found = [pixels for _, pixels in show_views([image], "10crop", preprocessing)]
    assert len(found) == 10 and all(map(torch.equal, found, expected))
    assert torch.equal(preprocessing(tensor_to_pil(image)), expected[4])


def test_corners_are_of_the_whole_image() -> None:
    """Not of its centre: the left and right edges of a wide image are visible."""
    image = torch.zeros(32, 100, 3, dtype=torch.uint8)
    image[:, 0], image[:, -1] = 1, 2
    found = {
        int(pixels.max()) for _, pixels in show_views([image], "10crop", Preprocessing(3, (32, 32), 32, ZERO, ONE))
    }
    assert found == {0, 1, 2}


@pytest.mark.parametrize("protocol", ["1crop", "flip", "10crop", "dense:40+flip", "multiscale:36,48"])
def test_views_are_a_function_of_each_image_alone(protocol: str) -> None:
    """A batch of images of different sizes has the same views as each of them alone."""
    images = [photograph(*size, seed=i) for i, size in enumerate([(40, 60), (60, 40), (40, 60), (33, 33)])]
    preprocessing = Preprocessing(3, (32, 32), 36, ZERO, ONE)
    together: dict[int, list[Tensor]] = {}
    for i, pixels in show_views(images, protocol, preprocessing):
        together.setdefault(i, []).append(pixels)
    for i, image in enumerate(images):
        alone = [pixels for _, pixels in show_views([image], protocol, preprocessing)]
        assert len(alone) == len(together[i]) and all(map(torch.equal, alone, together[i]))


@pytest.mark.parametrize(("text", "shapes"), [
    ("multiscale:36,48+noflip", [(36, 54), (48, 72)]), ("dense:48", [(48, 48)]), ("1crop:48", [(32, 32)])])  # fmt: skip
def test_sizes(text: str, shapes: list[tuple[int, int]]) -> None:
    preprocessing = Preprocessing(3, (32, 32), 36, ZERO, ONE)
    assert [tuple(p.shape[:2]) for _, p in show_views([photograph(40, 60)], text, preprocessing)] == shapes


def by_hand(net: ResNet, preprocessing: Preprocessing, crops: list[Tensor], temperature: float = 1.0) -> Tensor:
    """Logits, (views, classes), of crops uint8 (h, w, C)."""
    x = torch.stack(crops).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return (
            cast(Tensor, net((x - preprocessing.mean[:, None, None]) / preprocessing.std[:, None, None])) / temperature
        )


def test_the_mean_of_softmax_scores_is_a_hand_computation() -> None:
    net = random_network(get_specification("resnet8", classes=7))
    preprocessing = Preprocessing(3, (32, 32), 36, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25]))
    member = Member.from_network(net, preprocessing, EXACT, temperature=1.7)
    images = [photograph(40, 60), photograph(50, 45, seed=1)]
    for i, image in enumerate(images):
        theirs = v2.Resize(36)(tensor_to_pil(image))
        crops = [v2.functional.pil_to_tensor(crop).permute(1, 2, 0) for crop in v2.TenCrop(32)(theirs)]
        logits = by_hand(net, preprocessing, crops, 1.7)
        scores, means = logits.softmax(1).mean(0), logits.mean(0).softmax(0)
        assert (scores - means).abs().max() > 1e-3  # the two rules differ, so a mistake would show
        found = score_images(member, images, parse_protocol("10crop"), EXACT)[i].float()
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)
        found = score_images(member, images, parse_protocol("10crop+logits"), EXACT)[i].float()
        torch.testing.assert_close(found, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ["", "+window", "+logits", "+window+logits"])
@pytest.mark.parametrize("name", ["resnet8", "preresnet8"])
def test_dense_evaluation_at_exactly_s_is_the_one_crop(name: str, options: str) -> None:
    net = random_network(get_specification(name, classes=6))
    preprocessing = Preprocessing(3, (32, 32), 32, torch.rand(32, 32, 3), ONE)
    member = Member.from_network(net, preprocessing, EXACT)
    images = [photograph(32, 32, seed=i) for i in range(3)]
    one = score_images(member, images, parse_protocol("1crop"), EXACT)
    for text in (f"dense:32{options}", f"multiscale:32+noflip{options}"):
        torch.testing.assert_close(score_images(member, images, parse_protocol(text), EXACT), one, rtol=1e-5, atol=1e-6)
    mirrored = score_images(member, images, parse_protocol("flip"), EXACT)
    torch.testing.assert_close(
        score_images(member, images, parse_protocol("dense:32+flip"), EXACT), mirrored, rtol=1e-5, atol=1e-6
    )
    assert (mirrored - one).abs().max() > 1e-3


def test_a_score_map_is_the_network_at_every_position() -> None:
    """Fully convolutional, with the whole-window average: where padding does not reach, a position is a crop's own answer."""
    net = random_network(get_specification("resnet8", classes=5))
    x = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        last = net.forward_features(x)
        maps = net.forward_class_maps(x, (8, 8))
        assert maps.shape == (2, 5, 12 - 7, 10 - 7)
        for i, j in ((0, 0), (4, 2)):
            expected = net.fc(last[:, :, i : i + 8, j : j + 8].mean((2, 3)))
            torch.testing.assert_close(maps[:, :, i, j], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.forward_class_maps(x).mean((2, 3)), net(x), rtol=1e-4, atol=1e-5)


def test_multiscale_is_the_mean_over_scales_and_flips() -> None:
    net = random_network(get_specification("resnet8", classes=5))
    preprocessing = Preprocessing(3, (32, 32), 32, torch.full((3,), 0.5), torch.full((3,), 0.25))
    image = photograph(40, 60)
    expected = torch.zeros(5)
    for side in (36, 48):
        whole = v2.functional.pil_to_tensor(v2.Resize(side)(tensor_to_pil(image))).permute(1, 2, 0)
        expected += by_hand(net, preprocessing, [whole, whole.flip(1)]).softmax(1).sum(0) / 4
    found = score_images(
        Member.from_network(net, preprocessing, EXACT), [image], parse_protocol("multiscale:36,48"), EXACT
    )
    torch.testing.assert_close(found[0].float(), expected, rtol=1e-4, atol=1e-5)


def test_a_flip_mirrors_a_per_pixel_mean_too() -> None:
    """As in training, where the mean is subtracted before images are mirrored."""
    net = random_network(get_specification("resnet8", classes=5))
    mean = torch.rand(32, 32, 3)
    image = photograph(32, 32)
    x = (image.float() / 255 - mean).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = (net(x).softmax(1) + net(x.flip(3)).softmax(1)) / 2
    found = score_images(
        Member.from_network(net, Preprocessing(3, (32, 32), 32, mean, ONE), EXACT),
        [image],
        parse_protocol("flip"),
        EXACT,
    )
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [
    "resnet8", "plain8", "preresnet8", "resnet11v1.5", "preresnet50", "bn-after-add", "relu-before-add", "relu-only-preact",
    "C"])  # fmt: skip
def test_a_member_is_its_network(name: str) -> None:
    """Folding changes only the speed, in every order; the network itself is unchanged."""
    orders = ("bn-after-add", "relu-before-add", "relu-only-preact")
    if name in orders:
        spec = get_specification("resnet8", activation_order=name)
    elif name == "resnet11v1.5":
        spec = get_specification("resnet164", depths=(1, 1, 1), stride_in="3x3")
    else:
        spec = get_specification("resnet8", shortcut="C") if name == "C" else get_specification(name, classes=10)
    net = random_network(spec)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    member = Member.from_network(net, Preprocessing(3, (32, 32), 32, ZERO, ONE), EXACT)
    x = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = net.double()(x.double()).float()
        torch.testing.assert_close(member.net(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    left = [m for m in member.net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) < len([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]) / 1.5
    net.float()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("text", [*EXAMPLES, "10crop:256+logits", "multiscale:224,256+noflip+window", "dense:320+flip"])
def test_a_protocol_is_a_value(text: str) -> None:
    assert parse_protocol(str(parse_protocol(text))) == parse_protocol(text)


def test_the_papers_protocols() -> None:
    assert parse_protocol("multiscale:224,256,384,480,640") == Protocol(
        kind="multiscale", sides=(224, 256, 384, 480, 640), flip=True, average="scores", positions="map"
    )
    assert parse_protocol("10crop") == Protocol(kind="10crop", flip=True) and parse_protocol("flip") == parse_protocol(
        "1crop+flip"
    )


@pytest.mark.parametrize(("text", "sentence"), [
    ("12crop", "unknown protocol '12crop'; did you mean '1crop'?"),
    ("10crop+logit", "unknown option of a protocol 'logit'; did you mean 'logits'?"),
    ("dense", "needs shorter sides in pixels, such as dense:320"),
    ("dense:320,640", "only multiscale takes several sizes"),
    ("multiscale:224,x", "sizes are whole numbers of pixels"),
    ("multiscale:224,224", "sizes must be different numbers from 1 up"),
    ("dense:99999999", "sizes go up to 16,384 pixels"),
    ("1crop+window", "window is for dense and multiscale only"),
    ("10crop+noflip", "cannot be both mirrored and not"),
])  # fmt: skip
def test_invalid_protocols_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_protocol(text)
    assert sentence in str(error.value)


@pytest.mark.parametrize("text", ["10crop:28", "dense:31", "multiscale:16,48"])
def test_a_crop_larger_than_the_image_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the model sees 32 pixels on a side, but an image with its shorter side at"):
        list(generate_views([photograph(64, 64)], parse_protocol(text), Preprocessing(3, (32, 32), 36, ZERO, ONE)))
