"""Uploads a model file to the Hugging Face hub, with a model card written from its metadata.

Wherever a model file is expected, `hf:OWNER/NAME` downloads it (inference/download.py).
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from resnetlab.errors import ModelFileError, RunError, UsageError, first_line, missing_package
from resnetlab.evaluation.multi_label import describe_thresholds
from resnetlab.formatting import format_count, format_percent, format_split, is_number
from resnetlab.models.cost import count_parameters
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OwnNetwork, own_network_error
from resnetlab.run_folder import write_atomically, writing

MAX_CLASSES = 40  # listed in the card
CARD_TEMPLATE = """\
---
library_name: resnetlab
pipeline_tag: image-classification
tags:
- resnet
- image-classification
---

# {title}

A residual network of {parameters} parameters: {spec.block} blocks {depths}, activation order {spec.activation_order}, \
shortcut {spec.shortcut}, for images of {pixels} pixels and {channels}.

{classes}

## Use

```python
import resnetlab

model = resnetlab.load("hf:{name}")
print(model.predict("image.jpg", top=3))
```

## Evaluation

{metrics}

{calibration}

{images}

## Training

{recipe}

Made with {versions}.
"""


def save_pretrained(
    model: TrainedModel, folder: Path, name: str = "OWNER/NAME", card: bool = True, with_images: bool = False
) -> None:
    """Writes `model.safetensors` and its card, README.md, into a folder.

    A README.md that a person wrote, or changed, is kept, with a warning. Images of the data are left out, with a warning.

    Args:
        name: the repository that the card refers to.
        card: whether to write the card.
        with_images: keep the images of the data in the model file.

    Raises RunError if the folder cannot be written, or is a run folder.
    """
    if isinstance(model.net, OwnNetwork):
        raise own_network_error(model.net)
    if (folder / "recipe.toml").exists():
        raise RunError(f"{folder} is a run folder; choose another folder for the model and its card.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if model.reference_images is not None and not with_images:
        warnings.warn(
            f"{model.describe_images()[:-1]}; they are left out, --with-images shares them too.", stacklevel=2
        )
        model = model.without_images()
    model.save(folder / "model.safetensors")
    readme = folder / "README.md"
    if card and readme.exists() and not _is_own_card(readme):
        warnings.warn(f"{readme} was not written by resnetlab and is kept; no card was written.", stacklevel=2)
    elif card:
        write_atomically(readme, _sign_card(make_model_card(model, name)))


def _sign_card(card: str) -> str:
    """The card with its hash, by which the next push sees whether a person has changed it."""
    return f"{card}\n<!-- resnetlab card {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def _is_own_card(readme: Path) -> bool:
    """Whether a README.md is a card as `_sign_card` made it."""
    try:
        text = readme.read_text("utf-8")
    except (OSError, ValueError):
        return False
    return text == _sign_card(text.rpartition("\n<!-- resnetlab card ")[0])


def push_to_hub(model: TrainedModel, name: str, private: bool = False, with_images: bool = False) -> str:
    """Uploads a model and its card to a repository, which is created if necessary; returns its address.

    The token is that of `hf auth login`, or HF_TOKEN in the environment.

    Raises:
        UsageError: the name is invalid, or huggingface-hub is not installed.
        ModelFileError: there is no network, no permission, or the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"{name!r} is not a repository name; for example hf:me/flowers.")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ImportError as error:
        raise missing_package("push", error.name, "hub") from error
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError))  # of the HTTP client
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, Path(folder), name, may_write_card(name), with_images)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of resnetlab")
    except HFValidationError as error:
        raise UsageError(f"{name!r} is not a repository name; for example hf:me/flowers.") from error
    except LocalTokenNotFoundError as error:
        raise ModelFileError("the hub needs a token: run hf auth login, or set HF_TOKEN.") from error
    except failures as error:
        raise ModelFileError(
            f"{name} could not be pushed ({first_line(error)}); check the network and `hf auth whoami`."
        ) from error
    return address


def may_write_card(name: str, token: str | None = None) -> bool:
    """Whether a repository on the hub has no README.md but a card of ours; warns if it has another one."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if not api.file_exists(name, "README.md") or _is_own_card(Path(api.hf_hub_download(name, "README.md"))):
        return True
    warnings.warn(f"the README.md of {name} was not written by resnetlab and is kept; no card is pushed.", stacklevel=2)
    return False


def make_model_card(model: TrainedModel, name: str) -> str:
    """Writes the model card, as Markdown, from the model file's metadata."""
    recipe, data = model.recipe, str(model.data.get("name", "")).rstrip("/").rpartition("/")[2]
    net = str(recipe.get("net", "residual network"))
    spec, (h, w) = model.spec, model.preprocessing.size
    class_names = ", ".join(_escape(each) for each in model.classes[:MAX_CLASSES])
    fitted = {key: _escape(model.calibration.get(key, "unknown")) for key in ("n", "data", "split")}
    calibration = "Scores are not calibrated."
    if model.multi_label:
        calibration = (
            f"An image has the classes over their thresholds: {_escape(describe_thresholds(model.calibration))}."
        )
    elif model.calibration:
        calibration = (
            f"Scores are calibrated: logits are divided by {model.temperature:.4g}, fitted on {fitted['n']} images of "
            f"{fitted['data']} ({fitted['split']})."
        )
    card = CARD_TEMPLATE.format(
        title=_escape(f"{net} on {data}" if data else net),
        parameters=f"{count_parameters(model.net):,}",
        spec=spec,
        depths="-".join(map(str, spec.depths)),
        pixels=f"{h}x{w}",
        channels=format_count(model.preprocessing.channels, "channel"),
        classes=f"{format_count(len(model.classes), 'class')}: {class_names}{', …' * (len(model.classes) > MAX_CLASSES)}",
        name=name,
        metrics=_format_metrics(model.metrics),
        calibration=calibration,
        images=model.describe_images(),
        recipe="\n".join(f"- {_escape(key)}: {_escape(value)}" for key, value in recipe.items()),
        versions=", ".join(f"{_escape(k)} {_escape(v)}" for k, v in model.versions.items()) or "resnetlab",
    )
    return card.encode(errors="replace").decode()


def _format_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the top-1 error, or of several classes per image the mean average precision, on each split."""
    for key, heading, form in (("top1_error", "top-1 error", format_percent), ("mean_ap", "mAP", "{:.3f}".format)):
        rows = [
            f"| {_escape(format_split(str(split)).replace('_', '-'))} | {values['n']:,} | {form(values[key])} |"
            for split, values in metrics.items()
            if is_number(values.get("n")) and is_number(values.get(key))
        ]
        if rows:
            return "\n".join([f"| split | images | {heading} |", "|---|---|---|", *rows])
    return "It was not evaluated with resnetlab."


def _escape(value: Any) -> str:
    """Formats a metadata value as one line, with Markdown's characters escaped."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_escape, value)) or "none"
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
