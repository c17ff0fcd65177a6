"""`resnetlab import` and `resnetlab export`: weights from and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from resnetlab.cli import console
from resnetlab.cli.options import DataDir, Json, ModelName, Settings
from resnetlab.errors import UsageError
from resnetlab.formatting import format_count


def import_(
    file: str,
    /,
    *,
    out: Path = Path("model.safetensors"),
    source: str | None = None,
    classes: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    mean_file: Path | None = None,
    image_size: int | None = None,
    eval_resize: int | None = None,
    interpolation: str | None = None,
    channel_order: str = "rgb",
    set_: Settings = (),
    key: str | None = None,
    json: Json = False,
) -> None:
    """Convert published weights to a model file; what the weights do not contain must be given or known from their source.

    Example: `resnetlab import resnet20.th --classes cifar10 --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 --out model.safetensors`

    Parameters
    ----------
    file
        A weight file (.pth, .pt, .th, .safetensors, .npz, or the .index.json of shards), a folder that transformers or timm
        saved, or a published name to download: torchvision:resnet50.IMAGENET1K_V2, timm:resnet50.a1_in1k,
        hf:OWNER/REPOSITORY. The options then replace the publisher's values.
    out
        The model file to write.
    source
        The publisher: torchvision, timm with the network's name (timm:resnet50), mmpretrain, transformers, caffe (the paper's
        authors) or akamaster.
    classes
        Names in the order of the outputs: a data set (digits, cifar10, cifar100, imagenet), the folder of class folders that
        was trained on, a file, one per line, or a list.
    mean
        Mean of the images, in units of [0, 1], one number per channel, in the order of --channel-order.
    std
        Standard deviation, likewise.
    mean_file
        A mean for every pixel instead of --mean, as the papers subtract on CIFAR: an array in .npy, height x width x channels
        or channels first, or Caffe's .binaryproto.
    image_size
        Side of the input in pixels; 32 or 224 by default.
    eval_resize
        Shorter side before the centre crop, in pixels; by default the same (CIFAR nets) or 256 for 224.
    interpolation
        Of that resize: bilinear or bicubic.
    channel_order
        Channel order that the weights were trained on: rgb or bgr. Weights, --mean and --std are converted to RGB.
    set_
        One value of the network's specification, key=value, such as stride_in=3x3 or zero_pad=centre.
    key
        Which state dict to read from a file with several, such as model_ema, or which of several networks, such as teacher.
    """
    from resnetlab.inference.download import download_model, find_trained, get_scheme, import_folder
    from resnetlab.inference.import_model import ImportOptions, import_weights
    from resnetlab.run_folder import check_output_file

    check_output_file(out, [file])
    given = ImportOptions(
        source=source,
        classes=classes,
        mean=None if mean is None else console.parse_numbers("--mean", mean, "0.49,0.48,0.45"),
        std=None if std is None else console.parse_numbers("--std", std, "0.23,0.22,0.23"),
        mean_file=mean_file,
        image_size=image_size,
        eval_resize=eval_resize,
        interpolation=interpolation,
        channel_order=channel_order,
        changes=console.parse_pairs(set_),
        key=key,
    )
    if get_scheme(file):
        model, notes = download_model(file, given)
    else:
        path = find_trained(file) or Path(file)
        model, notes = (import_folder if path.is_dir() else import_weights)(path, given)
    for note in notes:
        console.log(note)
    model.save(out)
    document = {
        "model": str(out),
        "specification": model.spec.to_json(),
        "classes": list(model.classes),
        "preprocessing": model.preprocessing.to_json(),
        "notes": notes,
    }
    if json:
        return console.print_json(document)
    for name, value in model.spec.to_json().items():
        console.write_line(f"{name:<18} {value}")
    preprocessing = model.preprocessing.to_json()
    for name in ("mean", "std"):
        numbers = preprocessing[name]
        preprocessing[name] = "per pixel" if numbers is None else ",".join(f"{value:g}" for value in numbers)
    console.write_line(f"{'preprocessing':<18} {', '.join(f'{name} {value}' for name, value in preprocessing.items())}")
    console.write_line(f"{'model':<18} {out}")
    return None


def export(
    model: ModelName,
    /,
    *,
    to: str | None = None,
    out: Path | None = None,
    precision: str = "fp32",
    data: str | None = None,
    images: Path | None = None,
    data_dir: DataDir = Path("data"),
    json: Json = False,
) -> None:
    """Write a model for other programs: ONNX, torch.export or OpenVINO, checked on real images; or torchvision's weights.

    Example: `resnetlab export runs/digits/model.safetensors --to onnx --out digits.onnx`

    The file takes uint8 images (batch, height, width, channels) of any size and returns calibrated scores; see FILE.json.
    It is compared with the network on real images, in batches of 1 and 7; FILE.parity.json has the result. Beyond the bound
    (fp32: a score differs by 0.001, or another best class; int8: by 0.3, or another best class on more than 10 %) no file is
    written, and the exit code is 1.

    Parameters
    ----------
    to
        onnx, torch (.pt2), aotinductor (.pt2: compiled for this machine's GPU, or its CPU) or openvino; or torchvision: a
        state_dict under its names, which torchvision and timm load. By
        default what the ending of --out says.
    out
        The file to write; by default the model's name with .onnx, .pt2, .xml or .pth (also .safetensors).
    precision
        fp32 or int8 (onnx, openvino). int8 is calibrated on other images than those of the check.
    data
        A data set: its evaluated split is for the check, its training split for int8; by default images in the model file.
    images
        A folder of images for the same: every second one is for int8, the others for the check. A detector or segmenter is
        checked on all of them.
    """
    from resnetlab.inference.download import find_model, find_trained, get_scheme, load_or_download
    from resnetlab.inference.formats import FORMATS, find_format, get_format
    from resnetlab.models.annotated_model import TASK_NOUNS, read_task

    if to is None and out is None:
        raise UsageError(
            f"export needs --to {', '.join(FORMATS)}, or --out FILE with the ending of one, such as .onnx."
        )
    published = get_scheme(model) or find_trained(model)
    stem = Path(model.split(":")[1].replace("/", "-")) if published else Path(find_model(model)).with_suffix("")
    model = find_model(model)
    if (task := read_task(Path(model))) != "classify":
        from resnetlab.cli.annotated import export_annotated

        if to not in (None, "onnx"):
            raise UsageError(f"{TASK_NOUNS[task]} is exported to onnx only, not to {to}.")
        console.refuse_options(TASK_NOUNS[task], {"precision": precision != "fp32", "data": data is not None})
        return export_annotated(Path(model), *([str(images)] if images else []), out=out, json=json)
    if data is not None and images is not None:
        raise UsageError("give --data or --images, not both.")
    from resnetlab.inference.export import check_export_request, export_model, export_weights
    from resnetlab.inference.export_images import load_export_images
    from resnetlab.run_folder import check_output_file

    to = to or find_format(cast(Path, out).suffix)
    format = get_format(to)
    out = out or stem.with_name(stem.name + format.suffixes[0])
    if format.read is None and (json or precision != "fp32" or data is not None or images is not None):
        raise UsageError(
            f"--to {to} takes only --out; --precision, --data, --images and --json are for the other formats."
        )
    check_export_request(to, precision, out)
    check_output_file(out, [model])
    trained = load_or_download(model)
    if trained.reference_images is not None:
        console.log(f"{trained.describe_images()[:-1]}; {out} holds none.")
    if format.read is None:
        for note in export_weights(trained, to, out):
            console.log(f"resnetlab: note: {note}")
        return console.write_line(str(out))
    check_images, calibration_images = load_export_images(trained, data, images, data_dir)
    parity = export_model(trained, to, precision, out, check_images, calibration_images)
    if json:
        return console.print_json({"model": model, "file": str(out), "to": to, **parity.to_json()})
    console.write_line(
        f"{out}: {parity.agreement}, on {format_count(parity.n, 'image')}, with the network in torch fp32"
    )
    if parity.seconds and (busy := console.describe_busy()):
        console.log(f"{busy}: the times below are not those of an idle machine")
    for size, seconds in parity.seconds.items():
        eager = parity.torch_seconds[size]
        ratio = eager / seconds
        console.write_line(
            f"batch {size}: {1e3 * seconds:.2f} ms; torch fp32 {1e3 * eager:.2f} ms, {ratio:.2f} times as long"
        )
    return None
