"""What was said of each picture, as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from residuum.errors import UsageError
from residuum.evaluation.metrics import Judgement
from residuum.records import write_atomically

SUFFIXES = (".csv", ".parquet")


def check(path: Path) -> None:
    """Raises UsageError where `write` could not write this kind of file, before any work is done."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: per-picture results are written to a file that ends in {' or '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - is it there?
        except ImportError as error:
            raise UsageError(f"{path} needs pyarrow: pip install 'residuum[parquet]', or take a .csv file.") from error


def table(judgement: Judgement, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns: picture, true and predicted class, whether right, both classes' scores, and the true class's rank from 1."""
    score, predicted = judgement.scores.max(1)
    own = judgement.scores[torch.arange(judgement.n), judgement.labels]
    rank = 1 + (judgement.scores > own[:, None]).sum(1)
    return {
        "picture": list(names),
        "true": [judgement.classes[i] for i in judgement.labels.tolist()],
        "predicted": [judgement.classes[i] for i in predicted.tolist()],
        "right": (predicted == judgement.labels).tolist(),
        "score": score.double().tolist(),
        "true_score": own.double().tolist(),
        "rank": rank.tolist(),
    }


def write(path: Path, judgement: Judgement, names: Sequence[str]) -> None:
    """Writes the table as CSV or Parquet, by the file's suffix; raises RunError where there is no space or no permission."""
    check(path)
    columns = table(judgement, names)
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_atomically(path, text.getvalue())
        return
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    write_atomically(path, buffer.getvalue())
