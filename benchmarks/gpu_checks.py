#!/usr/bin/env python3
"""What only a GPU can show of the training step, one check after the other (`on_a_gpu` runs graph, order and waits).

    python benchmarks/gpu_checks.py [CHECK …] [--device cuda] [--steps 50]

* graph: steps in bf16 with mixing and stochastic depth, replayed from a CUDA graph and launched one by one: equal bits?
* order: torch's own warnings of operations that add in no fixed order, in a step of each task; then steps in which the backbone
  of a segmenter is recorded.
* compile: steps under torch.compile in each mode, twice: equal bits? And how far from steps without it.
* ahead: batches copied beside long kernels, and two batches evaluated at once, against one after the other: equal bits?
* onnx, aotinductor: agreement of an exported network with ONNX Runtime's providers for GPUs, and compiled for this GPU.
* decode: JPEGs decoded by torchvision on the device against ours on the CPU: pixels and images a second.
* waits: torch's own warnings of waits of the host for the GPU, in steps on images in memory and on disk.

The same is tested with a simulated GPU in tests/test_gpu_path.py. On a CPU this only shows that the script works.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo
from PIL import Image

from resnetlab.data.decode import decode_pixels, jpeg_decoder
from resnetlab.data.digits import load_digits
from resnetlab.device import DeviceConfig, to_device
from resnetlab.inference.export import export_model
from resnetlab.inference.formats import get_format
from resnetlab.training.annotated_recipes import boxes, masks
from resnetlab.training.backbone_graph import SAME_SHAPE
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import photos, quick
from resnetlab.training.step import compute_gradients, train_step
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.train import RunOptions, build_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cells import make_voc_folder


def start(recipe: Any, device: str) -> TrainState:
    """The state of a run before its first step."""
    return TrainState.create(build_task(recipe, RunOptions(device=device)))


@contextmanager
def count_warnings(found: Counter[str]) -> Iterator[None]:
    """Counts the first sentence of every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found.update(str(warning.message).split(". ")[0][:160] for warning in caught)


def check_graph(device: str, steps: int) -> None:
    recipe = replace(quick(), mixup=0.2, cutmix=1.0, stochastic_depth=0.2)
    said: list[str] = []
    replayed, launched = (start(recipe, device) for _ in range(2))
    for train_state, gradients in ((replayed, select_gradients(replayed, said.append)), (launched, compute_gradients)):
        for step in range(steps):
            train_step(train_state, train_state.task.micro_batches(step), 0.01, gradients)
    others = launched.tensors()
    different = [name for name, tensor in replayed.tensors().items() if not torch.equal(tensor, others[name])]
    print(
        f"{replayed.task.device_config}; {'; '.join(said)}; {replayed.state.replayed_steps} of {steps} steps replayed"
    )
    print(f"{len(different)} of {len(others)} tensors differ {different[:3]}")


def check_order(device: str, _: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = {"data": str(make_voc_folder(Path(folder, "voc"))), "bn": "live", "start_from": ""}
        data |= {"net": "resnet18"}
        if not device.startswith("cuda"):  # to show that the script works
            data |= {"specification": {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}, "image_size": 72}
        for recipe in (
            quick(),
            replace(boxes(), batch=2, **data),
            replace(masks(), batch=2, bn_batch=0, **data),
        ):
            train_state, found = start(recipe, device), Counter[str]()
            torch.use_deterministic_algorithms(True, warn_only=True)
            # torchvision's deterministic ROI align would be compiled, for minutes
            with count_warnings(found), torch._dynamo.config.patch(disable=True):
                train_step(train_state, train_state.task.micro_batches(0), 0.01)
            torch.use_deterministic_algorithms(False)
            said = train_state.task.nondeterministic_on_gpu or "no operation"
            print(f"{recipe.task}: {dict(found) or 'nothing'}; the product says: {said}", flush=True)
            gradients = select_gradients(train_state, partial(print, f"{recipe.task}:", flush=True))
            more = 1 + SAME_SHAPE if device.startswith("cuda") else 0  # a backbone is recorded at the last but one
            for step in range(1, 1 + more):
                train_step(train_state, train_state.task.micro_batches(step), 0.01, gradients)
            train_state.task.close()


def make_photos(folder: Path) -> Recipe:
    """Writes 64 JPEGs of two classes; a recipe that trains on them."""
    for i in range(64):
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(256, 320, 3), dtype=np.uint8)).save(path)
    return replace(photos(), data=str(folder), batch=16, val_images=8, net="resnet18", keep_images=0)


def check_ahead(device: str, _: int) -> None:
    rounds, matmuls, repeats = (10, 20, 16) if device.startswith("cuda") else (2, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        task = start(make_photos(Path(folder, "photos")), device).task
        assert isinstance(task, ClassificationTask)
        many = task.loader.split.subset(torch.arange(32).repeat(repeats))
        product, images, figures, seconds = torch.zeros(4096, 4096, device=device), [], [], []
        task.evaluate(many)  # chooses algorithms
        one_by_one = patch.object(DeviceConfig, "side_by_side_map", lambda *_: nullcontext(map))
        for evaluating in (nullcontext(), one_by_one):
            found = []
            for step in range(rounds):
                for _ in range(matmuls):
                    product = product @ product
                found.append(task.loader.batch(step).images)
            images.append(torch.stack([x.cpu() for x in found]))
            began = time.perf_counter()
            with evaluating:
                figures.append(task.evaluate(many).scores)
            seconds.append(time.perf_counter() - began)
            task.loader.__dict__["_copier"] = partial(to_device, device=task.device_config.device)
        task.close()
        batches, scores = ("equal" if torch.equal(*pair) else "DIFFER" for pair in (images, figures))
        print(f"batches {batches}, scores {scores}")
        print(f"{len(many)} images evaluated in {seconds[0]:.2f} s, one batch after the other in {seconds[1]:.2f} s")


def check_export(device: str, _: int, target: str) -> None:
    digits = load_digits()
    task = start(quick(), device).task
    assert isinstance(task, ClassificationTask)
    model, images = task.trained_model({}), list(digits.test.images[:16])
    with tempfile.TemporaryDirectory() as folder:
        began, out = time.perf_counter(), Path(folder, f"m{get_format(target).suffixes[0]}")
        parity = export_model(model, target, "fp32", out, images, None)
        print(f"{target}: {parity.agreement}, {time.perf_counter() - began:.1f} s")
        for provider in json.loads(Path(f"{out}.json").read_text()).get("providers", ()):
            print(provider)


def check_decode(device: str, _: int) -> None:
    from torchvision.io import decode_jpeg

    smooth = torch.randn(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(smooth, (375, 500), mode="bicubic").mul(60).add(128).clamp(0, 255).byte()
    file = io.BytesIO()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    content, count = file.getvalue(), 256 if device.startswith("cuda") else 8
    ours = decode_pixels(content, "the image").permute(2, 0, 1).int()
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8)] * count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        theirs = decode_jpeg(encoded, device=device)[0]
        began = time.perf_counter()
        theirs = decode_jpeg(encoded, device=device)[-1].cpu().int()
        seconds = time.perf_counter() - began
    apart = (theirs - ours).abs()
    began = time.perf_counter()
    for _ in range(count):
        decode_pixels(content, "the image")
    own = time.perf_counter() - began
    print(
        f"pixels differ by {int(apart.max())} at most, {float(apart.float().mean()):.3f} on average, from {jpeg_decoder()}"
    )
    print(f"500x375: {count / seconds:,.0f} images/s in batches of {count}, one core of the CPU {count / own:,.0f}")


def check_waits(device: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = make_photos(Path(folder, "photos"))
        for name, recipe in (("memory", quick()), ("disk", disk)):
            train_state, found = start(recipe, device), Counter[str]()
            gradients = select_gradients(train_state, print)
            for step in range(3):
                train_step(train_state, train_state.task.micro_batches(step), 0.01, gradients)
            if device.startswith("cuda"):
                torch.cuda.set_sync_debug_mode("warn")
            with count_warnings(found):
                for step in range(3, 3 + steps):
                    train_step(train_state, train_state.task.micro_batches(step), 0.01, gradients)
            if device.startswith("cuda"):
                torch.cuda.set_sync_debug_mode("default")
            train_state.task.close()
            print(f"{name}, {steps} steps: {dict(found) or 'no wait'}")


def check_compile(device: str, _: int) -> None:
    on_gpu, plain = device.startswith("cuda"), dict[str, torch.Tensor]()
    for mode in ("off", "on", "reduce-overhead", "max-autotune-no-cudagraphs") if on_gpu else ("off",):
        recipe = replace(quick(), net="resnet8", bn_batch=quick().batch // 2, compile=mode)
        runs, began = [], time.perf_counter()
        for _ in range(2):
            train_state = start(replace(recipe, exact=not mode.startswith("max")), device)
            for step in range(5):
                train_step(train_state, train_state.task.micro_batches(step), 0.01)
            runs.append({name: x.clone() for name, x in train_state.tensors().items()})
        plain = plain or runs[0]
        equal = all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())
        worst = max(float((x.float() - plain[name].float()).abs().max()) for name, x in runs[0].items())
        seconds = time.perf_counter() - began
        print(
            f"{mode}: two runs {'equal' if equal else 'DIFFER'}, {worst:.2g} from no compiler at most, {seconds:.1f} s"
        )


CHECKS = {
    "graph": check_graph,
    "compile": check_compile,
    "ahead": check_ahead,
    "decode": check_decode,
    **{target: partial(check_export, target=target) for target in ("onnx", "aotinductor")},
    "order": check_order,
    "waits": check_waits,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"by default all: {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    for name in options.checks:
        print(f"{name}:")
        CHECKS[name](options.device, options.steps)
