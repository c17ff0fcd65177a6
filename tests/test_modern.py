"""The modern recipe's augmentation: TrivialAugment, random erasing, mixup, cutmix, soft targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnetlab
from images import photo
from operation_counts import ElementCount
from resnetlab.data.augment import Augmentation
from resnetlab.data.dataset import MemorySplit
from resnetlab.data.mixing import Mixing, cutmix_box, find_partners
from resnetlab.data.sampler import RandomStream, Sampler, TrainLoader
from resnetlab.data.trivial_augment import OPERATIONS, STRENGTHS, trivial_augment
from resnetlab.device import select_device
from resnetlab.errors import UsageError
from resnetlab.preprocessing import Preprocessing, tensor_to_pil
from resnetlab.random import StepDraws, make_generator

ENGINE = select_device("fp32", "cpu")
PLAIN = Preprocessing(3, (32, 24), 32, torch.full((3,), 0.5), torch.full((3,), 0.25))
TORCHVISION = {  # its names of the operations
    "identity": "Identity", "shear x": "ShearX", "shear y": "ShearY", "translate x": "TranslateX", "translate y": "TranslateY",
    "rotate": "Rotate", "brightness": "Brightness", "saturation": "Color", "contrast": "Contrast", "sharpness": "Sharpness",
    "posterize": "Posterize", "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_trivial_augment_is_torchvisions(name: str, mode: str) -> None:
    from torchvision.transforms import v2

    theirs = v2.TrivialAugmentWide()
    magnitudes, signed = theirs._AUGMENTATION_SPACE[TORCHVISION[name]]
    pixels = torch.from_numpy(np.array(photo(1, 47, 41).convert(mode))).view(41, 47, -1)
    which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    values = magnitudes(STRENGTHS, 41, 47)
    assert OPERATIONS[name][2] == signed and list(TORCHVISION) == list(OPERATIONS)
    middle = 15 if name == "solarize" else 16  # theirs are rounded to float32: the others sit on the edge of a level
    for strength in (0, 1, 7, middle, 29, 30):
        for sign in (-1, 1) if signed else (1,):
            value = sign * float(values[strength]) if values is not None else 0.0
            expected = theirs._apply_image_or_video_transform(
                tensor_to_pil(pixels), TORCHVISION[name], value, interpolation=v2.InterpolationMode.NEAREST, fill={}
            )
            shown = trivial_augment(pixels, (which, (strength + 0.5) / STRENGTHS, 0.25 if sign < 0 else 0.75))
            apart = np.abs(shown.squeeze(-1).numpy().astype(int) - np.asarray(expected).astype(int))
            assert apart.max() <= int(name == "brightness"), (strength, sign)  # its strengths are rounded to float32


def modern(n: int = 40, share: int = 16, **values: object) -> TrainLoader:
    images = torch.stack([torch.from_numpy(np.array(photo(i, 24, 32))) for i in range(n)])
    augmentation = Augmentation(**values)  # type: ignore[arg-type]
    labels = torch.arange(n) % 5
    return TrainLoader(MemorySplit(images, labels), PLAIN, augmentation, share, 3, ENGINE)


def test_trivial_augment_is_drawn_by_step_and_position_alone() -> None:
    plain, changed = modern(), modern(trivial_augment=True)
    before = torch.get_rng_state()
    batch = changed.batch(5)
    assert torch.equal(torch.get_rng_state(), before)  # the process's own generator is left alone
    assert torch.equal(batch.images, modern(trivial_augment=True).batch(5).images)
    assert torch.equal(batch.labels, plain.batch(5).labels)
    same = [torch.equal(a, b) for a, b in zip(batch.images, plain.batch(5).images, strict=True)]
    assert 0 <= sum(same) < 8  # identity, or a strength of 0
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_erasing() -> None:
    pixels = torch.randint(256, (2000, 32, 24, 3), dtype=torch.uint8)
    pixels[pixels == 127] = 90
    draws = StepDraws(0, 1, 2000)
    plain = Augmentation()(pixels, PLAIN, draws)
    erased = Augmentation(erasing=0.25)(pixels, PLAIN, draws)
    assert torch.equal(erased, Augmentation(erasing=0.25)(pixels, PLAIN, draws))
    areas = []
    for a, b in zip(erased, plain, strict=True):
        gone = (a != b).any(0)
        assert torch.equal(a[:, ~gone], b[:, ~gone]) and not a[:, gone].any()  # zero is the mean
        if gone.any():
            rows, columns = gone.any(1).nonzero().flatten(), gone.any(0).nonzero().flatten()
            assert bool(gone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())  # a rectangle
            areas.append(float(gone.float().mean()))
    assert 0.2 < len(areas) / 2000 < 0.3
    assert 0.01 < min(areas) < 0.04 and 0.3 < max(areas) < 0.36 and 0.15 < float(np.mean(areas)) < 0.19
    some = torch.tensor([3, 10, 11, 1990])
    part = Augmentation(erasing=0.25)(pixels[some], PLAIN, draws._replace(positions=some))
    assert torch.equal(part, erased[some])
    with pytest.raises(UsageError, match="erasing must be a share"):
        Augmentation(erasing=1.5)


def test_augmentation_costs_a_process_its_share() -> None:
    """Of a step of 16,384 images, every number drawn and everything computed from them."""
    augmentation = Augmentation(2, colour=True, flip=True, erasing=0.1, flip_vertical=True, rotate=5)
    pixels = torch.zeros(256, 4, 4, 3, dtype=torch.uint8)
    plain = Preprocessing(3, (4, 4), 4, torch.full((3,), 0.5), torch.full((3,), 0.25))

    def count(size: int, version: int) -> int:
        own = range(size - 256, size)
        with ElementCount() as counted:
            augmentation(pixels, plain, StepDraws(0, 1, size, torch.arange(size - 256, size), version))
            Sampler(10**7, size, 0, own, (RandomStream("crop", 22),), keyed=True, version=version)(1)
        return counted.elements

    alone = count(256, 2)
    assert count(16_384, 2) < 1.3 * alone and count(16_384, 1) > 4 * alone


def test_numbers_in_blocks() -> None:
    """Each block of 256 has a generator of its own; version 1, and a step of up to 1,024, one for all."""

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(n, 2, generator=generator)

    for size, version in ((1024, 2), (1500, 1)):
        for numbers in StepDraws(3, 4, size, version=version)("use", draw):
            assert torch.equal(numbers, draw(size, make_generator(3, "use", 4)))
    first, second = StepDraws(3, 4, 1500)("use", draw, draw)
    assert first.shape == (1500, 2) and len(first.unique(dim=0)) == 1500 and not torch.equal(first, second)
    assert torch.equal(first[1280:], draw(220, make_generator(3, "use", 4, 5)))
    some = torch.tensor([0, 255, 256, 700, 1499])
    for numbers, part in zip((first, second), StepDraws(3, 4, 1500, some)("use", draw, draw), strict=True):
        assert torch.equal(part, numbers[some])


def test_mixup_is_a_weighted_mean_of_neighbours_and_of_their_targets() -> None:
    x, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 2, 4, 0])
    shares = []
    for step in range(200):
        mixed, targets = Mixing(mixup=0.2, classes=5)(x, labels, 0, step)
        share = float(targets[0, 0])
        shares.append(share)
        other = torch.tensor([1, 0, 3, 2, 5, 4])
        torch.testing.assert_close(mixed, share * x + (1 - share) * x[other])
        own = torch.eye(5)[labels]
        torch.testing.assert_close(targets, share * own + (1 - share) * own[other])
        assert float(targets[2, 2]) == pytest.approx(1)  # both are of one class
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1))
    assert abs(np.mean(shares) - 0.5) < 0.1 and abs(np.var(shares) - 1 / 5.6) < 0.04


@given(step=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_cutmix_shows_the_neighbour_in_a_box_of_its_share(step: int) -> None:
    x = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).contiguous(memory_format=torch.channels_last)
    mixed, targets = Mixing(cutmix=1.0, classes=4)(x, torch.arange(4), 0, step)
    theirs = mixed != x
    assert torch.equal(mixed[theirs], x[[1, 0, 3, 2]][theirs])
    torch.testing.assert_close(targets.diagonal(), 1 - theirs.float().mean((1, 2, 3)))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert mixed.is_contiguous(memory_format=torch.channels_last) and int(x[1].max()) == 1


def test_cutmix_box_is_torchvisions() -> None:
    assert cutmix_box(224, 224, 0.25, 0.5, 0.5) == (56, 56, 112, 112)
    assert cutmix_box(224, 224, 0.25, 0.0, 0.999) == (0, 167, 56, 57)  # cut at the edges
    assert cutmix_box(10, 10, 0.0, 0.3, 0.3)[2:] == (0, 0)
    assert cutmix_box(10, 10, 1.0, 0.5, 0.5) == (0, 0, 10, 10)


def test_both_take_turns() -> None:
    x = torch.rand(2, 1, 16, 16)
    mixing = Mixing(mixup=1.0, cutmix=1.0, classes=2)
    cut = [bool(((mixed := mixing(x, torch.arange(2), 0, s)[0]) == x).logical_or(mixed == x.flip(0)).all())
           for s in range(100)]  # fmt: skip
    assert 30 < sum(cut) < 70
    with pytest.raises(UsageError, match=r"must be 0 \(none\) or more"):
        Mixing(mixup=-1)
    assert not Mixing() and Mixing(mixup=0.1)


def test_a_image_without_its_neighbour_stays_as_it_is() -> None:
    x, labels, positions = torch.rand(4, 1, 2, 2), torch.arange(4), torch.tensor([1, 4, 5, 6])
    assert find_partners(positions).tolist() == [0, 2, 1, 3]
    mixed, targets = Mixing(mixup=1.0, classes=4)(x, labels, 0, 0, positions)
    assert torch.allclose(mixed[[0, 3]], x[[0, 3]]) and torch.equal(targets[[0, 3]], torch.eye(4)[[0, 3]])
    assert not torch.allclose(mixed[1:3], x[1:3])


def test_the_label_is_the_class_that_a_image_shows_most() -> None:
    plain = modern().batch(0)
    assert torch.equal(plain.targets, plain.labels)
    for step in range(8):
        batch = modern(mixing=Mixing(mixup=0.5, classes=5)).batch(step)
        assert batch.targets.shape == (16, 5) and torch.equal(batch.labels, batch.targets.argmax(1))


def test_training_with_all_of_it(tmp_path: Path) -> None:
    values = {"net": "resnet8", "steps": 12, "device": "cpu", "precision": "fp32", "batch": 16}
    modern_values = {"trivial_augment": True, "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1}
    a = resnetlab.train("quick", out=tmp_path / "a", **values, **modern_values)  # type: ignore[arg-type]
    b = resnetlab.train("quick", out=tmp_path / "b", **values, **modern_values)  # type: ignore[arg-type]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert a.top1_error == b.top1_error < 1
    text = (tmp_path / "a" / "recipe.toml").read_text()
    assert "trivial_augment = true" in text and "cutmix = 1.0" in text


def test_the_loss_is_cross_entropy_with_soft_targets_and_smoothing() -> None:
    from resnetlab.training import recipes
    from resnetlab.training.recipe import Overrides
    from resnetlab.training.tasks import classification
    from resnetlab.training.train import RunOptions, build_task

    overrides = Overrides(net="resnet8", values={"mixup": "1", "label_smoothing": "0.1"})
    task = build_task(overrides.apply(recipes.quick()), RunOptions(device="cpu"))
    assert isinstance(task, classification.ClassificationTask)
    (batch,) = task.micro_batches(0)
    loss, wrong = task.loss(batch)
    logits = task.net(batch.images).double()
    smooth = 0.9 * batch.targets + 0.1 / 10
    expected = -(smooth * torch.log_softmax(logits, 1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(wrong) == pytest.approx(float((logits.argmax(1) != batch.targets.argmax(1)).double().mean()))
