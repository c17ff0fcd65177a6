"""Opens a model of any task: the file's metadata determine the task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from resnetlab.errors import UsageError, public
from resnetlab.inference import predict
from resnetlab.inference.download import find_model
from resnetlab.models.annotated_model import TASK_NOUNS, read_task

if TYPE_CHECKING:
    from resnetlab.inference.annotated import Detector, Segmenter
    from resnetlab.inference.predict import Model


@public
def load(
    path: str | Path, *, precision: str = "fp32", device: str = "auto", net: nn.Module | None = None
) -> Model | Detector | Segmenter:
    """Loads a model for prediction.

    Args:
        path: a model file, a run folder, or the name of a published classifier, which is downloaded:
            "torchvision:resnet50.IMAGENET1K_V2", "timm:resnet50.a1_in1k", "hf:OWNER/REPOSITORY".
        precision: "fp32", "bf16" or "auto".
        device: "cpu", "cuda", "cuda:1", "mps", or "auto": a GPU if there is one.
        net: for a model file with the weights of a network of your own, that network; its weights are replaced.

    Returns:
        A Model (classifier) with network, classes and preprocessing; or a Detector or Segmenter. All have `predict`,
        `evaluate` and `save`.

    Raises:
        ModelFileError: the file is missing, damaged or foreign; the run has no model yet; or the download fails.
        UsageError: it is a network's name, or there is no such published model.
    """
    found = find_model(path)
    if (task := read_task(Path(found))) == "classify":
        return predict.load(found, precision=precision, device=device, net=net)
    if net is not None:
        raise UsageError(f"{path} is {TASK_NOUNS[task]}, which has its network; load it without net.")
    from resnetlab.inference.annotated import open_annotated_model

    return open_annotated_model(Path(found), task, precision, device)


def open_model(
    name: str, *, backend: str = "auto", precision: str = "auto", device: str = "auto"
) -> Model | Detector | Segmenter:
    """Opens a model as commands do.

    A classifier opens in torch fp32; its backend and precision are selected by `Model.select_backend`.

    Args:
        backend, precision: of a detector or segmenter, which runs on torch, in fp32 unless `precision` is "bf16" (bf16 rounds
            boxes to whole pixels).

    Raises as `load`, and UsageError if the task has no such backend or precision.
    """
    name = find_model(name)
    task = read_task(Path(name))
    if task != "classify" and (backend not in ("auto", "torch") or precision not in ("auto", "fp32", "bf16")):
        raise UsageError(f"{TASK_NOUNS[task]} runs on torch in fp32 or bf16; leave out --backend and --precision.")
    return load(name, precision="fp32" if task == "classify" or precision == "auto" else precision, device=device)
