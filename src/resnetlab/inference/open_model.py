"""Opens a model of any task: the file's metadata determine the task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from resnetlab.errors import UsageError
from resnetlab.models.annotated_model import TASK_NOUNS, read_task

if TYPE_CHECKING:
    from resnetlab.inference.annotated import Detector, Segmenter
    from resnetlab.inference.predict import Model


def open_model(
    name: str, *, backend: str = "auto", precision: str = "auto", device: str = "auto"
) -> Model | Detector | Segmenter:
    """Opens a model file, or downloads a published classifier.

    A classifier opens in torch fp32; its backend and precision are selected by `Model.select_backend`.

    Args:
        backend, precision: of a detector or segmenter, which runs on torch, in fp32 unless `precision` is "bf16" (bf16 rounds
            boxes to whole pixels).

    Raises:
        ModelFileError: the file is missing, damaged, foreign, or a folder; or the download fails.
        UsageError: the task has no such backend or precision, or there is no such published model.
    """
    task = read_task(Path(name))
    if task == "classify":
        from resnetlab.inference.predict import load

        return load(name, device=device)
    if backend not in ("auto", "torch") or precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"{TASK_NOUNS[task]} runs on torch in fp32 or bf16; leave out --backend and --precision.")
    from resnetlab.inference.annotated import open_annotated_model

    return open_annotated_model(Path(name), task, "fp32" if precision == "auto" else precision, device)
