"""Downloads published models by name.

torchvision:resnet50.IMAGENET1K_V2     torchvision's weights
timm:resnet50.a1_in1k                  timm's weights
hf:OWNER/REPOSITORY                    a repository on the hub: a model file of ours, or timm's or transformers' layout

cifar10:resnet20, which comes with the package, is a model file and needs no download.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

from torch import nn

from resnetlab.data import imagenet
from resnetlab.data.decode import SUFFIXES
from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, UsageError, first_line, missing_package, unknown_name_error
from resnetlab.formatting import parse_json
from resnetlab.inference.import_model import IMAGENET_MEAN, IMAGENET_STD, ImportOptions, import_state_dict
from resnetlab.models.import_weights import SUPPORTED
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.spec import is_network_name
from resnetlab.models.state_dicts import StateDictFile, parse_state_dict, read_state_dict
from resnetlab.models.weight_files import unsafe_pickle_error
from resnetlab.run_folder import RunFolder

SCHEMES = ("torchvision", "timm", "hf")
FAILURES = (OSError, EOFError, HTTPException, RuntimeError)  # of torch's and timm's downloads
ImportResult = tuple[TrainedModel, list[str]]
TRAINED = Path(__file__).parents[1] / "trained"  # folders DATA-NET of the package's models, as `push` writes them


def get_scheme(name: str) -> str | None:
    """The publisher that a name begins with, or None if it is a path."""
    head, colon, _ = name.partition(":")
    return head if colon and head in SCHEMES else None


def find_trained(name: str) -> Path | None:
    """The model file of a name such as "cifar10:resnet20", which comes with the package; None for a path or another name.

    Raises UsageError for another network on the same data.
    """
    known = _list_trained()
    data = tuple(f"{each.partition(':')[0]}:" for each in known)
    if name not in known and name.startswith(data) and not Path(name).exists():
        raise unknown_name_error("trained model", name, known)
    return known.get(name)


def _list_trained() -> dict[str, Path]:
    return {folder.name.replace("-", ":", 1): folder / "model.safetensors" for folder in sorted(TRAINED.iterdir())}


def find_model(name: str | Path) -> str:
    """The model file that is meant: the one in a run folder, or `name` itself, which may be a published one.

    "cifar10:resnet20" is the file of that name that comes with the package.

    Raises:
        ModelFileError: the run folder has no model yet, or the folder is none.
        UsageError: the name is that of a network, of an image, of a weights file or of an export.
    """
    if not isinstance(name, str | Path):
        hint = ": its attribute model is one" if hasattr(name, "model") else ""
        raise UsageError(f"a model is a model file, a run folder or a published name, not {type(name).__name__}{hint}.")
    path, text = Path(name), str(name)
    if trained := find_trained(text):
        return str(trained)
    if get_scheme(text) or path.is_file():
        if path.suffix.lower() in SUFFIXES:
            raise UsageError(
                f"{name} is an image; the model comes first: a model file, a run folder or a published name."
            )
        if path.suffix.lower() in (".pth", ".pt", ".th", ".ckpt", ".bin") and path.is_file():
            raise UsageError(f"{name} is a weights file; make a model file of it first: resnetlab import {name}")
        if path.suffix.lower() in (".onnx", ".pt2", ".xml") and path.is_file():
            raise UsageError(f"{name} is an export, for other programs; give the model file that it was made from.")
        return text
    run = path.parent if path.name == "model.safetensors" else path
    if not (run / "model.safetensors").exists() and (run / "recipe.toml").is_file():
        raise ModelFileError(
            f"{run} is a run that has no model yet; wait for its end, or if it was stopped: {RunFolder(run).resume_command}"
        )
    if path.is_dir():
        model = path / "model.safetensors"
        if model.is_file():
            return str(model)
        raise ModelFileError(f"{path} is a folder without model.safetensors; give a model file or a run folder.")
    trained_here = [known for known in _list_trained() if text in known.split(":")]
    if not path.exists() and is_network_name(text):
        published = text.removesuffix("v1.5")
        weights = f"published weights are torchvision:{published}" if published in SUPPORTED["torchvision"] else ""
        weights = weights or (f"a trained one is {trained_here[0]}" if trained_here else "")
        raise UsageError(
            f"{text} is the name of a network, without weights: resnetlab.build({text!r}) makes it, "
            f"`resnetlab train --net {text}` trains it{weights and f'; {weights}'}."
        )
    if not path.exists() and trained_here:
        raise UsageError(f"{text} is a data set; a model trained on it is {trained_here[0]}.")
    return text


def load_or_download(name: str | Path, net: nn.Module | None = None) -> TrainedModel:
    """Loads a model file or that of a run folder, or downloads a published name.

    Raises as `find_model`, `load_trained_model` and `download_model`.
    """
    found = find_model(name)
    return download_model(found)[0] if get_scheme(found) else load_trained_model(Path(found), net)


@standard_torch_state()
def download_model(name: str, given: ImportOptions | None = None) -> ImportResult:
    """Downloads a published model; also returns notes on what was found, known and assumed.

    Args:
        given: options that replace the publisher's.

    Raises:
        ModelFileError: the download failed, or is not a residual network that can be built.
        UsageError: the publisher has no such model, or the package that downloads it is not installed.
    """
    scheme, _, rest = name.partition(":")
    given = given or ImportOptions()
    given.reject(("key", "source", "channel_order"), f"{name} determines its weights and their input")
    try:
        with redirect_stdout(sys.stderr):  # torch prints its progress
            model, notes = {"torchvision": _download_torchvision, "timm": _download_timm, "hf": _download_hf}[scheme](
                rest, given
            )
    except ImportError as error:
        raise missing_package(name, error.name, "hub") from error
    except pickle.UnpicklingError as error:
        raise unsafe_pickle_error(f"the download for {name} (or the file in torch's cache)", error) from error
    except FAILURES as error:
        raise ModelFileError(
            f"{name} could not be downloaded ({first_line(error)}); without a network, download the weights elsewhere, then: "
            "resnetlab train DATA --start-from FILE, in Python build(NAME, weights=FILE), or for a model of them: "
            "resnetlab import FILE"
        ) from error
    if "notes" in model.recipe:
        model = replace(model, recipe={"source": name, "notes": notes})
    return model, [f"downloaded: {name}", *notes]


def _download_torchvision(rest: str, given: ImportOptions) -> ImportResult:
    from torchvision.models import get_model_weights

    net, _, which = rest.partition(".")
    _check_supported(net, "torchvision")
    weights = get_model_weights(net)
    which = which or "DEFAULT"
    if which not in weights.__members__:
        raise unknown_name_error(f"weights of torchvision's {net}", which, weights.__members__)
    entry: Any = weights[which]
    transforms = entry.transforms()
    known = ImportOptions(
        source="torchvision",
        mean=transforms.mean,
        std=transforms.std,
        image_size=transforms.crop_size[0],
        eval_resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        classes=tuple(imagenet.imagenet_class_names().values()),
    )
    tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    model, notes = import_state_dict(parse_state_dict(tensors, rest), given.merge_over(known), rest)
    published = entry.meta.get("_metrics", {}).get("ImageNet-1K", {})
    errors = {f"top{k}_error": round(1 - published[f"acc@{k}"] / 100, 5) for k in (1, 5) if f"acc@{k}" in published}
    if errors and not given.given_values:  # they were measured with the publisher's preprocessing
        model.metrics = {"published": {"protocol": "1crop", "split": "val", "data": "imagenet", **errors}}
    return model, notes


def _download_timm(rest: str, given: ImportOptions) -> ImportResult:
    import timm

    _check_supported(rest.split(".")[0], "timm")
    try:
        net = timm.create_model(rest, pretrained=True)
    except RuntimeError as error:
        if not any(part in str(error) for part in ("Unknown model", "Invalid pretrained tag", "No pretrained weights")):
            raise
        raise UsageError(f"timm has no {rest!r}; for example timm:resnet50.a1_in1k") from error
    config: Any = net.pretrained_cfg
    return _import_timm(net.state_dict(), config, rest, rest, given)


def _import_timm(
    tensors: Mapping[str, Any], config: Mapping[str, Any], net: str, where: str, given: ImportOptions
) -> ImportResult:
    """Imports a network in timm's layout with timm's pretrained_cfg (crop_pct = image size / resize)."""
    try:
        size = int(config.get("input_size", (3, 224, 224))[1])
        known = ImportOptions(
            source=f"timm:{net}",
            mean=[float(v) for v in config["mean"]],
            std=[float(v) for v in config["std"]],
            image_size=size,
            eval_resize=int(size / config.get("crop_pct", 0.875)),
            interpolation=config.get("interpolation", "bilinear"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelFileError(
            f"{where}: its preprocessing configuration is not timm's ({type(error).__name__}: {error}); download the weights "
            f"and give it yourself: resnetlab import FILE --source timm:{net} --mean … --std …"
        ) from error
    if names := config.get("label_names"):
        class_names = imagenet.imagenet_class_names()
        known = replace(known, classes=tuple(class_names.get(str(name), str(name)) for name in names))
    return import_state_dict(parse_state_dict(tensors, where), given.merge_over(known), where)


def _download_hf(rest: str, given: ImportOptions) -> ImportResult:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)  # of the hub library's HTTP client

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(rest, file))
        except EntryNotFoundError:
            return None

    try:
        return _import_repository(fetch, f"hf:{rest}", given)
    except HFValidationError as error:
        raise UsageError(f"hf:{rest} is not a repository name; for example hf:timm/resnet50.a1_in1k") from error
    except failures as error:
        raise OSError(str(error)) from error


@standard_torch_state()
def import_folder(folder: Path, given: ImportOptions) -> ImportResult:
    """Imports the model of a folder as transformers' or timm's `save_pretrained` writes it, like one of the hub.

    Raises as `import_weights`, and ModelFileError if it holds none.
    """
    return _import_repository(lambda name: file if (file := folder / name).is_file() else None, str(folder), given)


def _import_repository(fetch: Callable[[str], Path | None], where: str, given: ImportOptions) -> ImportResult:
    """Imports weights with the config.json, and preprocessor_config.json, beside them; `fetch` gives a file, or None."""
    file = fetch("model.safetensors") or fetch("pytorch_model.bin")
    if file is None:
        raise ModelFileError(f"{where} has neither model.safetensors nor pytorch_model.bin; name a file of weights.")
    if file.suffix == ".safetensors":
        try:
            model = load_trained_model(file)
        except ModelFileError as error:
            if "made by other software" not in str(error):
                raise
        else:
            given.reject(list(given.given_values), f"{where} is a model file, which needs no options")
            return model, []
    config = _read_config(fetch, "config.json", where)
    if config.get("model_type") == "resnet":
        processor = _read_config(fetch, "preprocessor_config.json", where)
        return _import_transformers(read_state_dict(file), config, processor, where, given)
    try:
        architecture, pretrained_cfg = str(config["architecture"]), dict(config["pretrained_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{where} has no config.json of timm's or of transformers' ResNets; use a repository of theirs."
        ) from error
    _check_supported(architecture, "timm")
    names = {"label_names": config["label_names"]} if config.get("label_names") else {}
    return _import_timm(read_state_dict(file).tensors, pretrained_cfg | names, architecture, where, given)


def _read_config(fetch: Callable[[str], Path | None], name: str, where: str) -> dict[str, Any]:
    if (file := fetch(name)) is None:
        raise ModelFileError(f"{where} has no {name}; name the file of weights and give the values yourself.")
    try:
        config = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{where}: {name} cannot be read ({error}); download it again.") from error
    return config if isinstance(config, dict) else {}


def _import_transformers(
    state: StateDictFile, config: Mapping[str, Any], processor: Mapping[str, Any], where: str, given: ImportOptions
) -> ImportResult:
    """Imports one of transformers' ResNets with its config.json and preprocessor_config.json.

    Its processors resize the shorter side to size / crop_pct below 384 pixels; `resample` is Pillow's number.
    """
    try:
        if config.get("embedding_size", 64) != 64 or config.get("hidden_act", "relu") != "relu":
            raise ValueError("another stem or activation than the papers'")
        if config.get("downsample_in_first_stage", False):
            raise ValueError("a stride in the first stage, unlike the papers'")
        size = processor.get("crop_size", processor.get("size", 224))
        side = int(size if isinstance(size, int) else size.get("shortest_edge", size.get("height", 224)))
        resize = (
            processor.get("size", side) if "crop_size" in processor else int(side / processor.get("crop_pct", 0.875))
        )
        shorter = int(resize if isinstance(resize, int) else resize.get("shortest_edge", side))
        names = config.get("id2label") or {}
        classes = tuple(str(names[str(i)]) for i in range(len(names)))
        known = ImportOptions(
            source="transformers",
            mean=[float(v) for v in processor.get("image_mean", IMAGENET_MEAN)],
            std=[float(v) for v in processor.get("image_std", IMAGENET_STD)],
            image_size=side,
            eval_resize=max(shorter, side),
            interpolation={2: "bilinear", 3: "bicubic"}[processor.get("resample", 2)],
            classes=_use_imagenet_names(classes) or None,
            changes={"stride_in": "first" if config.get("downsample_in_bottleneck") else "3x3"},
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelFileError(
            f"{where}: its configuration is not that of a residual network of the papers ({type(error).__name__}: {error}); "
            "download the weights and give the values yourself: resnetlab import FILE --source transformers --mean … --std …"
        ) from error
    return import_state_dict(state, given.merge_over(known), where)


def _use_imagenet_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Our names of ImageNet's classes in place of its synonym lists, such as "tench, Tinca tinca"; other names unchanged.

    Data name their classes by our names, and classes are matched by name.
    """
    ours = tuple(imagenet.imagenet_class_names().values())
    same = sum(name.split(",")[0] == own for name, own in zip(names, ours, strict=False))
    return ours if len(names) == len(ours) and same > 0.9 * len(ours) else names


def _check_supported(net: str, publisher: str) -> None:
    """Raises UsageError for a network that ours does not reproduce."""
    if net not in SUPPORTED[publisher]:
        raise UsageError(
            f"{publisher}'s {net} is not one of the papers' networks; use one of {', '.join(SUPPORTED[publisher])}."
        )
