"""`resnetlab push` and `resnetlab strip`: models for other people."""

from __future__ import annotations

from pathlib import Path

from resnetlab.cli import console
from resnetlab.cli.options import Flag
from resnetlab.errors import UsageError


def push(
    model: Path,
    to: str,
    /,
    *,
    private: Flag = False,
    with_images: Flag = False,
) -> None:
    """Upload a model file, with a card written from its metadata, to the Hugging Face hub or into a folder.

    Example: `resnetlab push runs/photos/model.safetensors hf:me/flowers`

    The name can then be used like a model file: `resnetlab predict hf:me/flowers image.jpg`. Uploading needs the extra `hub`.

    Parameters
    ----------
    model
        A model file.
    to
        hf:OWNER/NAME, or a folder to review first.
    private
        Create a private repository.
    with_images
        Share the images of the data that the model file holds, to check other backends on and to calibrate int8 on. By default
        they are left out.
    """
    from resnetlab.inference import hub
    from resnetlab.inference.download import find_model
    from resnetlab.models.model_file import load_trained_model
    from resnetlab.run_folder import check_output_file, check_output_folder

    trained = load_trained_model(Path(find_model(model)))
    if to.startswith("hf:"):
        console.write_line(hub.push_to_hub(trained, to.removeprefix("hf:"), private, with_images))
        return
    if private:
        raise UsageError("--private is for the hub: give hf:OWNER/NAME.")
    check_output_folder(Path(to))
    if Path(to).is_dir():
        check_output_file(Path(to) / "model.safetensors", [model], "the folder")
    hub.save_pretrained(trained, Path(to), with_images=with_images)
    console.write_line(str(Path(to) / "README.md"))


def strip(model: Path, /, *, out: Path | None = None) -> None:
    """Write a model file without the images of the data in it, to give away.

    Example: `resnetlab strip runs/photos/model.safetensors --out photos.safetensors`

    The weights, classes, preprocessing and figures stay, and so do fingerprints (hashes) of the images, by which `evaluate`
    notices images that were trained on.

    Parameters
    ----------
    model
        A model file.
    out
        The file to write; by default NAME.stripped.safetensors beside the model.
    """
    from resnetlab.inference.download import find_model, find_trained
    from resnetlab.models.annotated_model import TASK_NOUNS, read_task
    from resnetlab.models.model_file import load_trained_model
    from resnetlab.run_folder import check_output_file

    if find_trained(str(model)):
        raise UsageError(f"{model} comes with the package and holds no images; push it, or evaluate it, as it is.")
    model = Path(find_model(model))
    if (task := read_task(model)) != "classify":
        raise UsageError(f"{TASK_NOUNS[task]} holds no images; {model} can be given away as it is.")
    out = out or model.with_suffix(".stripped.safetensors")
    check_output_file(out, [model])
    trained = load_trained_model(model)
    console.log(f"{trained.describe_images()[:-1]}{'; they are left out' if trained.reference_images else ''}.")
    trained.without_images().save(out)
    console.write_line(str(out))
