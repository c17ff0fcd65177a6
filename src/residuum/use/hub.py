"""Models on the Hugging Face hub: a folder with the model file and a card written from its metadata, and its upload.

What is pushed is pulled as `hf:OWNER/NAME`, wherever a model file is named (use/download.py).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, cast

from residuum.errors import ModelFileError, UsageError
from residuum.models.accounting import parameters
from residuum.models.bundle import Bundle, load_bundle
from residuum.records import write_atomically, writing_error

CLASSES = 40  # named in the card at most


def save_pretrained(bundle: Bundle, folder: Path, name: str = "OWNER/NAME") -> None:
    """Writes `model.safetensors` and its card, README.md, into a folder.

    Args:
        name: the repository that the card says it is pulled from.

    Raises RunError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(folder, error) from error
    bundle.save(folder / "model.safetensors")
    write_atomically(folder / "README.md", card(bundle, name))


def from_pretrained(folder: Path) -> Bundle:
    """The model of a folder that `save_pretrained` wrote; raises ModelFileError as `load_bundle` does."""
    return load_bundle(folder / "model.safetensors")


def push(bundle: Bundle, name: str, private: bool = False) -> str:
    """Uploads a model and its card to a repository, which is made where it is not there; its address.

    The token is the one of `hf auth login`, or HF_TOKEN in the environment.

    Raises:
        UsageError: the name is none, or huggingface-hub is not installed.
        ModelFileError: there is no network, no permission, or the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"{name!r} is no name of a repository; for example hf:me/flowers.")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ImportError as error:
        raise UsageError(f"push needs {error.name}; install it with: pip install 'residuum[hub]'") from error
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError))  # of whichever HTTP client
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(bundle, Path(folder), name)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of residuum")
    except HFValidationError as error:
        raise UsageError(f"{name!r} is no name of a repository; for example hf:me/flowers.") from error
    except LocalTokenNotFoundError as error:
        raise ModelFileError("the hub needs to know who you are: hf auth login, or HF_TOKEN.") from error
    except failures as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFileError(
            f"{name} could not be pushed ({said}); look at the network and `hf auth whoami`."
        ) from error
    return address


def card(bundle: Bundle, name: str) -> str:
    """The model card as Markdown; all of it comes from the model file's metadata."""
    recipe, data = bundle.recipe, str(bundle.data.get("name", "")).rstrip("/").rpartition("/")[2]
    net = str(recipe.get("net", "residual network"))
    title = f"{net} on {data}" if data else net
    spec, preparing = bundle.spec, bundle.preprocessing
    h, w = preparing.size
    named = ", ".join(_plain(each) for each in bundle.classes[:CLASSES])
    more = ", …" if len(bundle.classes) > CLASSES else ""
    calibrated = (
        f"Scores are calibrated: logits are divided by {bundle.temperature:.4g}, fitted on {_plain(bundle.calibration['n'])} "
        f"pictures of {_plain(bundle.calibration['data'])} ({_plain(bundle.calibration['split'])})."
        if bundle.calibration
        else "Scores are not calibrated."
    )
    about = (
        f"A residual network of {parameters(bundle.net):,} parameters: {spec.block} blocks {'-'.join(map(str, spec.depths))}, "
        f"order {spec.order}, shortcut {spec.shortcut}, for pictures of {h}x{w} pixels and {preparing.channels} channels."
    )
    lines = [
        "---",
        "library_name: residuum",
        "pipeline_tag: image-classification",
        "tags:\n- resnet\n- image-classification",
        "---",
        "",
        f"# {_plain(title)}",
        "",
        about,
        "",
        f"{len(bundle.classes):,} classes: {named}{more}",
        "",
        "## Use",
        "",
        "```python",
        "import residuum",
        "",
        f'model = residuum.load("hf:{name}")',
        'print(model.predict("picture.jpg", top=3))',
        "```",
        "",
        "## How good it is",
        "",
        *_figures(bundle.metrics),
        "",
        calibrated,
        "",
        "## How it was trained",
        "",
        *(f"- {_plain(key)}: {_plain(value)}" for key, value in recipe.items()),
        "",
        f"Made with {', '.join(f'{_plain(k)} {_plain(v)}' for k, v in bundle.versions.items()) or 'residuum'}.",
        "",
    ]
    return "\n".join(lines).encode(errors="replace").decode()


def _figures(metrics: Any) -> list[str]:
    rows = [
        f"| {_plain(split)} | {values['n']:,} | {100 * values['top1_error']:.2f} % |"
        for split, values in metrics.items()
        if {"n", "top1_error"} <= set(values)
    ]
    if not rows:
        return ["No figure was measured with this program."]
    return ["| split | pictures | top-1 error |", "|---|---|---|", *rows]


def _plain(value: Any) -> str:
    """A value of the metadata as one line of text, which Markdown leaves as it is."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
