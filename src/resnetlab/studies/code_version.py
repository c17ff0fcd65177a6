"""Whether runs of another version of the code still count: decided by the weights that a few tiny fixed runs produce.

A run's folder is named by a hash of the source that made it. Runs of another source count as this one's if the tiny runs of
both produce the same weights on one kind of machine. So an edited message discards no run, but a change of any bit does.
`code-versions.json`, beside the runs, records the fingerprint of every source that made runs there, by the kind of machine.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnetlab.device import preserve_process_state, select_device
from resnetlab.formatting import parse_json
from resnetlab.models.model_file import load_trained_model
from resnetlab.models.resnet import build
from resnetlab.random import make_generator
from resnetlab.run_folder import write_atomically
from resnetlab.training.python_api import train
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import find_classification_recipe

RECORD = "code-versions.json"
# The source of version 0.1 and the fingerprint of its own code.
V01 = {"8bd7db84": {"cpu AVX2, torch 2.15.0+cu132": "a3099a0be7f076e0"}}
SHORTCUTS = ("none", "A", "B", "C", "constant", "exclusive-gate", "shortcut-gate", "conv", "dropout")
ORDERS = ("original", "bn-after-add", "relu-before-add", "relu-only-preact", "preact")
VARIANTS: tuple[dict[str, Any], ...] = (  # of resnet8; another entry makes another fingerprint of the same code
    *({"shortcut": shortcut} for shortcut in SHORTCUTS),
    *({"activation_order": order} for order in ORDERS),
    {"block": "bottleneck", "shortcut": "B"},
    {"layers": 1},
    {"layers": 3},
)


@cache
def source_hash() -> str:
    """A hash of the package's modules, 8 hex digits."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


class CodeVersions:
    """The versions of the code that made the runs in a folder, and which of them produce the same weights as this one.

    With `any_version` finished runs count all the same.
    """

    def __init__(self, root: Path, device: str = "auto", *, any_version: bool = False) -> None:
        self._file, self._device = root / RECORD, str(select_device("fp32", device).device)
        self._any_version = any_version

    def read(self) -> dict[str, dict[str, str]]:
        """Source hash -> kind of machine -> fingerprint."""
        try:
            return dict(parse_json(self._file.read_bytes())) | V01
        except (OSError, ValueError):
            return dict(V01)

    def accepts(self, source: str, finished: bool) -> bool:
        """Whether a run of another source counts as this one's; trains the tiny runs if that is not known yet."""
        if finished and self._any_version:
            return True
        versions = self.read()
        theirs, ours = versions.get(source, {}), versions.get(source_hash(), {})
        if source == source_hash() or any(ours.get(machine) == fingerprint for machine, fingerprint in theirs.items()):
            return True
        machine = machine_kind(self._device)
        return machine in theirs and theirs[machine] == (ours.get(machine) or measure_fingerprint(self._device))

    def record(self) -> None:
        """Records this source's fingerprint on this kind of machine, before it makes runs."""
        machine, versions = machine_kind(self._device), self.read()
        if machine not in versions.get(source_hash(), {}):
            versions[source_hash()] = versions.get(source_hash(), {}) | {machine: measure_fingerprint(self._device)}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(versions, indent=2) + "\n")


def machine_kind(device: str) -> str:
    """What the bits of equal code depend on: the processor's instructions or the GPU, and the version of torch."""
    found = select_device("fp32", device).device
    is_cuda = found.type == "cuda"
    name = torch.cuda.get_device_name(found) if is_cuda else torch.backends.cpu.get_cpu_capability()
    return f"{found.type} {name}, torch {torch.__version__}"


@cache
def measure_fingerprint(device: str) -> str:
    """A hash of the weights that the tiny runs produce, and of the gradients of every kind of block; takes seconds."""
    digest = hashlib.sha256()
    with preserve_process_state(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        images = _write_images(Path(folder) / "images")
        for i, recipe in enumerate(tiny_recipes(images)):
            result = train(recipe, out=Path(folder) / str(i), data_dir=folder, device=device, workers=0, progress=False)
            digest.update(repr(result.top1_error).encode())
            for name, value in load_trained_model(Path(result.model)).net.state_dict().items():
                digest.update(name.encode() + _to_bytes(value))
        for gradient in _measure_gradients(device):
            digest.update(_to_bytes(gradient))
    return digest.hexdigest()[:16]


def tiny_recipes(images: Path) -> list[Recipe]:
    """The recipes of the papers' CIFAR runs, with both kinds of warm-up, and that of photographs; a few steps each.

    Args:
        images: a folder of class folders.
    """
    alike: dict[str, Any] = {"eval_every": 4, "precision": "fp32", "threads": 1, "compile": "off"}
    cifar = replace(
        find_classification_recipe("paper-cifar"),
        data="digits",
        net="resnet8",
        image_size=8,
        pad=1,
        batch=16,
        bn_batch=8,
        steps=8,
        milestones=(4, 6),
        warmup="steps",
        warmup_steps=2,
        val_images=20,
        log_every=2,
        **alike,
    )
    deep = replace(cifar, net="preresnet8", warmup="train-error", warmup_error=1.0, seed=1)
    photos = replace(
        find_classification_recipe("photos"),
        data=str(images),
        net="resnet18",
        specification={"widths": (16, 16, 32, 32)},
        image_size=64,
        batch=4,
        bn_batch=0,
        steps=4,
        milestones=(2, 3),
        warmup_steps=1,
        val_images=0,
        log_every=1,
        **alike,
    )
    return [cifar, deep, photos]


def _write_images(folder: Path) -> Path:
    """A folder of two classes of random images."""
    generator = make_generator(0, "tiny images")
    for split, count in (("train", 4), ("val", 2)):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (72, 80, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{i}.png")
    return folder


def _measure_gradients(device: str) -> list[Tensor]:
    """The gradients of one step of networks with every shortcut, order and block that the studies train."""
    device_config = select_device("fp32", device, 1)
    x = torch.randn(4, 3, 16, 16, generator=make_generator(0, "tiny batch"))
    gradients: list[Tensor] = []
    for values in VARIANTS:
        net = device_config.place(build("resnet8", classes=4, seed=0, **values)).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for dropout
            loss = F.cross_entropy(net(x.to(device_config.device)), torch.arange(4, device=device_config.device))
        gradients += torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    return gradients


def _to_bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
