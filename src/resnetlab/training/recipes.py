"""The recipes: complete values, each with its paper, command, cost and expected result."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from resnetlab import migrate_v01
from resnetlab.data import sources
from resnetlab.data.dataset import A_TENTH
from resnetlab.errors import UsageError, suggest_path, unknown_name_error
from resnetlab.formatting import format_count
from resnetlab.inference.start import find_pretrained, find_weights
from resnetlab.models.spec import is_network_name
from resnetlab.run_folder import RunFolder
from resnetlab.training.annotated_recipes import ANNOTATED_RECIPES
from resnetlab.training.recipe import BaseRecipe, Recipe

LARGE_BATCH = 4  # times a recipe's batch: from there on its learning rate is reported
ADAPTIVE = ("adamw", "lamb")  # their steps do not grow with the gradient, so a learning rate of SGD is none of theirs
SGD_BATCH = 8192  # up to which the error stays the same with linear scaling and SGD (Goyal et al. 2017, figure 1)


def quick() -> Recipe:
    """A small residual network on the digits that come with the package, for the first run.

    Paper: 2015 §4.2 in small (resnet14 of the 6n+2 family; images enlarged from 8x8 to 16x16); the schedule is ours.
    Command: resnetlab train
    Cost: about 15 s on one CPU core.
    Expected: 0.44 % top-1 error on the 360 test digits (mean of 5 seeds; docs/log.md).
    """
    return Recipe(
        name="quick",
        data="digits",
        net="resnet14",
        image_size=16,
        normalise="per-channel mean and std",
        val_images=144,
        pad=1,
        pad_with="black",
        flip=False,
        batch=64,
        steps=600,
        lr=0.1,
        milestones=(350, 500),
        warmup="none",
        weight_decay=5e-4,
        threads=1,  # small layers gain little from a second thread, and lose much if another program runs
        log_every=10,
        eval_every=50,
    )


def paper_cifar() -> Recipe:
    """The 2015 paper's CIFAR-10 training: 64k iterations of batch 128, learning rate 0.1, a tenth of it at 32k and 48k.

    Paper: 2015 §4.2; BN over 64 images, as on the paper's two GPUs. For resnet110 add `--set warmup=train-error` (0.01 until
        the training error is below 80 %).
    Command: resnetlab train cifar10 --net resnet20 --recipe paper-cifar
    Cost: 8.2 million images, 164 epochs. On two CPU cores resnet20 trains on 842 images/s: 2.7 h (computed).
    Expected: top-1 test error 8.75 (resnet20), 7.51 (32), 7.17 (44), 6.97 (56), 6.61 ± 0.16 (110) % (2015 Table 6); here
        12.83 % after an eighth of it, 22.05 % after 3.1 % (docs/log.md).
    """
    return Recipe(
        name="paper-cifar",
        data="cifar10",
        net="resnet20",
        image_size=32,
        batch=128,
        bn_batch=64,
        steps=64_000,
        lr=0.1,
        milestones=(32_000, 48_000),
    )


def preact_cifar() -> Recipe:
    """The 2016 paper's CIFAR training: as in 2015, with a learning rate of 0.01 in the first 400 iterations.

    Paper: 2016 §3 and appendix; the median of five runs is reported. Other networks: preresnet164, preresnet1001.
    Command: resnetlab train cifar10 --recipe preact-cifar
    Cost: 8.2 million images, 164 epochs. On two CPU cores preresnet110 trains on 162 images/s: 14 h (computed).
    Expected: top-1 test error 6.37 (preresnet110), 5.46 (preresnet164), 4.92 (preresnet1001) % (2016 Tables 2 and 3);
        not run here.
    """
    return replace(paper_cifar(), name="preact-cifar", net="preresnet110", warmup="steps")


def paper_imagenet() -> Recipe:
    """The 2015 paper's ImageNet training: batch 256, learning rate 0.1, a tenth of it whenever the error stops falling.

    Paper: 2015 §3.4: scale and colour augmentation, the per-pixel mean subtracted, at most 60·10⁴ iterations; BN over 32
        images, as on its eight GPUs. What "plateaus" means is ours: five evaluations of 10,000 held-out training images in
        a row, one every 5,000 iterations, without a new lowest error. `--set schedule=milestones --set val_images=0` drops the
        rate at 30 and 60 epochs instead, as the 2016 paper describes it.
    Command: resnetlab train IMAGENET --net resnet50 --recipe paper-imagenet
    Cost: 153.6 million images, 120 epochs. Two CPU cores, at 12.4 images/s of resnet50, would take 143 days (computed): use
        GPUs.
    Expected: 10-crop top-1/top-5 error on the validation images 25.03/7.76 (resnet34, shortcut=A), 24.52/7.46 (resnet34),
        22.85/6.71 (resnet50), 21.75/6.05 (resnet101), 21.43/5.71 (resnet152) % (2015 Table 3); not run here.
    """
    return Recipe(
        name="paper-imagenet",
        data="imagenet",
        net="resnet50",
        image_size=224,
        eval_resize=256,
        val_images=10_000,
        crop="scale",
        colour=True,
        pad=0,
        batch=256,
        bn_batch=32,
        steps=600_000,
        lr=0.1,
        schedule="plateau",
        milestones=(150_137, 300_274),  # 30 and 60 epochs of 1,281,167 images, for schedule=milestones
        eval_every=5_000,
        precise_bn=200,
    )


def preact_imagenet() -> Recipe:
    """The 2016 paper's ImageNet training: as in 2015, the learning rate divided by 10 at 30 and at 60 epochs.

    Paper: 2016 §5 and appendix; that it ends at 90 epochs is fb.resnet.torch's. Evaluate with `--protocol dense:320`.
    Command: resnetlab train IMAGENET --recipe preact-imagenet
    Cost: 115.3 million images, 90 epochs. Two CPU cores, at 3.7 images/s of preresnet200, would take a year (computed): use
        GPUs.
    Expected: top-1/top-5 error of one 320x320 crop 21.1/5.5 (preresnet152), 20.7/5.3 (preresnet200) % (2016 Table 5); not run
        here.
    """
    return replace(
        paper_imagenet(), name="preact-imagenet", net="preresnet200", val_images=0, steps=450_411, schedule="milestones"
    )


def modern() -> Recipe:
    """Training methods from after the papers, in 100 epochs: torchvision's second recipe with a short budget.

    Paper: "How to Train State-Of-The-Art Models Using TorchVision's Latest Primitives" (2021) and Wightman et al. 2021
        (arXiv 2110.00476): cosine, linear warm-up, label smoothing, mixup or cutmix, TrivialAugment, random erasing, a moving
        average of the weights, no decay on BN and biases, the last BN of every block starting at 0. `modern-long` has the
        full length.
    Command: resnetlab train IMAGENET --recipe modern
    Cost: 128 million images, 100 epochs. Two CPU cores, at 9.1 images/s, would take 163 days (computed): use GPUs.
    Expected: no published figure is for exactly this; resnet50v1.5 after 100 epochs of the 2021 paper's A3, in smaller images,
        has 21.9 % top-1 error at 224. Not run here.
    """
    return Recipe(
        name="modern",
        data="imagenet",
        net="resnet50v1.5",
        zero_init_last_bn=True,
        image_size=224,
        eval_resize=232,
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
        ema_decay=0.9998,
        eval_every=5_000,
    )


def modern_long() -> Recipe:
    """The same in 600 epochs, with stochastic depth.

    Paper: as `modern`; the length is torchvision's, stochastic depth 0.05 that of Wightman et al. 2021 (A2).
    Command: resnetlab train IMAGENET --recipe modern-long
    Cost: 769 million images, 600 epochs: six times `modern`.
    Expected: 19.14 % top-1 error, as torchvision reports for its resnet50 (IMAGENET1K_V2, other crops in training); not run
        here.
    """
    return replace(
        modern(), name="modern-long", steps=750_684, stochastic_depth=0.05, ema_decay=0.99998, eval_every=20_000
    )


def finetune() -> Recipe:
    """Fine-tuning on your own photographs from a trained model: `resnetlab import` makes one from published weights.

    Paper: neither; common practice: the backbone has a tenth of the head's learning rate, the gradient is clipped because
        the head is new, half a cosine. With few images per class add `--set frozen_bn=true`.
    Command: resnetlab train FOLDER --recipe finetune --start-from model.safetensors
    Cost: 16,000 images, a quarter of `photos`. On two CPU cores resnet18 trains on 29.5 images/s: 9 min (computed).
    Expected: depends on the model and the images; not measured yet.
    """
    return replace(
        photos(),
        name="finetune",
        net="",
        image_size=0,
        eval_resize=0,
        normalise="as start_from",
        steps=500,
        schedule="cosine",
        milestones=(),
        warmup="linear",
        warmup_lr=0.001,
        warmup_steps=25,
        lr=0.02,
        backbone_lr_scale=0.1,
        clip_norm=5.0,
        weight_decay=1e-4,
        eval_every=100,
    )


def photos() -> Recipe:
    """Your own photographs, in a folder of class folders: ResNet-18 at 224 pixels.

    Paper: 2015 §3.4 in small: random-resized crop (fb.resnet.torch's) in place of scale augmentation; the schedule is ours.
    Command: resnetlab train FOLDER
    Cost: 64,000 images. On two CPU cores resnet18 trains on 29.5 images/s: 36 min (computed). Shorten it with --steps.
    Expected: from scratch on 240 photographs of five flowers 45.00 % top-1 error (95 % interval 34.58 to 55.88 %, n = 80);
        with so few, start from a pretrained model (--recipe finetune).
    """
    return Recipe(
        name="photos",
        data="photos",
        val_images=A_TENTH,
        net="resnet18",
        image_size=224,
        eval_resize=256,
        normalise="per-channel mean and std",
        crop="resized",
        area=0.25,
        pad=0,
        batch=32,
        bn_batch=16,  # one for each of two threads
        steps=2_000,
        lr=0.05,
        milestones=(1_200, 1_700),
        warmup="steps",
        warmup_lr=0.01,
        warmup_steps=100,
        weight_decay=5e-4,
        log_every=10,
        eval_every=200,
    )


RECIPES: dict[str, Callable[[], BaseRecipe]] = {
    "quick": quick,
    "paper-cifar": paper_cifar,
    "preact-cifar": preact_cifar,
    "paper-imagenet": paper_imagenet,
    "preact-imagenet": preact_imagenet,
    "modern": modern,
    "modern-long": modern_long,
    "photos": photos,
    "finetune": finetune,
    **ANNOTATED_RECIPES,
}
SMALL_SIDE = 64  # pixels; ImageNet's stem leaves nothing of smaller images
# by the task, and for classifiers by the name of the data ("photos" for all others)
DEFAULT_RECIPES = {
    "detect": "boxes",
    "segment": "masks",
    "digits": "quick",
    "cifar10": "paper-cifar",
    "cifar100": "paper-cifar",
}


def find_classification_recipe(name: str) -> Recipe:
    """A classifier's recipe by name; raises UsageError if it is unknown."""
    return cast(Recipe, find_recipe(name, Recipe.task))


def find_recipe(name: str, task: str) -> BaseRecipe:
    """A task's recipe by name; raises UsageError if it is unknown."""
    known = {key: recipe for key, make in RECIPES.items() if (recipe := make()).task == task}
    if name not in known:
        raise unknown_name_error("recipe", name, known)
    return known[name]


def is_recipe(name: str | Path) -> bool:
    """Whether a word is a recipe's name or file, rather than data."""
    return str(name) in RECIPES or str(name).endswith(".toml")


def choose_recipe(name: str | Path | None, *, task: str, data: str | None) -> BaseRecipe:
    """A task's recipe of a name or in a file, or the default of the task and the data."""
    if name is not None and str(name) not in RECIPES and (file := Path(name, "recipe.toml")).is_file():
        name = file  # of a run's folder
    if name is not None and str(name).endswith(".toml"):
        return read_recipe_file(Path(name), task)
    name = None if name is None else str(name)
    return find_recipe(name or DEFAULT_RECIPES.get(task) or DEFAULT_RECIPES.get(data or "digits", "photos"), task)


def refuse_network(data: object) -> None:
    """Raises UsageError for a network's name where data are meant."""
    if isinstance(data, str) and is_network_name(data) and not Path(data).exists():
        raise UsageError(f"{data} is a network, not data; give it as --net {data}, beside a folder or a data set.")


def choose_start(net: str | None, weights: str, recipe: BaseRecipe | str | Path | None, *, task: str) -> str:
    """The weights to start from, of the network or of the recipe's, where they are named as torchvision does."""
    if net is None:
        named = recipe or DEFAULT_RECIPES.get(task, "finetune")
        net = (named if isinstance(named, BaseRecipe) else choose_recipe(named, task=task, data=None)).net
    return find_weights(net or photos().net, weights)


def choose_pretrained(
    net: str | None, recipe: BaseRecipe | str | Path | None, *, task: str, data: str | None
) -> tuple[str, list[str]]:
    """The published ImageNet weights of a network, or of the recipe's where none is named, which a sentence then says.

    Raises UsageError if there are none.
    """
    if net is not None:
        return find_pretrained(net), []
    chosen = recipe if isinstance(recipe, BaseRecipe) else choose_recipe(recipe, task=task, data=data)
    start = find_pretrained(None, chosen.net or photos().net)
    return start, [f"--pretrained takes {start}, of the recipe's network; --net resnet50 takes another"]


def fit_small_images(recipe: Recipe, side: int) -> Recipe:
    """The recipe at the size of images as small as CIFAR's, with CIFAR's network and crops; for larger ones as it is."""
    if side > SMALL_SIDE:
        return recipe
    return replace(recipe, net="resnet20", image_size=side, eval_resize=0, crop="centre", pad=side // 8)


def read_recipe_file(path: Path, task: str) -> BaseRecipe:
    """The recipe in a TOML file: a run's own, or some values and the `name` of the recipe that has the others.

    Paths in a run's own recipe are relative to the folder that the run was started in, which its environment.json records.

    Raises UsageError if the file cannot be read, or has an unknown key or a value that cannot be used.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        hint = suggest_path(path) or "; --recipe takes a recipe's name or a TOML file."
        raise UsageError(f"{path} is not there{hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML ({error}); a run's recipe.toml is an example.") from error
    values = migrate_v01.migrate_recipe(values) if migrate_v01.is_recipe(values) else values
    name = values.pop("name", None)
    for own in (values.pop("task", task), RECIPES[str(name)]().task if str(name) in RECIPES else task):
        if own != task:
            raise UsageError(f"{path} is a recipe of another task: {own}.")
    base = choose_recipe(name, task=task, data=values.get("data"))
    if not isinstance(specification := values.pop("specification", {}), Mapping):
        raise UsageError(f"{path}: specification must be a table of values, not {specification!r}.")
    known = {f.name for f in fields(base)}
    try:
        for key in values:
            if key not in known:
                raise unknown_name_error("key", key, known)
        with contextlib.suppress(TypeError):  # of a value of another type, which `replace` names
            values = base.with_implied(values)
        recipe = replace(base, specification={**base.specification, **specification}, **values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    started_in = Path(str((RunFolder(path.parent).read_json("environment.json") or {}).get("started_in", "")))
    paths: dict[str, Any] = {key: getattr(recipe, key, "") for key in ("data", "start_from", "quarantine")}
    paths = {key: sources.resolve_data_path(path, started_in) for key, path in paths.items() if path}
    return replace(recipe, **paths)


def _find_original(recipe: BaseRecipe) -> BaseRecipe | None:
    """The recipe of this task that a recipe is named after; None if there is none."""
    own = RECIPES[recipe.name]() if recipe.name in RECIPES else None
    return own if own is not None and own.task == recipe.task else None


def find_named(recipe: BaseRecipe, precision: str, start_size: Mapping[str, int] | None = None) -> BaseRecipe:
    """The recipe that a resolved one is named after, rescaled to the same number of steps and resolved alike.

    `precision` is what "auto" selects on this machine, `start_size` what a recipe without a size of its own takes from the
    model that it starts from.
    """
    if (own := _find_original(recipe)) is None:
        return recipe
    same_length = own if own.steps == recipe.steps else own.rescale(recipe.steps)
    resolved: dict[str, Any] = {"threads": recipe.threads, "op_threads": own.op_threads or recipe.op_threads}
    resolved["precision"] = precision if own.precision == "auto" else own.precision
    for key in ("winograd", "fused_bn", "sampling_version"):  # the line of the device names the first two
        resolved[key] = getattr(recipe, key)
    if getattr(own, "val_images", 0) == A_TENTH:
        resolved["val_images"] = getattr(recipe, "val_images", 0)
    if isinstance(recipe, Recipe) and isinstance(own, Recipe):
        for key in ("compile", "sampling"):
            resolved[key] = getattr(recipe if getattr(own, key) == "auto" else own, key)
        if not own.image_size:
            resolved |= start_size or {"image_size": recipe.image_size, "eval_resize": recipe.eval_resize}
    return replace(same_length, **resolved)


def describe_learning_rate(recipe: BaseRecipe) -> str | None:
    """A sentence where the recipe's learning rate is meant for another optimizer or a far smaller batch, or SGD for one."""
    base = _find_original(recipe) or recipe
    if recipe.lr == base.lr and (base.optimizer, recipe.optimizer in ADAPTIVE) == ("sgd", True):
        return (
            f"warning: the learning rate {recipe.lr:g} of {recipe.name} is for sgd, not {recipe.optimizer}, which takes far "
            "smaller ones; give it its own, such as --lr 0.001"
        )
    if not recipe.lr_base_size and (recipe.lr, recipe.optimizer) == (base.lr, base.optimizer):
        if recipe.batch < LARGE_BATCH * base.batch:
            return None
        return (
            f"warning: the learning rate {recipe.lr:g} of {recipe.name} is for batches of {base.batch:,}, not "
            f"{recipe.batch:,}; --set lr_base_size={base.batch} scales it with the batch, with a warm-up"
        )
    if recipe.optimizer != "sgd" or recipe.batch <= SGD_BATCH:
        return None
    return (
        f"warning: with SGD the error rises in batches above {SGD_BATCH:,} (Goyal et al. 2017), and this one has "
        f"{recipe.batch:,}; --set optimizer=lars, or lamb, with a learning rate of its own, is meant for them"
    )


def describe_budget(recipe: BaseRecipe) -> str | None:
    """A label for a run that is shorter or longer than the recipe it is named after; None if it has the same length."""
    full = (_find_original(recipe) or recipe).steps
    if recipe.steps == full:
        return None
    return f"{recipe.steps:,} of the {format_count(full, 'step')} of {recipe.name} ({recipe.steps / full:.1%})"


def describe_run_budget(run: RunFolder, recipe: BaseRecipe) -> str | None:
    """The same for a run in its folder, which may have been extended."""
    extended = (run.read_json("environment.json") or {}).get("extended_after", [])
    after = [f"extended after {format_count(step, 'step')} without the optimizer's momentum" for step in extended]
    return "; ".join(filter(None, [describe_budget(recipe), *after])) or None
