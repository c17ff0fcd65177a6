"""The prediction for each image, as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnetlab.errors import UsageError, missing_package
from resnetlab.evaluation.metrics import ClassificationMetrics
from resnetlab.evaluation.multi_label import MultiLabelMetrics
from resnetlab.run_folder import write_atomically

SUFFIXES = (".csv", ".parquet")


def check_table_file(path: Path, what: str = "per-image results", suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raises UsageError, before any work is done, for a kind of file that `what` cannot be written to."""
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: {what} are written to a file that ends in {' or '.join(suffixes)}.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - tests whether it is installed
        except ImportError as error:
            raise missing_package(f"{path} (unlike a {suffixes[0]} file)", "pyarrow", "parquet") from error


def tabulate_predictions(metrics: ClassificationMetrics, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns: image, true and predicted class, whether correct, both classes' scores, and the true class's rank from 1."""
    return {
        "image": list(names),
        "true": [metrics.classes[i] for i in metrics.labels.tolist()],
        "predicted": [metrics.classes[i] for i in metrics.predicted.tolist()],
        "right": metrics.right.tolist(),
        "score": metrics.confidence.double().tolist(),
        "true_score": metrics.true_scores.double().tolist(),
        "rank": metrics.ranks.tolist(),
    }


def write_predictions(path: Path, metrics: ClassificationMetrics | MultiLabelMetrics, names: Sequence[str]) -> None:
    """Writes the table as CSV or Parquet, by the file's suffix; raises RunError where there is no space or no permission."""
    check_table_file(path)
    columns = (
        metrics.tabulate(names) if isinstance(metrics, MultiLabelMetrics) else tabulate_predictions(metrics, names)
    )
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
