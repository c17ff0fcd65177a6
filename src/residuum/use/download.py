"""Models by the name their publisher gives them, where there is a network.

torchvision:resnet50.IMAGENET1K_V2     torchvision's weights
timm:resnet50.a1_in1k                  timm's
hf:OWNER/REPOSITORY                    a repository on the Hugging Face hub: a model file of ours, or timm's layout
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from residuum.errors import ModelFileError, UsageError, unknown
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.states import named, read_state
from residuum.use.classes import unique
from residuum.use.importing import Given, assembled

SCHEMES = ("torchvision", "timm", "hf")


def scheme_of(name: str) -> str | None:
    """The publisher that a name begins with, or None where it is a path."""
    head, colon, _ = name.partition(":")
    return head if colon and head in SCHEMES else None


def download(name: str) -> Bundle:
    """The model of a publisher's name.

    Raises:
        ModelFileError: there is no network, or what was downloaded is not a residual network that can be built.
        UsageError: the publisher has no such model, or the package that fetches it is not installed.
    """
    scheme, _, rest = name.partition(":")
    fetch: Mapping[str, Callable[[str], Bundle]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}
    try:
        return fetch[scheme](rest)
    except (ModelFileError, UsageError):
        raise
    except ImportError as error:
        raise UsageError(
            f"{name} needs the package {error.name}; install it with: pip install 'residuum[hub]'"
        ) from error
    except Exception as error:  # every library has its own tree of network errors
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFileError(
            f"{name} could not be downloaded ({said}); where there is no network, download the weights elsewhere and use: "
            "residuum import FILE"
        ) from error


def _torchvision(rest: str) -> Bundle:
    from torchvision.models import get_model_weights

    net, _, which = rest.partition(".")
    try:
        weights = get_model_weights(net)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"torchvision has no network {net!r}; for example torchvision:resnet50.IMAGENET1K_V2"
        ) from error
    which = which or "DEFAULT"
    if which not in weights.__members__:
        raise unknown(f"weights of torchvision's {net}", which, weights.__members__)
    chosen: Any = weights[which]
    _only_resnets(net, "torchvision")
    prepared = chosen.transforms()
    given = Given(
        source="torchvision",
        mean=prepared.mean,
        std=prepared.std,
        size=prepared.crop_size[0],
        resize=prepared.resize_size[0],
        interpolation=prepared.interpolation.value,
    )
    bundle, _ = assembled(named(chosen.get_state_dict(progress=False), rest), given)
    published = chosen.meta.get("_metrics", {}).get("ImageNet-1K", {})
    errors = {f"top{k}_error": round(1 - published[f"acc@{k}"] / 100, 5) for k in (1, 5) if f"acc@{k}" in published}
    metrics = {"published": {"protocol": "1crop", "split": "val", "data": "imagenet", **errors}} if errors else {}
    return _with(
        bundle, classes=unique(chosen.meta["categories"]), metrics=metrics, recipe={"source": f"torchvision:{rest}"}
    )


def _timm(rest: str) -> Bundle:
    import timm

    _only_resnets(rest.split(".")[0], "timm")
    try:
        net = timm.create_model(rest, pretrained=True)
    except RuntimeError as error:
        if (
            "Unknown model" in str(error)
            or "Invalid pretrained tag" in str(error)
            or "No pretrained weights" in str(error)
        ):
            raise UsageError(f"timm has no {rest!r}; for example timm:resnet50.a1_in1k") from error
        raise
    about: Any = net.pretrained_cfg
    return _of_timm(net.state_dict(), about, rest, f"timm:{rest}")


def _of_timm(tensors: Mapping[str, Any], about: Mapping[str, Any], where: str, source: str) -> Bundle:
    """A network in timm's layout with timm's description of how its pictures are prepared (crop_pct: S = crop_pct * R)."""
    size = int(about.get("input_size", (3, 224, 224))[1])
    given = Given(
        source="timm",
        mean=about["mean"],
        std=about["std"],
        size=size,
        resize=int(size / about.get("crop_pct", 0.875)),
        interpolation=about.get("interpolation", "bilinear"),
    )
    if names := about.get("label_names"):
        given = replace(given, classes=",".join(names))
    bundle, _ = assembled(named(tensors, where), given)
    return _with(bundle, recipe={"source": source})


def _hugging_face(rest: str) -> Bundle:
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(rest, "model.safetensors"))
    try:
        return load_bundle(file)
    except ModelFileError as error:
        if "made by other software" not in str(error):
            raise
    config = json.loads(Path(hf_hub_download(rest, "config.json")).read_text())
    _only_resnets(str(config.get("architecture")), f"hf:{rest}")
    state = read_state(file)
    return _of_timm(state.tensors, config["pretrained_cfg"], rest, f"hf:{rest}")


def _only_resnets(net: str, where: str) -> None:
    if not net.startswith("resnet"):
        raise UsageError(f"{where}: {net} is no residual network of the papers; take one of resnet18 … resnet152.")


def _with(bundle: Bundle, **values: Any) -> Bundle:
    return replace(bundle, **values)
