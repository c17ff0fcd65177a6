"""The recipes: complete values, each with its paper, command, cost and expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from residuum.errors import unknown
from residuum.training.recipe import Recipe


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

    Paper: 2015 §4.2. For resnet110 add `--set warmup=train-error` (0.01 until the training error is below 80 %).
    Command: residuum train cifar10 --net resnet20 --recipe paper-cifar
    Cost: 164 passes over 50,000 pictures; resnet20 takes 2 to 3 h on two CPU cores.
    Expected: top-1 test error 8.75 (resnet20), 7.51 (32), 7.17 (44), 6.97 (56), 6.61 ± 0.16 (110) % (2015 Table 6).
    """
    return Recipe(
        name="paper-cifar",
        data="cifar10",
        net="resnet20",
        size=32,
        batch=128,
        steps=64_000,
        lr=0.1,
        milestones=(32_000, 48_000),
    )


def photos() -> Recipe:
    """Your own photographs, in a folder of class folders: ResNet-18 at 224 pixels.

    Paper: 2015 §3.4 in small: random-resized crop (fb.resnet.torch's) in place of scale augmentation; the schedule is ours.
    Command: residuum train FOLDER
    Cost: 64,000 pictures shown; about 40 min on two CPU cores, 1 min on a data-centre GPU. Bring it to your time with --steps.
    Expected: from scratch on a few hundred pictures about two of three right; a few thousand pictures do better.
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


RECIPES: dict[str, Callable[[], Recipe]] = {"quick": quick, "paper-cifar": paper_cifar, "photos": photos}
DEFAULTS = {"digits": "quick", "cifar10": "paper-cifar", "cifar100": "paper-cifar"}  # for data by name; else "photos"


def recipe(name: str) -> Recipe:
    """The recipe of a name; raises UsageError where it is not known."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def changes(given: Recipe, precision: str) -> list[str]:
    """How a resolved recipe differs from the one it is named after, brought to the same number of steps.

    `precision` is what "auto" comes to on this machine.
    """
    if given.name not in RECIPES:
        return []
    named = recipe(given.name)
    same_length = named if named.steps == given.steps else named.shrunk(given.steps)
    precision = precision if named.precision == "auto" else named.precision
    return given.differences(replace(same_length, precision=precision, threads=named.threads or given.threads))


def budget(given: Recipe) -> str | None:
    """A label for a run that is shorter or longer than the recipe it is named after; None where it is as long."""
    full = recipe(given.name).steps if given.name in RECIPES else given.steps
    if given.steps == full:
        return None
    return f"{given.steps:,} of the {full:,} steps of {given.name} ({given.steps / full:.1%})"
