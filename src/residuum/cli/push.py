"""`residuum push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from residuum.errors import UsageError


def push(
    model: Path,
    to: str,
    /,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Upload a model file, with a card written from its metadata, to the Hugging Face hub or into a folder.

    Example: `residuum push runs/photos/model.safetensors hf:me/flowers`

    It is pulled by that name wherever a model file is named: `residuum predict hf:me/flowers picture.jpg`. Needs the extra
    hub: pip install 'residuum[hub]'. A folder needs nothing.

    Parameters
    ----------
    model
        A model file.
    to
        hf:OWNER/NAME, or a folder to look at before.
    private
        Make a new repository private.
    """
    from residuum.models.bundle import load_bundle
    from residuum.use import hub

    bundle = load_bundle(model)
    if to.startswith("hf:"):
        print(hub.push(bundle, to.removeprefix("hf:"), private))
        return
    if private:
        raise UsageError("--private is for the hub: give hf:OWNER/NAME.")
    hub.save_pretrained(bundle, Path(to))
    print(Path(to) / "README.md")
