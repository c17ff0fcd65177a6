"""Models by the name their publisher gives them, where there is a network.

torchvision:resnet50.IMAGENET1K_V2     torchvision's weights
timm:resnet50.a1_in1k                  timm's
hf:OWNER/REPOSITORY                    a repository on the Hugging Face hub: a model file of ours, or timm's layout
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

from residuum.data import imagenet
from residuum.errors import ModelFileError, UsageError, unknown
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.importers import PLAIN
from residuum.models.states import named, read_state, refusal
from residuum.use.importing import Given, assembled

SCHEMES = ("torchvision", "timm", "hf")
FAILURES = (OSError, EOFError, HTTPException, RuntimeError)  # of torch's and timm's downloads
Found = tuple[Bundle, list[str]]


def scheme_of(name: str) -> str | None:
    """The publisher that a name begins with, or None where it is a path."""
    head, colon, _ = name.partition(":")
    return head if colon and head in SCHEMES else None


def model_of(name: str | Path) -> Bundle:
    """The model of a file or of a publisher's name; raises as `download` and `models.bundle.load_bundle` do."""
    return download(str(name))[0] if scheme_of(str(name)) else load_bundle(Path(name))


def download(name: str, given: Given | None = None) -> Found:
    """The model of a publisher's name, and sentences on what was found, known and assumed.

    Args:
        given: what stands in the place of what the publisher says.

    Raises:
        ModelFileError: there is no network, or what was downloaded is not a residual network that can be built.
        UsageError: the publisher has no such model, or the package that fetches it is not installed.
    """
    scheme, _, rest = name.partition(":")
    given = given or Given()
    given.refuse(("key", "source", "input"), f"{name} says itself which weights it means and what they see")
    try:
        with redirect_stdout(sys.stderr):  # torch prints there what it downloads
            bundle, notes = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}[scheme](rest, given)
    except ImportError as error:
        raise UsageError(
            f"{name} needs the package {error.name}; install it with: pip install 'residuum[hub]'"
        ) from error
    except pickle.UnpicklingError as error:
        raise refusal(f"what was downloaded for {name} (or lies in torch's cache)", error) from error
    except FAILURES as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFileError(
            f"{name} could not be downloaded ({said}); where there is no network, download the weights elsewhere and use: "
            "residuum import FILE"
        ) from error
    if "notes" in bundle.recipe:
        bundle = replace(bundle, recipe={"source": name, "notes": notes})
    return bundle, [f"downloaded: {name}", *notes]


def _torchvision(rest: str, given: Given) -> Found:
    from torchvision.models import get_model_weights

    net, _, which = rest.partition(".")
    _only(net, "torchvision")
    weights = get_model_weights(net)
    which = which or "DEFAULT"
    if which not in weights.__members__:
        raise unknown(f"weights of torchvision's {net}", which, weights.__members__)
    chosen: Any = weights[which]
    prepared = chosen.transforms()
    known = Given(
        source="torchvision",
        mean=prepared.mean,
        std=prepared.std,
        size=prepared.crop_size[0],
        resize=prepared.resize_size[0],
        interpolation=prepared.interpolation.value,
        classes=tuple(imagenet.names().values()),
    )
    tensors = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True)
    bundle, notes = assembled(named(tensors, rest), given.over(known), rest)
    published = chosen.meta.get("_metrics", {}).get("ImageNet-1K", {})
    errors = {f"top{k}_error": round(1 - published[f"acc@{k}"] / 100, 5) for k in (1, 5) if f"acc@{k}" in published}
    if errors and not given.values:  # they were measured with the publisher's own preprocessing
        bundle.metrics = {"published": {"protocol": "1crop", "split": "val", "data": "imagenet", **errors}}
    return bundle, notes


def _timm(rest: str, given: Given) -> Found:
    import timm

    _only(rest.split(".")[0], "timm")
    try:
        net = timm.create_model(rest, pretrained=True)
    except RuntimeError as error:
        if not any(part in str(error) for part in ("Unknown model", "Invalid pretrained tag", "No pretrained weights")):
            raise
        raise UsageError(f"timm has no {rest!r}; for example timm:resnet50.a1_in1k") from error
    about: Any = net.pretrained_cfg
    return _of_timm(net.state_dict(), about, rest, rest, given)


def _of_timm(tensors: Mapping[str, Any], about: Mapping[str, Any], net: str, where: str, given: Given) -> Found:
    """A network in timm's layout with timm's description of how its pictures are prepared (crop_pct: S = crop_pct * R)."""
    try:
        size = int(about.get("input_size", (3, 224, 224))[1])
        known = Given(
            source=f"timm:{net}",
            mean=[float(v) for v in about["mean"]],
            std=[float(v) for v in about["std"]],
            size=size,
            resize=int(size / about.get("crop_pct", 0.875)),
            interpolation=about.get("interpolation", "bilinear"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelFileError(
            f"{where}: its description of how pictures are prepared is not timm's ({type(error).__name__}: {error}); download "
            f"the weights and give it yourself: residuum import FILE --source timm:{net} --mean … --std …"
        ) from error
    if names := about.get("label_names"):
        numbers = imagenet.names()
        known = replace(known, classes=tuple(numbers.get(str(name), str(name)) for name in names))
    return assembled(named(tensors, where), given.over(known), where)


def _hugging_face(rest: str, given: Given) -> Found:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    clients = cast(
        "tuple[type[Exception], ...]", HfHubHTTPError.__bases__
    )  # of whichever HTTP client the hub's library uses
    try:
        file = Path(hf_hub_download(rest, "model.safetensors"))
        try:
            bundle = load_bundle(file)
        except ModelFileError as error:
            if "made by other software" not in str(error):
                raise
        else:
            given.refuse(list(given.values), f"hf:{rest} is a model file, which says all of itself")
            return bundle, []
        description = Path(hf_hub_download(rest, "config.json"))
    except HFValidationError as error:
        raise UsageError(f"hf:{rest} is no name of a repository; for example hf:timm/resnet50.a1_in1k") from error
    except clients as error:
        raise OSError(str(error)) from error
    try:
        config = json.loads(description.read_text())
        architecture, about = str(config["architecture"]), dict(config["pretrained_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"hf:{rest} has no config.json as timm writes it; take a repository of timm's.") from error
    _only(architecture, "timm")
    names = {"label_names": config["label_names"]} if config.get("label_names") else {}
    return _of_timm(read_state(file).tensors, about | names, architecture, rest, given)


def _only(net: str, publisher: str) -> None:
    """Raises UsageError for a network that is none of those that ours compute."""
    if net not in PLAIN[publisher]:
        raise UsageError(
            f"{publisher}'s {net} is none of the networks of the papers; take one of {', '.join(PLAIN[publisher])}."
        )
