"""`resnetlab push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from resnetlab.errors import UsageError


def push(
    model: Path,
    to: str,
    /,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
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
    """
    from resnetlab.inference import hub
    from resnetlab.inference.download import find_model
    from resnetlab.models.model_file import load_trained_model
    from resnetlab.run_folder import check_output_file

    trained = load_trained_model(Path(find_model(model)))
    if to.startswith("hf:"):
        print(hub.push_to_hub(trained, to.removeprefix("hf:"), private))
        return
    if private:
        raise UsageError("--private is for the hub: give hf:OWNER/NAME.")
    check_output_file(Path(to) / "model.safetensors", [model], "the folder")
    hub.save_pretrained(trained, Path(to))
    print(Path(to) / "README.md")
