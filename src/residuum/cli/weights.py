"""`residuum import` and `residuum export`: weights from and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import UsageError


def import_(
    file: str,
    /,
    *,
    out: Path = Path("model.safetensors"),
    source: str | None = None,
    classes: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    input: str = "rgb",
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = (),
    key: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Turn weights published elsewhere into a model file; what they do not tell must be given or known from their source.

    Example: `residuum import resnet20.th --classes cifar10 --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out model.safetensors`

    Parameters
    ----------
    file
        A file of weights (.pth, .pt, .th, .safetensors, .npz), or torchvision:resnet50.IMAGENET1K_V2, timm:resnet50.a1_in1k,
        hf:OWNER/REPOSITORY, which are downloaded.
    out
        The model file to write.
    source
        Who published the file: torchvision, timm, caffe (the paper's own) or akamaster.
    classes
        Names in the order of the outputs: a data set (digits, cifar10, cifar100, imagenet), a file with one a line, or a list.
    mean
        Subtracted from pictures, in units of [0, 1], one number a channel.
    std
        Divided by, likewise.
    size
        Side of the input in pixels; 32 or 224 by default.
    resize
        Shorter side before the centre is cut, in pixels; by default the same (CIFAR nets) or 256 for 224.
    interpolation
        Of that resize: bilinear or bicubic.
    input
        Order of the channels that the weights were trained on: rgb or bgr.
    set_
        Gives one value of the network's specification, key=value, such as stride_site=3x3 or zeros=centre.
    key
        Which set of weights, where the file holds several, such as model_ema.
    json
        Print specification, classes and preprocessing as one JSON document.
    """
    from residuum.use.download import download, scheme_of
    from residuum.use.importing import Given, import_weights

    if scheme_of(file):
        bundle, notes = download(file), [f"downloaded: {file}"]
    else:
        given = Given(
            source=source,
            classes=classes,
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            size=size,
            resize=resize,
            interpolation=interpolation,
            input=input,
            changes=console.pairs(set_),
            key=key,
        )
        bundle, notes = import_weights(Path(file), given)
    for note in notes:
        console.say(note)
    bundle.save(out)
    about = {
        "model": str(out),
        "specification": bundle.spec.to_json(),
        "classes": list(bundle.classes),
        "preprocessing": bundle.preprocessing.to_json(),
        "notes": notes,
    }
    if json:
        return console.print_json(about)
    for name, value in bundle.spec.to_json().items():
        print(f"{name:<18} {value}")
    prepared = bundle.preprocessing.to_json()
    print(f"{'preprocessing':<18} {', '.join(f'{name} {value}' for name, value in prepared.items())}")
    print(f"{'model':<18} {out}")
    return None


def _numbers(key: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{key} takes numbers with commas between, such as 0.49,0.48,0.45, not {text!r}.") from None


def export(model: Path, /, *, to: str, out: Path | None = None) -> None:
    """Write a model's weights as torchvision and timm load them.

    Example: `residuum export runs/digits/model.safetensors --to torchvision --out digits.pth`

    Parameters
    ----------
    model
        A model file.
    to
        torchvision: a state_dict under its names. Classes and preprocessing stay beside it, for `residuum import`.
    out
        The file to write, .pth or .safetensors; by default the model's name with .pth.
    """
    from residuum.models.bundle import load_bundle
    from residuum.use.export import export as write

    out = out or model.with_suffix(".pth")
    for sentence in write(load_bundle(model), to, out):
        console.say(f"residuum: note: {sentence}")
    print(out)
