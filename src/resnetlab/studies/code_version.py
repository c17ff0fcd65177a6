"""The version of the code that made a run: runs of other versions are never mixed with this one's."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

# The modules that decide the bits of a run; pages, figures, messages and the command line do not.
MODULES = (
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
    "data/sampler.py",
    "data/mixing.py",
    "data/prefetch.py",
    "data/statistics.py",
    "data/disk_split.py",
    "data/trivial_augment.py",
    "preprocessing.py",
    "training/tasks/classification.py",
    "training/tasks/starting_network.py",
    "training/average.py",
    "training/classification_run.py",
    "training/compilation.py",
    "training/cuda_graph.py",
    "training/memory.py",
    "training/train.py",
    "training/optim.py",
    "training/micro_batches.py",
    "training/run.py",
    "training/schedule.py",
    "training/step.py",
    "training/loop.py",
)


@cache
def code_hash() -> str:
    """A hash of the code that decides a run's result, 8 hex digits; comments, docstrings and layout do not change it."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for pattern in MODULES for file in root.glob(pattern)):
        digest.update(_dump_code(file.read_text()).encode())
    return digest.hexdigest()[:8]


def _dump_code(source: str) -> str:
    """A module's syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
