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
        hf:OWNER/REPOSITORY, which are downloaded; what is given then stands in the place of what the publisher says.
    out
        The model file to write.
    source
        Who published the file: torchvision, timm with the network's name (timm:resnet50), caffe (the paper's own) or akamaster.
    classes
        Names in the order of the outputs: a data set (digits, cifar10, cifar100, imagenet), a file with one a line, or a list.
    mean
        Subtracted from pictures, in units of [0, 1], one number a channel, in the order that --input names.
    std
        Divided by, likewise.
    size
        Side of the input in pixels; 32 or 224 by default.
    resize
        Shorter side before the centre is cut, in pixels; by default the same (CIFAR nets) or 256 for 224.
    interpolation
        Of that resize: bilinear or bicubic.
    input
        Order of the channels that the weights were trained on: rgb or bgr. Weights, --mean and --std are turned to RGB.
    set_
        Gives one value of the network's specification, key=value, such as stride_site=3x3 or zeros=centre.
    key
        Which set of weights, where the file holds several, such as model_ema.
    json
        Print specification, classes and preprocessing as one JSON document.
    """
    from residuum.use.download import download, scheme_of
    from residuum.use.importing import Given, import_weights

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
    bundle, notes = download(file, given) if scheme_of(file) else import_weights(Path(file), given)
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
    for name in ("mean", "std"):
        prepared[name] = prepared[name] and ",".join(f"{value:g}" for value in prepared[name])
    print(f"{'preprocessing':<18} {', '.join(f'{name} {value}' for name, value in prepared.items())}")
    print(f"{'model':<18} {out}")
    return None


def _numbers(key: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{key} takes numbers with commas between, such as 0.49,0.48,0.45, not {text!r}.") from None


def export(
    model: str,
    /,
    *,
    to: str,
    out: Path | None = None,
    precision: str = "fp32",
    data: str | None = None,
    pictures: Path | None = None,
    data_dir: Path = Path("data"),
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a model for other programs: ONNX, torch.export or OpenVINO, proved on real pictures; or torchvision's weights.

    Example: `residuum export runs/digits/model.safetensors --to onnx --out digits.onnx`

    The file takes uint8 pictures (batch, height, width, channels) of any size and gives calibrated scores; see FILE.json.
    It is compared with the network on real pictures, in batches of 1 and 7; FILE.proof.json says how far they are apart. Beyond
    the bound (fp32: a score 0.001 apart or another best class; int8: 0.3, or another best class on more than 10 %) there is no
    file, and the exit code is 1.

    Parameters
    ----------
    model
        A model file, or a publisher's name such as torchvision:resnet50.IMAGENET1K_V2.
    to
        onnx, torch (.pt2) or openvino; or torchvision: a state_dict under its names, which torchvision and timm load.
    out
        The file to write; by default the model's name with .onnx, .pt2, .xml or .pth (also .safetensors).
    precision
        fp32 or int8 (onnx, openvino). int8 is calibrated on training pictures, never on those of the proof.
    data
        A data set to prove on its judged split and calibrate on its training split; by default pictures in the model file.
    pictures
        A folder of pictures for the same: every second one calibrates, the others prove.
    data_dir
        Where archives of data sets lie.
    json
        Print the proof as one JSON document.
    """
    from residuum.use.download import model_of, scheme_of

    endings = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
    if data is not None and pictures is not None:
        raise UsageError("give --data or --pictures, not both.")
    stem = Path(model.split(":")[1].replace("/", "-")) if scheme_of(model) else Path(model).with_suffix("")
    out = out or stem.with_name(stem.name + endings.get(to, ".pth"))
    if to not in endings:
        from residuum.use.export import export as write_weights

        if json or precision != "fp32" or data is not None or pictures is not None:
            raise UsageError(
                f"--to {to} takes --out alone; --precision, --data, --pictures and --json belong to the others."
            )
        for sentence in write_weights(model_of(model), to, out):
            console.say(f"residuum: note: {sentence}")
        print(out)
        return None
    from residuum.use.exporting import check_request, export_whole
    from residuum.use.pictures import for_export

    check_request(to, precision, out)
    bundle = model_of(model)
    check, training = for_export(bundle, data, pictures, data_dir)
    proof = export_whole(bundle, to, precision, out, check, training)
    if json:
        return console.print_json({"model": model, "file": str(out), "to": to, **proof.to_json()})
    print(f"{out}: {proof.agreement}, of {proof.n} pictures, with the network in torch fp32")
    for size, taken in proof.seconds.items():
        eager = proof.torch_seconds[size]
        print(f"batch {size}: {1e3 * taken:.2f} ms; torch fp32 {1e3 * eager:.2f} ms, {eager / taken:.2f} times as long")
    return None
