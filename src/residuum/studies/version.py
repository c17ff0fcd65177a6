"""Which code made a run: runs of another version are told apart and never mixed with this one's."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

# What decides the bits of a run. Pages, figures, messages and the command line do not.
DECISIVE = (
    "nn/*.py",
    "models/resnet.py",
    "models/spec.py",
    "data/augment.py",
    "data/cifar.py",
    "data/crops.py",
    "data/dataset.py",
    "data/decode.py",
    "data/digits.py",
    "data/folder.py",
    "data/loader.py",
    "data/mixing.py",
    "data/reading.py",
    "data/statistics.py",
    "data/stored.py",
    "data/trivial.py",
    "preprocessing.py",
    "tasks/classify.py",
    "tasks/network.py",
    "training/average.py",
    "training/classifying.py",
    "training/compiling.py",
    "training/cuda_graph.py",
    "training/fitting.py",
    "training/loop.py",
    "training/optim.py",
    "training/parts.py",
    "training/running.py",
    "training/schedule.py",
    "training/step.py",
    "training/steps.py",
)


@cache
def version() -> str:
    """A hash of the code that decides a run's result, 8 hex digits; comments, docstrings and layout do not count."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for pattern in DECISIVE for file in root.glob(pattern)):
        digest.update(_meaning(file.read_text()).encode())
    return digest.hexdigest()[:8]


def _meaning(source: str) -> str:
    """A module without what only people read."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
