#!/usr/bin/env python3
"""Images per second of inference: ResNetLab's backends compared with the same runtimes used directly.

    python benchmarks/infer.py [--nets resnet50,resnet18,resnet20] [--batches 1,16] [--rounds 5] [--images FOLDER]
    python benchmarks/infer.py --model MODEL --data cifar10 [--data-dir data]

Every contestant has the same weights and its own process (so that none is affected by another's settings), and only one runs
at a time: the processes take turns in every round.

* eager: torchvision's network (at 32 pixels the plain modules of the CIFAR net), fp32, NCHW, under no_grad.
* compiled: the same in channels_last and bf16 under torch.compile with freezing.
* onnxruntime: exported by torch.onnx in fp32.
* openvino fp32, bf16: that file with the precision hint; int8: quantised by nncf on 64 other images.
* resnetlab: `--backend auto`; resnetlab int8: `--backend auto --precision int8`; the selected backend is printed.

The others get normalised floats and return logits; ResNetLab takes uint8 images, normalises them, and returns scores. With
--model, the weights are those of a file that `resnetlab train` wrote, and every contestant evaluates the first 512 test images
of --data: the share with eager's best class and the top-1 error are printed. Without it weights are random, with BN's
statistics of the images (64 of a folder, or noise), and no error is reported.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resnetlab
from resnetlab.data import sources
from resnetlab.data.decode import decode, list_images
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.device import environment
from resnetlab.inference.backends import BackendRequest, select_backend
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.preprocessing import Preprocessing

CONTESTANTS = (
    "eager",
    "compiled",
    "onnxruntime",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
    "resnetlab",
    "resnetlab int8",
)
BATCHES = {32: (1, 256), 224: (1, 16)}
NUM_IMAGES = 64  # for agreement, and others for int8 calibration
MAX_EVALUATED = 512  # test images that a trained network is evaluated on
Call = Callable[[int], Tensor]  # batch size -> outputs


def image_side(net: str) -> int:
    return 224 if net in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") else 32


def load_images(net: str, folder: str | None) -> Tensor:
    """128 images, uint8 (128, h, w, 3): real ones, repeated mirrored if there are too few, or smooth noise."""
    size = image_side(net)
    if folder is None:
        coarse = torch.rand(2 * NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        return (noise * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    preprocessing = Preprocessing(3, (size, size), size, torch.zeros(3), torch.ones(3))
    files = islice((f for f in list_images(Path(folder)) if isinstance(f, Path)), 2 * NUM_IMAGES)
    found = torch.stack([preprocessing(decode(file)) for file in files])
    return torch.cat([found, found.flip(2)])[: 2 * NUM_IMAGES]


class Subject(NamedTuple):
    """A reference network and ours with the same weights, and images for them."""

    theirs: nn.Module
    own: TrainedModel
    images: Tensor  # uint8 (N, h, w, 3)
    calibration_images: Tensor  # likewise, for int8
    labels: Tensor | None = None  # of `images`


def make_subject(net: str, options: argparse.Namespace) -> Subject:
    """A trained network and test images, or a random network and any images."""
    if options.model is None:
        return make_random_network(net, load_images(net, options.images))
    own = load_trained_model(Path(options.model))
    views = PreprocessedSplit(sources.load_dataset(options.data, Path(options.data_dir)).test, own.preprocessing)
    parts = list(islice(views.batches(64), MAX_EVALUATED // 64))
    assert own.reference_images is not None
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    calibration_images = own.reference_images.training
    return Subject(to_torchvision(net, own.net, len(own.classes)), own, images, calibration_images, labels)


def to_torchvision(net: str, own: nn.Module, classes: int) -> nn.Module:
    """Loads the weights into torchvision's network; it has none for 32 pixels."""
    if image_side(net) == 32:
        return own.eval()
    import torchvision

    theirs = torchvision.models.get_model(net, num_classes=classes).eval()
    theirs.load_state_dict(own.state_dict())
    return theirs


def make_random_network(net: str, images: Tensor) -> Subject:
    """A network with random weights and the BN statistics of the images."""
    torch.manual_seed(0)
    size = image_side(net)
    preprocessing = Preprocessing(3, (size, size), size, torch.full((3,), 0.45), torch.full((3,), 0.25))
    name = net if net not in ("resnet50", "resnet101", "resnet152") else f"{net}v1.5"
    own: Any = resnetlab.build(name, classes=100, seed=0).train()
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
    with torch.no_grad():
        for part in torch.split(images, 32):
            own(preprocessing.normalise(part))
    own.eval()
    check, calibration = images[:NUM_IMAGES], images[NUM_IMAGES:]
    reference_images = ReferenceImages(check[:16], torch.zeros(16, dtype=torch.long), calibration)
    model = TrainedModel(own, tuple(map(str, range(100))), preprocessing, reference_images=reference_images)
    return Subject(to_torchvision(net, own, 100), model, check, calibration)


def make_predictor(
    contestant: str, net: nn.Module, x: Tensor, calibration_images: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function of normalised floats, NCHW, written with the runtime itself."""
    if contestant == "eager":
        return net
    if contestant == "compiled":
        import torch._inductor.config as inductor

        inductor.freezing = True
        model = torch.compile(net.bfloat16().to(memory_format=torch.channels_last))
        return lambda x: model(x.bfloat16().to(memory_format=torch.channels_last)).float()
    buffer = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    torch.onnx.export(net, (x[:2],), buffer, dynamo=True, verbose=False, dynamic_shapes=shapes, external_data=False)
    if contestant == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    import openvino

    model = openvino.Core().read_model(buffer.getvalue(), b"")
    if contestant == "openvino int8":
        os.environ["NNCF_CI"] = "1"
        import nncf

        model = nncf.quantize(
            model, nncf.Dataset([part.numpy() for part in torch.split(calibration_images, 1)]), subset_size=NUM_IMAGES
        )
    hint = {"INFERENCE_PRECISION_HINT": "f32"} if contestant == "openvino fp32" else {}  # bf16 is its own default here
    compiled = openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **hint})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def make_contestant(name: str, subject: Subject) -> tuple[Call, Tensor, str]:
    """A function that runs one batch of a size, the best classes of the images, and the selected backend."""
    if name.startswith("resnetlab"):
        choice = select_backend(subject.own, BackendRequest(precision="int8" if "int8" in name else "auto"))
        predict, images, note = choice.predict, subject.images, str(choice)
    else:
        images, calibration_images = (
            subject.own.preprocessing.normalise(x).contiguous(memory_format=torch.contiguous_format)
            for x in (subject.images, subject.calibration_images)
        )
        predict, note = make_predictor(name, subject.theirs, images, calibration_images), ""
    batches: dict[int, Tensor] = {}

    def call(size: int) -> Tensor:
        if size not in batches:
            batches[size] = images[torch.arange(size) % len(images)].contiguous()
        return predict(batches[size])

    with torch.no_grad():
        best = torch.cat([predict(part) for part in torch.split(images, 16)]).argmax(1)
    return call, best, note


def serve(link: Connection, name: str, net: str, options: argparse.Namespace) -> None:
    """A contestant's process: receives a batch size and seconds, sends images per second."""
    warnings.simplefilter("ignore")
    subject = make_subject(net, options)
    call, best, note = make_contestant(name, subject)
    error = None if subject.labels is None else float((best != subject.labels).float().mean())
    link.send((best.tolist(), note, error))
    with torch.no_grad():
        while (request := link.recv()) is not None:
            size, seconds = request
            call(size)
            began, n = time.perf_counter(), 0
            while n < 2 or time.perf_counter() - began < seconds:
                call(size)
                n += 1
            link.send(n * size / (time.perf_counter() - began))


def measure(net: str, options: argparse.Namespace) -> None:
    """Prints the rows of one network."""
    context = multiprocessing.get_context("spawn")
    links, processes, best, notes, errors = {}, [], {}, {}, {}
    names = [name for name in CONTESTANTS if name in options.contestants.split(",")]
    for name in names:
        links[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, net, options), daemon=True)
        process.start()
        processes.append(process)
        best[name], notes[name], errors[name] = links[name].recv()
        print(f"{net}: {name} is ready {notes[name]}", file=sys.stderr, flush=True)
    if options.wait_for:  # other load on the machine can be stopped now
        Path(options.wait_for).touch()
        while Path(options.wait_for).exists():
            time.sleep(0.2)
    for size in [int(b) for b in options.batches.split(",")] if options.batches else BATCHES[image_side(net)]:
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.rounds + 1):
            for name in names:
                links[name].send((size, options.seconds))
                rate = links[name].recv()
                if turn:  # the first one compiles for this size
                    rates[name].append(rate)
        for name in names:
            ratios = sorted(a / b for a, b in zip(rates[name], rates["eager"], strict=True))
            same = statistics.fmean(a == b for a, b in zip(best[name], best["eager"], strict=True))
            label = name + (f" ({notes[name].split(' (')[0]})" if notes[name] else "")
            middle, spread = statistics.median(rates[name]), f"{statistics.median(ratios):.2f}"
            spread += f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            wrong = "–" if errors[name] is None else f"{errors[name]:.2%}"
            where = f"{net}, {image_side(net)} px, batch {size}"
            print(f"| {where} | {label} | {middle:,.1f} | {spread} | {same:.1%} | {wrong} |", flush=True)
    for name in names:
        links[name].send(None)
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="resnet50,resnet18,resnet20", help="comma list")
    parser.add_argument("--batches", help="comma list; 1 and 16 at 224 px, 1 and 256 at 32 px where not given")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of every contestant, alternating, after one to warm up"
    )
    parser.add_argument("--seconds", type=float, default=0.7, help="of a turn")
    parser.add_argument("--images", help="a folder of images; smooth noise where not given")
    parser.add_argument("--model", help="a model file that `resnetlab train` wrote, in place of random weights")
    parser.add_argument("--data", help="with --model: whose test images are evaluated")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma list; eager must be among them")
    parser.add_argument("--wait-for", help="a file made when all are ready; measuring begins when somebody removes it")
    options = parser.parse_args()
    nets = options.nets.split(",")
    if options.model is not None:
        if options.data is None:
            parser.error("--model needs --data, whose test images are evaluated")
        nets = [str(load_trained_model(Path(options.model)).recipe["net"]).removesuffix("v1.5")]
    machine = environment()
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; {options.rounds} rounds, medians\n"
    )
    print("| network | contestant | images/s | ratio to eager (lowest to highest) | agreement | error |")
    print("|---|---|---|---|---|---|", flush=True)
    for net in nets:
        measure(net, options)


if __name__ == "__main__":
    main()
