"""The recipes: complete values, each with its paper, command, cost and expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from residuum.errors import unknown
from residuum.training.dense_recipe import DENSE_RECIPES
from residuum.training.recipe import Recipe, Training


def quick() -> Recipe:
    """A small residual network on scikit-learn's embedded digits, for the first run.

    Paper: 2015 §4.2 in small (resnet14 of the 6n+2 family; pictures enlarged from 8x8 to 16x16); the schedule is ours.
    Command: residuum train
    Cost: about 15 s on one CPU core.
    Expected: 0.44 % top-1 error on the 360 test digits (mean of 5 seeds; docs/log.md).
    """
    return Recipe(
        name="quick",
        data="digits",
        net="resnet14",
        size=16,
        normalise="per-channel mean and std",
        held_out=144,
        pad=1,
        pad_with="black",
        flip=False,
        batch=64,
        steps=600,
        lr=0.1,
        milestones=(350, 500),
        warmup="none",
        weight_decay=5e-4,
        threads=1,  # layers this small gain little from a second one, and lose everything where another program runs
        record_every=10,
        judge_every=50,
    )


def paper_cifar() -> Recipe:
    """The 2015 paper's CIFAR-10 training: 64k iterations of batch 128, learning rate 0.1, a tenth of it at 32k and 48k.

    Paper: 2015 §4.2; BN over 64 pictures, as on the paper's two GPUs. For resnet110 add `--set warmup=train-error` (0.01 until
        the training error is below 80 %).
    Command: residuum train cifar10 --net resnet20 --recipe paper-cifar
    Cost: 8.2 million pictures, 164 passes. On two CPU cores resnet20 makes 842 images/s: 2.7 h (computed).
    Expected: top-1 test error 8.75 (resnet20), 7.51 (32), 7.17 (44), 6.97 (56), 6.61 ± 0.16 (110) % (2015 Table 6); here
        12.83 % after an eighth of it, 22.05 % after 3.1 % (docs/log.md).
    """
    return Recipe(
        name="paper-cifar",
        data="cifar10",
        net="resnet20",
        size=32,
        batch=128,
        bn_batch=64,
        steps=64_000,
        lr=0.1,
        milestones=(32_000, 48_000),
    )


def preact_cifar() -> Recipe:
    """The 2016 paper's CIFAR training: as in 2015, with a learning rate of 0.01 in the first 400 iterations.

    Paper: 2016 §3 and appendix; the median of five runs is reported. Other networks: preresnet164, preresnet1001.
    Command: residuum train cifar10 --recipe preact-cifar
    Cost: 8.2 million pictures, 164 passes. On two CPU cores preresnet110 makes 162 images/s: 14 h (computed).
    Expected: top-1 test error 6.37 (preresnet110), 5.46 (preresnet164), 4.92 (preresnet1001) % (2016 Tables 2 and 3);
        not run here.
    """
    return replace(paper_cifar(), name="preact-cifar", net="preresnet110", warmup="steps")


def paper_imagenet() -> Recipe:
    """The 2015 paper's ImageNet training: batch 256, learning rate 0.1, a tenth of it whenever the error stops falling.

    Paper: 2015 §3.4: scale and colour augmentation, the per-pixel mean subtracted, at most 60·10⁴ iterations; BN over 32
        pictures, as on its eight GPUs. What "plateaus" means is ours: five judgements of 10,000 held-out training pictures in
        a row, one every 5,000 iterations, without a new lowest error. `--set schedule=milestones --set held_out=0` drops the
        rate at 30 and 60 epochs instead, as the 2016 paper tells of it.
    Command: residuum train IMAGENET --net resnet50 --recipe paper-imagenet
    Cost: 153.6 million pictures, 120 passes. Two CPU cores, at 12.4 images/s of resnet50, would take 143 days (computed): it
        wants GPUs.
    Expected: 10-crop top-1/top-5 error on the validation pictures 25.03/7.76 (resnet34, shortcut=A), 24.52/7.46 (resnet34),
        22.85/6.71 (resnet50), 21.75/6.05 (resnet101), 21.43/5.71 (resnet152) % (2015 Table 3); not run here.
    """
    return Recipe(
        name="paper-imagenet",
        data="imagenet",
        net="resnet50",
        size=224,
        resize=256,
        held_out=10_000,
        crop="scale",
        colour=True,
        pad=0,
        batch=256,
        bn_batch=32,
        steps=600_000,
        lr=0.1,
        schedule="plateau",
        milestones=(150_137, 300_274),  # 30 and 60 epochs of 1,281,167 pictures, for schedule=milestones
        judge_every=5_000,
        precise_bn=200,
    )


def preact_imagenet() -> Recipe:
    """The 2016 paper's ImageNet training: as in 2015, the learning rate divided by 10 at 30 and at 60 epochs.

    Paper: 2016 §5 and appendix; that it ends at 90 epochs is fb.resnet.torch's. Judge with `--protocol dense:320`.
    Command: residuum train IMAGENET --recipe preact-imagenet
    Cost: 115.3 million pictures, 90 passes. Two CPU cores, at 3.7 images/s of preresnet200, would take a year (computed): it
        wants GPUs.
    Expected: top-1/top-5 error of one 320x320 crop 21.1/5.5 (preresnet152), 20.7/5.3 (preresnet200) % (2016 Table 5); not run
        here.
    """
    return replace(
        paper_imagenet(),
        name="preact-imagenet",
        net="preresnet200",
        held_out=0,
        steps=450_411,
        schedule="milestones",
    )


def modern() -> Recipe:
    """What ResNets gained after the papers, in 100 epochs: torchvision's second recipe with a short budget.

    Paper: "How to Train State-Of-The-Art Models Using TorchVision's Latest Primitives" (2021) and Wightman et al. 2021
        (arXiv 2110.00476): cosine, linear warm-up, label smoothing, mixup or cutmix, TrivialAugment, random erasing, a moving
        average of the weights, no decay on BN and biases, the last BN of every block starting at 0. `modern-long` has its
        whole length.
    Command: residuum train IMAGENET --recipe modern
    Cost: 128 million pictures, 100 passes. Two CPU cores, at 9.1 images/s, would take 163 days (computed): it wants GPUs.
    Expected: no one's figure is for exactly this; resnet50v1.5 after 100 epochs of the 2021 paper's A3, in smaller pictures,
        has 21.9 % top-1 error at 224. Not run here.
    """
    return Recipe(
        name="modern",
        data="imagenet",
        net="resnet50v1.5",
        zero_init_last_bn=True,
        size=224,
        resize=232,
        normalise="per-channel mean and std",
        crop="resized",
        pad=0,
        trivial_augment=True,
        erasing=0.1,
        mixup=0.2,
        cutmix=1.0,
        label_smoothing=0.1,
        batch=1024,
        bn_batch=128,
        steps=125_114,
        lr=0.5,
        schedule="cosine",
        warmup="linear",
        warmup_lr=0.005,
        warmup_steps=6_256,  # 5 epochs
        weight_decay=2e-5,
        decay_all=False,
        ema=0.9998,
        judge_every=5_000,
    )


def modern_long() -> Recipe:
    """The same in 600 epochs, with stochastic depth.

    Paper: as `modern`; the length is torchvision's, stochastic depth 0.05 that of Wightman et al. 2021 (A2).
    Command: residuum train IMAGENET --recipe modern-long
    Cost: 769 million pictures, 600 passes: six times `modern`.
    Expected: 19.14 % top-1 error is what torchvision prints for its resnet50 (IMAGENET1K_V2, other crops in training); not run
        here.
    """
    return replace(modern(), name="modern-long", steps=750_684, stochastic_depth=0.05, ema=0.99998, judge_every=20_000)


def finetune() -> Recipe:
    """Your own photographs, starting from a model that has learnt on others: `residuum import` makes one of published weights.

    Paper: none of the two; what is usual: the trunk learns at a tenth of the head's rate, the gradient is clipped while the
        head knows nothing, half a cosine. Few pictures a class: add `--set frozen_bn=true`.
    Command: residuum train FOLDER --recipe finetune --start-from model.safetensors
    Cost: 16,000 pictures shown, a quarter of `photos`. On two CPU cores resnet18 makes 29.5 images/s: 9 min (computed).
    Expected: depends on the model and the pictures; not measured yet.
    """
    return replace(
        photos(),
        name="finetune",
        net="",
        normalise="as start_from",
        steps=500,
        schedule="cosine",
        milestones=(),
        warmup="linear",
        warmup_lr=0.001,
        warmup_steps=25,
        lr=0.02,
        trunk_lr=0.1,
        clip_norm=5.0,
        weight_decay=1e-4,
        judge_every=100,
    )


def photos() -> Recipe:
    """Your own photographs, in a folder of class folders: ResNet-18 at 224 pixels.

    Paper: 2015 §3.4 in small: random-resized crop (fb.resnet.torch's) in place of scale augmentation; the schedule is ours.
    Command: residuum train FOLDER
    Cost: 64,000 pictures shown. On two CPU cores resnet18 makes 29.5 images/s: 36 min (computed). --steps brings it to
        your time.
    Expected: from scratch on 240 photographs of five flowers 45.00 % top-1 error (95 % interval 34.58 to 55.88 %, n = 80);
        with so few start from a model that has seen others (--recipe finetune).
    """
    return Recipe(
        name="photos",
        data="photos",
        net="resnet18",
        size=224,
        resize=256,
        normalise="per-channel mean and std",
        crop="resized",
        area=0.25,
        pad=0,
        batch=32,
        steps=2_000,
        lr=0.05,
        milestones=(1_200, 1_700),
        warmup="steps",
        warmup_lr=0.01,
        warmup_steps=100,
        weight_decay=5e-4,
        record_every=10,
        judge_every=200,
    )


RECIPES: dict[str, Callable[[], Training]] = {
    "quick": quick,
    "paper-cifar": paper_cifar,
    "preact-cifar": preact_cifar,
    "paper-imagenet": paper_imagenet,
    "preact-imagenet": preact_imagenet,
    "modern": modern,
    "modern-long": modern_long,
    "photos": photos,
    "finetune": finetune,
    **DENSE_RECIPES,
}
DEFAULTS = {"digits": "quick", "cifar10": "paper-cifar", "cifar100": "paper-cifar"}  # for data by name; else "photos"


def recipe(name: str) -> Recipe:
    """A classifier's recipe by name; raises UsageError where it is not known."""
    return cast(Recipe, named(name, Recipe.task))


def named(name: str, task: str) -> Training:
    """The recipe of a name; raises UsageError where the task knows none of it."""
    known = {key: made for key, make in RECIPES.items() if (made := make()).task == task}
    if name not in known:
        raise unknown("recipe", name, known)
    return known[name]


def changes(given: Training, precision: str) -> list[str]:
    """How a resolved recipe differs from the one it is named after, brought to the same number of steps.

    `precision` is what "auto" comes to on this machine.
    """
    if given.name not in RECIPES:
        return []
    own = named(given.name, given.task)
    same_length = own if own.steps == given.steps else own.shrunk(given.steps)
    chosen: dict[str, Any] = {"threads": own.threads or given.threads}
    chosen["precision"] = precision if own.precision == "auto" else own.precision
    if isinstance(given, Recipe) and isinstance(own, Recipe):
        chosen["compile"] = given.compile if own.compile == "auto" else own.compile
    return given.differences(replace(same_length, **chosen))


def budget(given: Training) -> str | None:
    """A label for a run that is shorter or longer than the recipe it is named after; None where it is as long."""
    full = named(given.name, given.task).steps if given.name in RECIPES else given.steps
    if given.steps == full:
        return None
    return f"{given.steps:,} of the {full:,} steps of {given.name} ({given.steps / full:.1%})"
