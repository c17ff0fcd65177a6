"""Measurements inside networks, compared with hand computations and the 2016 paper's identity."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnetlab.models.probes import measure_identity_flow, measure_responses, measure_signals, trace_units
from resnetlab.models.resnet import build

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 5


def test_responses_are_deviations_after_bn_and_before_relu() -> None:
    net = build("resnet8", classes=5, seed=0).eval()
    found = measure_responses(net, X)
    assert list(found) == ["bn1", *(f"layer{i}.0.bn{j}" for i in (1, 2, 3) for j in (1, 2))]
    with torch.no_grad():
        first = net.bn1(net.conv1(X))
        block = net.layer1[0]
        second = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(F.relu(first))))))
    assert found["bn1"] == pytest.approx(float(first.std()), rel=1e-5)
    assert found["layer1.0.bn2"] == pytest.approx(float(second.std()), rel=1e-5)
    assert not any(module._forward_hooks for module in net.modules())


def test_projections_are_excluded() -> None:
    assert len(measure_responses(build("resnet8", shortcut="B", seed=0), X)) == 7


def test_signals_in_training_have_the_variance_that_bn_gives() -> None:
    net = build("plain20", classes=5, seed=0)
    before = net.bn1.running_mean.clone()
    found = measure_signals(net, X, LABELS)
    assert len(found) == 19
    assert all(signal.variance == pytest.approx(1, abs=0.02) for signal in found)  # weight 1, bias 0
    assert all(signal.gradient > 0 for signal in found)
    assert torch.equal(net.bn1.running_mean, before) and net.conv1.weight.grad is None


def test_the_last_gradient_equals_backpropagation_by_hand() -> None:
    net = build("plain8", classes=5, seed=0).train()
    last = {s.layer: s for s in measure_signals(net, X, LABELS)}["layer3.0.bn2"]
    with torch.no_grad():
        x = F.relu(net.bn1(net.conv1(X)))
        x = net.layer3[0].bn1(net.layer3[0].conv1(net.layer2(net.layer1(x))))
        y = net.layer3[0].bn2(net.layer3[0].conv2(F.relu(x)))
        score = net.fc(F.relu(y).mean((2, 3))).softmax(1) - F.one_hot(LABELS, 5)
        gradient = (score @ net.fc.weight / 16)[:, :, None, None] * (y > 0)
    assert last.gradient == pytest.approx(float(gradient.flatten(1).norm(dim=1).mean()), rel=1e-3)


def test_units_add_up_exactly_with_full_pre_activation() -> None:
    net = build("preresnet20", classes=5, seed=0).eval()
    units, logits = trace_units(net, X)
    assert torch.equal(logits, net(X))
    for unit in units:
        if unit.x.shape == unit.y.shape:
            assert torch.equal(unit.y, unit.x + unit.residual), unit.block
    assert [unit.block for unit in units] == [name for name, _ in net.blocks()]


def test_the_2016_identity_holds_only_for_full_pre_activation() -> None:
    exact = measure_identity_flow(build("preresnet20", classes=5, seed=0), X, LABELS)
    assert [i.block for i in exact[:5]] == ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2"]
    assert max(i.deviation for i in exact) < 1e-14  # rounding of float64
    others = measure_identity_flow(build("resnet20", classes=5, seed=0), X, LABELS)
    assert max(i.deviation for i in others) > 0.01  # because of the ReLU after the addition


def test_the_gradient_is_the_identity_and_an_additive_term() -> None:
    for found in measure_identity_flow(build("preresnet20", classes=5, seed=0), X, LABELS):
        # |g_l|² = |g_L|² + |term|² + 2 g_L·term and g_l·g_L = cosine |g_l| |g_L|: the three figures are not independent
        assert found.additive**2 == pytest.approx(
            1 + found.gradient_ratio**2 - 2 * found.cosine * found.gradient_ratio, rel=1e-9
        )
    zeroed = build("preresnet20", classes=5, seed=0)
    for _, block in zeroed.blocks():
        torch.nn.init.zeros_(block.conv2.weight)
    for found in measure_identity_flow(zeroed, X, LABELS):  # without F the gradient is passed on unchanged
        assert (found.gradient_ratio, found.additive) == (pytest.approx(1), pytest.approx(0))


def test_what_shortcuts_alone_pass_of_the_gradient_is_the_product_of_their_scales() -> None:
    """2016 eq. 8, measured with nothing going back through F; a ReLU after the addition keeps a part back."""
    scaled = build("preresnet20", classes=5, seed=0, shortcut="constant", shortcut_scale=0.5, residual_scale=1.0)
    found = measure_identity_flow(scaled, X, LABELS)
    assert [unit.passed for unit in found] == pytest.approx([0.125, 0.25, 0.5, 0.25, 0.5, 0.25, 0.5], rel=1e-12)
    assert [unit.product for unit in found] == pytest.approx([unit.passed for unit in found])
    identity = measure_identity_flow(build("preresnet20", classes=5, seed=0), X, LABELS)
    assert [unit.passed for unit in identity] == pytest.approx([1.0] * 7, rel=1e-12)
    dropout = build("preresnet20", classes=5, seed=0, shortcut="dropout")  # in eval mode an identity
    assert measure_identity_flow(dropout, X, LABELS)[0].passed == pytest.approx(1)
    assert 0.1 < measure_identity_flow(build("resnet20", classes=5, seed=0), X, LABELS)[0].passed < 1
