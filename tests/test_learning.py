"""Training features beyond the papers, each checked against a computation by hand or torch's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import resnetlab
from resnetlab.distributed import World
from resnetlab.errors import UsageError
from resnetlab.models.annotated_model import build_annotated_net
from resnetlab.models.head_spec import DetectorSpec, HeadSpec, SegmenterSpec
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build, build_from_spec
from resnetlab.models.spec import get_specification
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.average import WeightAverage
from resnetlab.training.checkpoint import RunState
from resnetlab.training.micro_batches import TreeMean
from resnetlab.training.optim import SGD
from resnetlab.training.recipes import modern, paper_imagenet, quick
from resnetlab.training.schedule import learning_rate
from resnetlab.training.step import train_step
from resnetlab.training.tasks.starting_network import _copy_weights
from tiny_runs import make_train_state, tiny


def test_a_step_is_the_mean_over_its_micro_batches() -> None:
    """Each micro-batch has its own BN statistics; gradients and moving averages are their mean."""
    whole = make_train_state(tiny(bn_batch=8))
    hand = build("resnet8", channels=1, classes=10)
    hand.load_state_dict(whole.task.net.state_dict())
    parts = whole.task.micro_batches(0)
    assert [len(part.labels) for part in parts] == [8, 8, 8, 8]
    before = hand.bn1.running_mean.clone()
    moved = []
    for part in parts:
        hand.bn1.running_mean.copy_(before)
        (F.cross_entropy(hand(part.images), part.labels) / 4).backward()
        moved.append(hand.bn1.running_mean.clone())
    norm = torch.cat([p.grad.flatten() for p in hand.parameters() if p.grad is not None]).norm()
    made = train_step(whole, parts, 0.1)
    torch.testing.assert_close(made.grad_norm, norm)
    torch.testing.assert_close(whole.task.net.bn1.running_mean, torch.stack(moved).mean(0))
    assert int(whole.task.net.bn1.num_batches_tracked) == 1
    for ours, theirs in zip(whole.task.net.parameters(), hand.parameters(), strict=True):
        assert theirs.grad is not None
        expected = theirs.detach() - 0.1 * (theirs.grad + whole.recipe.weight_decay * theirs.detach())
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-6)


def test_the_mean_over_micro_batches_is_a_balanced_tree() -> None:
    values = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    mean = TreeMean(World())
    for value in values:
        mean.add([value.clone()])
    a, b, c, d, e, f, g, h = values
    assert torch.equal(mean.result()[0], (((a + b) + (c + d)) + ((e + f) + (g + h))) / 8)


def test_clipping_equals_torch() -> None:
    ours, theirs = build("resnet8", seed=0), build("resnet8", seed=0)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for net in (ours, theirs):
        F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
    norm = SGD(ours, quick()).clip_grad_norm(0.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_backbone_has_a_smaller_learning_rate() -> None:
    net = build("resnet8", seed=0)
    before = {k: v.clone() for k, v in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    SGD(net, replace(quick(), weight_decay=0.0, backbone_lr_scale=0.1)).step(0.5)
    for name, p in net.named_parameters():
        torch.testing.assert_close(
            before[name] - p, torch.full_like(p, 0.5 if name.startswith("fc.") else 0.05), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("form", ["fpn", "c4", "deeplab"])
def test_the_backbone_of_a_detector_or_a_segmenter_is_that_of_its_classifier(form: str) -> None:
    values: dict[str, Any] = {"image_size": 64, "longest": 64, "mean": (0.0,) * 3, "std": (1.0,) * 3, "bn": "live"}
    if form == "deeplab":
        spec: HeadSpec = SegmenterSpec(head=form, output_stride=32, frozen="", **values)
    else:
        spec = DetectorSpec(form=form, anchors=(8,) * 5, context=False, frozen="", **values)
    classifier = build("resnet18", widths=(8, 8, 8, 8))
    backbone = {id(p) for name, p in classifier.named_parameters() if not name.startswith("fc.")}
    net = build_annotated_net(classifier, spec, 3)
    for p in net.parameters():
        p.data, p.grad = torch.zeros_like(p), torch.ones_like(p)
    SGD(net, replace(quick(), weight_decay=0.0, backbone_lr_scale=0.5)).step(1.0)
    assert all(bool((p == (-0.5 if id(p) in backbone else -1.0)).all()) for p in net.parameters())


def test_the_average_is_a_moving_one_and_gives_the_weights_back() -> None:
    net = build("resnet8", seed=0)
    average = WeightAverage(net, 0.75)
    expected = net.fc.weight.detach().clone()
    for step in range(1, 60):
        net.fc.weight.data.add_(1.0)
        average.update(step)
        decay = min(0.75, step / (step + 9))
        expected = decay * expected + (1 - decay) * net.fc.weight.detach()
    torch.testing.assert_close(average.tensors["fc.weight"], expected)
    last = net.fc.weight.detach().clone()
    with average.swap_in():
        assert torch.equal(net.fc.weight, average.tensors["fc.weight"])
    assert torch.equal(net.fc.weight, last)
    assert modern().rescale(1251).ema_decay == pytest.approx(0.98, abs=1e-3)  # the window shrinks with the run


def test_cosine_linear_and_plateau_rates() -> None:
    recipe = replace(quick(), schedule="cosine", warmup="linear", warmup_steps=100, warmup_lr=0.01, lr=0.5, steps=1100)
    rates = [learning_rate(recipe, step, None) for step in (0, 50, 100, 600, 1099)]
    assert rates == pytest.approx([0.01, 0.255, 0.5, 0.25, 0.5 * 2.467e-6], rel=1e-3)
    assert [learning_rate(paper_imagenet(), 123, None, drops) for drops in (0, 1, 2)] == pytest.approx(
        [0.1, 0.01, 0.001]
    )
    by_epochs = replace(paper_imagenet(), schedule="milestones")
    assert [learning_rate(by_epochs, step, None) for step in (150_136, 150_137, 300_274)] == pytest.approx(
        [0.1, 0.01, 0.001]
    )


def test_a_plateau_is_patience_evaluations_without_a_new_lowest_error() -> None:
    state = RunState()
    drops = []
    for error in (0.5, 0.4, 0.4, 0.41, 0.39, 0.4, 0.4, 0.4, 0.4):
        state.update_plateau(error, patience=2)
        drops.append(state.lr_drops)
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_reestimated_bn_statistics_are_the_mean_over_training_batches(tmp_path: Path) -> None:
    from resnetlab.training.average import reestimate_bn_statistics

    made = make_train_state(tiny(bn_batch=16, precise_bn=3))
    net, recipe = made.task.net, made.recipe
    reestimate_bn_statistics(made.task, recipe.precise_bn)
    with torch.no_grad():
        maps = [
            net.conv1(part.images)
            for step in range(recipe.steps, recipe.steps + 3)
            for part in made.task.micro_batches(step)
        ]
    torch.testing.assert_close(
        net.bn1.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-6, rtol=1e-4
    )
    variances = torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps])
    torch.testing.assert_close(net.bn1.running_var, variances.mean(0), atol=1e-6, rtol=1e-4)
    assert net.bn1.momentum == 0.1


def test_fine_tuning_takes_over_what_fits(tmp_path: Path) -> None:
    first = resnetlab.train(tiny(steps=2, milestones=()), out=tmp_path / "first", device="cpu")
    theirs = resnetlab.load(first.model)
    messages: list[str] = []
    again = tiny(
        start_from=first.model, net="", steps=1, milestones=(), lr=1e-30, normalise="as start_from", frozen_bn=True
    )
    result = resnetlab.train(again, out=tmp_path / "again", device="cpu", report=messages.append)
    assert any("with its head: it has the same 10 classes" in sentence for sentence in messages)
    ours = resnetlab.load(result.model)
    assert torch.equal(ours.preprocessing.mean, theirs.preprocessing.mean)
    for (name, a), b in zip(ours.net.state_dict().items(), theirs.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # BN's statistics too: they are frozen
    assert ours.recipe["net"] == "resnet8" and ours.recipe["specification"] == {}
    with pytest.raises(UsageError, match="holds resnet8, not the resnet14 that is asked for; leave out net"):
        resnetlab.train(replace(again, net="resnet14"), out=tmp_path / "other", device="cpu")
    with pytest.raises(UsageError, match="the recipe has no network of its own"):
        resnetlab.train("finetune", data="digits", out=tmp_path / "none", device="cpu")


def test_a_new_head_for_other_classes_and_the_old_one_in_another_order() -> None:
    old = build("resnet8", classes=3, seed=1)
    bundle = TrainedModel(old, ("cat", "dog", "fox"), Preprocessing(3, (8, 8), 8, torch.zeros(3), torch.ones(3)))
    net = build("resnet8", classes=3, seed=2)
    assert "with its head" in _copy_weights(net, bundle, ("fox", "cat", "dog"), "m")
    assert torch.equal(net.fc.weight, old.fc.weight[[2, 0, 1]]) and torch.equal(net.conv1.weight, old.conv1.weight)
    wider = build("resnet8", classes=4, seed=2)
    head = wider.fc.weight.clone()
    assert "with a new head: it has 3 classes (cat, dog, fox), the data 4" in _copy_weights(
        wider, bundle, tuple("abcd"), "m"
    )
    assert torch.equal(wider.fc.weight, head) and torch.equal(wider.conv1.weight, old.conv1.weight)


def test_recomputed_maps_change_no_bit_and_count_no_image_twice() -> None:
    """The second forward pass of a group of blocks must leave BN's moving averages as the first one left them."""
    plain, spare = (build("resnet20", seed=0).train() for _ in range(2))
    spare.recompute = True
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for net in (plain, spare):
        for _ in range(2):
            net(x).square().sum().backward()
    for (name, a), b in zip(plain.state_dict().items(), spare.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for (name, p), q in zip(plain.named_parameters(), spare.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name
    assert int(spare.state_dict()["bn1.num_batches_tracked"]) == 2


def test_stochastic_depth_leaves_out_f_and_keeps_the_mean() -> None:
    net = build("resnet8", seed=0)
    (_, block), *_ = net.blocks()
    x = torch.rand(4000, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    block.eval()
    shortcut, whole = x.relu(), block(x)
    block.drop_path = 0.25
    assert torch.equal(block(x), whole)  # nothing is left out when it only answers
    for module in block.modules():
        module.training = module is block  # drops, with BN as in eval mode
    torch.manual_seed(0)
    y = block(x)
    left_out = (y == shortcut).all((1, 2, 3)).float().mean()
    assert 0.22 < left_out < 0.28


def test_a_zero_last_bn_makes_every_block_its_shortcut() -> None:
    net = build_from_spec(get_specification("resnet20"), seed=0, zero_last_bn=True).eval()
    x = torch.rand(2, 16, 8, 8)
    for name, block in list(net.blocks())[:3]:
        assert torch.equal(block(x), x), name
    with pytest.raises(UsageError, match="needs an F that ends in BN, but activation order 'preact' does not"):
        build_from_spec(get_specification("preresnet20"), zero_last_bn=True)
