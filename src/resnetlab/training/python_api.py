"""`resnetlab.train`: training from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, cast

from torch import nn

from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.objects import dataset_from_object
from resnetlab.data.own_transform import Transform
from resnetlab.errors import UsageError, name_arguments, public, unknown_name_error
from resnetlab.models.own_network import OWN, check_module, class_name
from resnetlab.peer_words import translate
from resnetlab.progress import log
from resnetlab.training import recipes
from resnetlab.training.recipe import Overrides, Recipe
from resnetlab.training.result import ClassificationResult, Progress, show_training
from resnetlab.training.run_options import OnEvaluate, RunOptions, ignore
from resnetlab.training.tasks.starting_network import without_named_network
from resnetlab.training.train import resume as resume_run
from resnetlab.training.train import start_run


@public
def train(
    source: Any = None,
    /,
    data: Any = None,
    *,
    recipe: Recipe | str | Path | None = None,
    net: str | nn.Module | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    trackers: str | Sequence[str] = (),
    pretrained: bool = False,
    progress: Callable[[Progress], None] | bool = True,
    report: Callable[[str], None] | None = None,
    on_evaluate: OnEvaluate | None = None,
    transform: Transform | None = None,
    **values: Any,
) -> ClassificationResult:
    """Trains a network into a new run folder, or resumes a run.

    Args:
        source: the recipe or the data, without the word: what `recipe` describes is the recipe, anything else the data.
        recipe: a Recipe, the name of one, its file, such as a run's recipe.toml, or None for the default of the data ("quick"
            for digits, "paper-cifar" for CIFAR, "photos" for all else, "finetune" with `start_from`; Python objects with
            images of at most 64 pixels are trained on at their size, by default with resnet20).
        data: a data set's name, folder, table or pattern; or a list of (path, label), arrays (X, y), a PyTorch or Hugging Face
            data set, or a dictionary of splits (data.objects). Objects that are random give runs that cannot be repeated.
        net: the network's name; or a network of your own, which takes images (B, C, H, W) and gives logits (B, classes). It is
            trained in place, from the weights that it has; give it again to resume the run. What it keeps from step to step
            must be in its parameters and buffers.
        seed: changes the recipe's value.
        steps: length of the run; the schedule is rescaled to it.
        epochs: the same in epochs.
        out: the run folder; None takes runs/<data>, or the next free name.
        resume: the folder of a run to resume; the result is bit-identical to that of an uninterrupted run. A finished run is
            extended if `steps` or `epochs` is larger than its own.
        data_dir: the folder of the archives; None takes "data", or that of the resumed run.
        workers: processes that decode images on disk; None decides by the machine. The result does not depend on it.
        trackers: experiment trackers that get the figures: "tensorboard", "wandb", "mlflow", "trackio".
        pretrained: start from torchvision's ImageNet weights of `net`, or else of the recipe's network, by the recipe finetune.
        progress: True shows progress and messages on standard error, False nothing; a function is called at every line of
            metrics.jsonl.
        report: called with sentences on what happens, in place of printing them.
        on_evaluate: called after every evaluation of held-out images with its figures, and "step" and "steps". If it returns
            True, the run stops; it is saved and can be resumed.
        transform: a function of your own that changes training images: it takes a Pillow image of the network's size, after the
            crop, and gives one of the same size. What it draws from random, NumPy and torch is a function of seed, step and
            image, so runs resume bit-identically; a state of its own would not be. recipe.toml records its name.
        **values: any other value of the recipe or of the network's specification, such as batch=64 or shortcut="C".

    Returns:
        Paths of the run, the model and the report; errors as fractions, times in seconds (docs/json.md, `train`).

    Raises:
        UsageError, DataError, RunError, DivergedError: see resnetlab.errors.
        RunStopped: `on_evaluate` stopped the run.
        StopSignal: SIGINT or SIGTERM, after a checkpoint.
    """
    if source is not None:
        recipe, data = _place_source(source, recipe, data)
    net, steps, seed = _take_synonyms(values, {"net": net, "steps": steps, "seed": seed})
    recipe = _choose_for_start(values, recipe, resume, net)
    module, net = _name_network(net, pretrained)
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise UsageError(f"workers must be 0 or more, not {workers!r}.")
    own_progress = None if isinstance(progress, bool) else progress
    _require_functions(on_evaluate=on_evaluate, report=report, transform=transform, progress=own_progress)
    for word in values:
        if Recipe.find_key(word) is None:
            raise unknown_name_error("key", word, [*list(signature(train).parameters)[1:-1], *Recipe.keys()])
    on_bad_image, quarantine, groups = (str(values.get(k, "")) for k in ("on_bad_image", "quarantine", "groups"))
    reading = ReadOptions(on_bad_image or "stop", quarantine, groups=groups)
    own = None if data is None or isinstance(data, str | Path) else dataset_from_object(data, reading)
    name = own.name if own is not None else None if data is None else str(data)
    start, chosen = recipes.choose_pretrained(net, recipe, task="classify", data=name) if pretrained else ("", [])
    if pretrained:
        recipe, values = recipe or "finetune", {"start_from": start, **values}
    texts = {key: ",".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for key, v in values.items()}
    overrides = Overrides(data=name, net=net, steps=steps, epochs=epochs, seed=seed, values=texts)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(show_training()) if progress is True else progress or ignore
        options = RunOptions(
            data_dir=None if data_dir is None else Path(data_dir),
            device=None if device is None else str(device),
            workers=workers,
            epochs=overrides.length,
            trackers=(trackers,) if isinstance(trackers, str) else tuple(trackers),
            report=report or ((lambda sentence: log(name_arguments(sentence))) if progress is True else ignore),
            on_progress=shown,
            on_evaluate=on_evaluate,
            dataset=own,
            transform=transform,
            net=module,
        )
        for sentence in chosen:
            options.report(sentence)
        if resume is not None and (recipe is not None or out is not None):
            raise UsageError("resume continues a run with its own recipe in its own folder; leave out recipe and out.")
        if resume is not None:
            return cast(ClassificationResult, resume_run(Path(resume), options, overrides=overrides))
        base = recipe if isinstance(recipe, Recipe) else recipes.choose_recipe(recipe, task="classify", data=name)
        base = without_named_network(base, module) if module is not None and isinstance(base, Recipe) else base
        if recipe is None and own is not None and isinstance(base, Recipe) and not isinstance(own.train, DiskSplit):
            base = recipes.fit_small_images(base, min(own.train.read_image(0).shape[:2]))
        return cast(ClassificationResult, start_run(overrides.apply(base), Path(out) if out else None, options))


def _place_source(source: Any, recipe: Recipe | str | Path | None, data: Any) -> tuple[Recipe | str | Path | None, Any]:
    """Recipe and data, of which the first argument of `train` is one."""
    if recipe is not None and data is not None:
        raise UsageError("recipe and data are given; leave out what stands before them.")
    if isinstance(source, nn.Module):
        raise UsageError("a network is given by its argument's name: train(data, net=module).")
    recipes.refuse_network(source if data is None else data)
    named = isinstance(source, Recipe) or (isinstance(source, str | Path) and recipes.is_recipe(source))
    if named and source == "photos" and data is None and Path("photos").exists():
        named = False  # the folder, which has the recipe of its name unless weights to start from have another
    if data is not None and not named:
        raise UsageError("what stands before the data is no recipe; give images and labels as one pair: train((X, y)).")
    return (source, data) if recipe is None and named else (recipe, source)


def _choose_for_start(
    values: dict[str, Any], recipe: Recipe | str | Path | None, resume: str | Path | None, net: object
) -> Recipe | str | Path | None:
    """The given recipe, or as on the command line "finetune" for a new run that starts from weights."""
    (start,) = _take_synonyms(values, {"start_from": values.pop("start_from", None)})
    if start is None:
        return recipe
    values["start_from"] = recipes.choose_start(
        net if isinstance(net, str) else None, str(start), recipe, task="classify"
    )
    return recipe or ("finetune" if resume is None else None)


def _require_functions(**functions: Any) -> None:
    """Raises UsageError for anything else that is given in place of a function."""
    for word, function in functions.items():
        if function is not None and not callable(function):
            raise UsageError(f"{word} is a function, not {function!r}.")


def _take_synonyms(values: dict[str, Any], named: dict[str, Any]) -> Any:
    """The named arguments, taken out of `values` where they are given by another program's word, such as model or max_steps."""
    for word in list(values):
        if (key := translate(word, named)) is not None:
            if named[key] is not None:
                raise UsageError(f"{word} and {key} are the same value; give it once.")
            named[key] = values.pop(word)
    return named.values()


def _name_network(net: str | nn.Module | None, pretrained: bool) -> tuple[nn.Module | None, str | None]:
    """The user's own network, if one is given, and the name of the network, for the recipe."""
    if net is not None and not isinstance(net, str | nn.Module):
        raise UsageError(f"net is a network's name or a torch.nn.Module, not {type(net).__name__}.")
    if not isinstance(net, nn.Module):
        return None, net
    check_module(net)
    if pretrained:
        raise UsageError("pretrained takes the weights of a network's name; a network of your own brings its own.")
    return net, OWN + class_name(net)
