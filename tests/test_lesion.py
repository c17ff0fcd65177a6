"""Networks with removed or swapped blocks, compared with the same network assembled by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.errors import UsageError
from resnetlab.models.fold import fold_batchnorm
from resnetlab.models.lesion import movable_blocks, removable_blocks, remove_blocks, swap_blocks
from resnetlab.models.resnet import ResNet, build


def randomised(name: str, **changes: object) -> tuple[ResNet, Tensor]:
    """A network in eval mode with random BN statistics, and images."""
    net = build(name, classes=5, seed=0, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.dtype == torch.float32:
                buffer += 0.3 * torch.rand(buffer.shape, generator=generator)
    return net.eval(), torch.randn(3, 3, 16, 16, generator=generator)


def forward(net: ResNet, x: Tensor, order: list[str]) -> Tensor:
    """Runs the listed blocks of a network one after the other."""
    named = dict(net.blocks())
    x = F.relu(net.bn1(net.conv1(x)))
    for name in order:
        x = named[name](x)
    if net.bn_last is not None:
        x = F.relu(net.bn_last(x))
    return net.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["plain20", "resnet20", "preresnet20"])
@torch.no_grad()
def test_removing_blocks_that_keep_the_shape(name: str) -> None:
    net, x = randomised(name)
    everything = [block for block, _ in net.blocks()]
    for block in ("layer1.1", "layer3.2"):
        rest = [other for other in everything if other != block]
        torch.testing.assert_close(remove_blocks(net, block)(x), forward(net, x, rest))
    torch.testing.assert_close(
        remove_blocks(net, ["layer1.1", "layer2.1"])(x),
        forward(net, x, [b for b in everything if b not in ("layer1.1", "layer2.1")]),
    )
    assert torch.equal(net(x), forward(net, x, everything))  # the network itself is unchanged


@torch.no_grad()
def test_removing_a_block_that_changes_the_shape_leaves_its_shortcut() -> None:
    net, x = randomised("resnet8")
    named = dict(net.blocks())
    y = named["layer1.0"](F.relu(net.bn1(net.conv1(x))))
    y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, 16))  # option A
    torch.testing.assert_close(remove_blocks(net, "layer2.0")(x), net.fc(named["layer3.0"](y).mean((2, 3))))


@pytest.mark.parametrize(
    "changes", [{"shortcut": "exclusive-gate"}, {"shortcut": "constant"}, {"activation_order": "bn-after-add"}]
)
@torch.no_grad()
def test_removing_blocks_with_every_shortcut_and_order(changes: dict[str, object]) -> None:
    net, x = randomised("resnet8", **changes)
    zeroed, _ = randomised("resnet8", **changes)
    block = dict(zeroed.blocks())["layer3.0"]
    block.conv2.weight.zero_()
    if zeroed.spec.activation_order == "original":  # F is zero only if its last BN outputs zero
        block.bn2.running_mean.zero_()
    torch.testing.assert_close(remove_blocks(net, "layer3.0")(x), zeroed(x))


@torch.no_grad()
def test_swapped_blocks_run_in_the_other_order() -> None:
    net, x = randomised("resnet20")
    order = [name for name, _ in net.blocks()]
    i, j = order.index("layer2.1"), order.index("layer2.2")
    order[i], order[j] = order[j], order[i]
    changed = swap_blocks(net, [("layer2.1", "layer2.2")])
    torch.testing.assert_close(changed(x), forward(net, x, order))
    assert not torch.allclose(changed(x), net(x))


@torch.no_grad()
def test_a_copy_shares_the_weights_and_can_be_folded() -> None:
    net, x = randomised("resnet8")
    changed = remove_blocks(net, "layer1.0")
    assert changed.conv1.weight is net.conv1.weight and changed.bn1.running_mean is net.bn1.running_mean
    torch.testing.assert_close(fold_batchnorm(changed)(x), changed(x), atol=1e-4, rtol=1e-4)


def test_removable_and_movable_blocks() -> None:
    assert removable_blocks(build("plain20")) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3) if i == 1 or j]
    assert len(removable_blocks(build("resnet20"))) == 9
    assert movable_blocks(build("resnet20"))[:2] == [["layer1.0", "layer1.1", "layer1.2"], ["layer2.1", "layer2.2"]]
    assert movable_blocks(build("preresnet20"))[0] == [
        "layer1.1",
        "layer1.2",
    ]  # the first one's activation is the stem's


def test_invalid_removals_and_swaps() -> None:
    with pytest.raises(UsageError, match=r"unknown block 'layer1\.7'; did you mean 'layer1\.0'"):
        remove_blocks(build("resnet8"), "layer1.7")
    with pytest.raises(UsageError, match=r"layer2\.0 changes its input's shape"):
        remove_blocks(build("plain8"), "layer2.0")
    with pytest.raises(UsageError, match="cannot change places"):
        swap_blocks(build("resnet20"), [("layer1.1", "layer2.1")])
