#!/usr/bin/env python3
"""Pictures per second of answering: Residuum's engines beside the same runtimes used by hand.

    python benchmarks/infer.py [--nets resnet50,resnet18,resnet20] [--batches 1,16] [--rounds 5] [--pictures FOLDER]
    python benchmarks/infer.py --model MODEL --data cifar10 [--data-dir data]

Every contestant has the same weights and runs in a process of its own (so that none profits from what another sets for its
process), and only one runs at a time: the processes take turns in every round.

* eager: torchvision's network (at 32 pixels the plain modules of the CIFAR net), fp32, NCHW, under no_grad.
* compiled: the same in channels_last and bf16 under torch.compile with freezing.
* onnxruntime: exported by torch.onnx in fp32.
* openvino fp32, bf16: that file with the precision hint; int8: quantised by nncf on 64 other pictures.
* residuum: `--engine auto`; residuum int8: `--engine auto --precision int8`; which engine that was is printed.

The others are given normalised floats at no cost and give logits; Residuum takes uint8 pictures, normalises them, and gives
scores. With --model, the weights are those of a file that `residuum train` wrote, and everybody judges the first 512 test
pictures of --data: printed are the share with eager's best class and the top-1 error. Without it weights are random, with BN's
statistics taken from the pictures (64 of a folder, or noise), and there is no error to speak of.
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

import residuum
from residuum.data import sources
from residuum.data.decode import decode, listed
from residuum.data.reading import Views
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.samples import Samples
from residuum.preprocessing import Preprocessing
from residuum.runtime import environment
from residuum.use.engines import choose

CONTESTANTS = (
    "eager",
    "compiled",
    "onnxruntime",
    "openvino fp32",
    "openvino bf16",
    "openvino int8",
    "residuum",
    "residuum int8",
)
BATCHES = {32: (1, 256), 224: (1, 16)}
SHOWN = 64  # pictures that agreement is counted on, and others that int8 is calibrated on
JUDGED = 512  # test pictures, at most, that a trained network is judged on
Call = Callable[[int], Tensor]  # the pictures of one batch size, answered


def side(net: str) -> int:
    return 224 if net in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") else 32


def pixels(net: str, folder: str | None) -> Tensor:
    """128 pictures, uint8 (128, h, w, 3): real ones, repeated mirrored where there are too few, or smooth noise."""
    size = side(net)
    if folder is None:
        coarse = torch.rand(2 * SHOWN, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        return (noise * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    prepared = Preprocessing(3, (size, size), size, torch.zeros(3), torch.ones(3))
    files = islice((f for f in listed(Path(folder)) if isinstance(f, Path)), 2 * SHOWN)
    found = torch.stack([prepared(decode(file)) for file in files])
    return torch.cat([found, found.flip(2)])[: 2 * SHOWN]


class Subject(NamedTuple):
    """A network as others have it and as ours, with the same weights, and what it is shown."""

    theirs: nn.Module
    own: Bundle
    shown: Tensor  # uint8 (N, h, w, 3)
    training: Tensor  # likewise: what int8 is calibrated on
    labels: Tensor | None = None  # of those shown


def subject(net: str, options: argparse.Namespace) -> Subject:
    """A trained network and test pictures, or a random one and any."""
    if options.model is None:
        return random_network(net, pixels(net, options.pictures))
    own = load_bundle(Path(options.model))
    views = Views(sources.load(options.data, Path(options.data_dir)).test, own.preprocessing)
    parts = list(islice(views.batches(64), JUDGED // 64))
    assert own.samples is not None
    shown, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Subject(published(net, own.net, len(own.classes)), own, shown, own.samples.training, labels)


def published(net: str, own: nn.Module, classes: int) -> nn.Module:
    """The same weights in torchvision's network; at 32 pixels there is none."""
    if side(net) == 32:
        return own.eval()
    import torchvision

    theirs = torchvision.models.get_model(net, num_classes=classes).eval()
    theirs.load_state_dict(own.state_dict())
    return theirs


def random_network(net: str, pictures: Tensor) -> Subject:
    """Random weights; BN's statistics are those of the pictures."""
    torch.manual_seed(0)
    size = side(net)
    prepared = Preprocessing(3, (size, size), size, torch.full((3,), 0.45), torch.full((3,), 0.25))
    name = net if net not in ("resnet50", "resnet101", "resnet152") else f"{net}v1.5"
    own: Any = residuum.build(name, classes=100, seed=0).train()
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
    with torch.no_grad():
        for part in torch.split(pictures, 32):
            own(prepared.normalise(part))
    own.eval()
    check, training = pictures[:SHOWN], pictures[SHOWN:]
    samples = Samples(check[:16], torch.zeros(16, dtype=torch.long), training)
    bundle = Bundle(own, tuple(map(str, range(100))), prepared, samples=samples)
    return Subject(published(net, own, 100), bundle, check, training)


def by_hand(contestant: str, net: nn.Module, x: Tensor, training: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of normalised floats, NCHW, as a person would write it."""
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
            model, nncf.Dataset([part.numpy() for part in torch.split(training, 1)]), subset_size=SHOWN
        )
    hint = {"INFERENCE_PRECISION_HINT": "f32"} if contestant == "openvino fp32" else {}  # bf16 is its own default here
    compiled = openvino.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **hint})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def contestant(name: str, given: Subject) -> tuple[Call, Tensor, str]:
    """A call that answers one batch of a size, the best classes of the pictures shown, and what was taken."""
    if name.startswith("residuum"):
        chosen = choose(given.own, "auto", "int8" if "int8" in name else "auto")
        answer, shown, note = chosen.answer, given.shown, str(chosen)
    else:
        shown, training = (
            given.own.preprocessing.normalise(x).contiguous(memory_format=torch.contiguous_format)
            for x in (given.shown, given.training)
        )
        answer, note = by_hand(name, given.theirs, shown, training), ""
    batches: dict[int, Tensor] = {}

    def call(size: int) -> Tensor:
        if size not in batches:
            batches[size] = shown[torch.arange(size) % len(shown)].contiguous()
        return answer(batches[size])

    with torch.no_grad():
        best = torch.cat([answer(part) for part in torch.split(shown, 16)]).argmax(1)
    return call, best, note


def serve(link: Connection, name: str, net: str, options: argparse.Namespace) -> None:
    """A contestant's process: told a batch size and seconds, it answers with pictures per second."""
    warnings.simplefilter("ignore")
    given = subject(net, options)
    call, best, note = contestant(name, given)
    error = None if given.labels is None else float((best != given.labels).float().mean())
    link.send((best.tolist(), note, error))
    with torch.no_grad():
        while (order := link.recv()) is not None:
            size, seconds = order
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
    if options.wait_for:  # the machine may be made quiet now
        Path(options.wait_for).touch()
        while Path(options.wait_for).exists():
            time.sleep(0.2)
    for size in [int(b) for b in options.batches.split(",")] if options.batches else BATCHES[side(net)]:
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
            where = f"{net}, {side(net)} px, batch {size}"
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
    parser.add_argument("--pictures", help="a folder of pictures; smooth noise where not given")
    parser.add_argument("--model", help="a model file that `residuum train` wrote, in place of random weights")
    parser.add_argument("--data", help="with --model: whose test pictures are judged")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma list; eager must be among them")
    parser.add_argument("--wait-for", help="a file made when all are ready; measuring begins when somebody removes it")
    options = parser.parse_args()
    nets = options.nets.split(",")
    if options.model is not None:
        if options.data is None:
            parser.error("--model needs --data, whose test pictures are judged")
        nets = [str(load_bundle(Path(options.model)).recipe["net"]).removesuffix("v1.5")]
    machine = environment()
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; {options.rounds} rounds, medians\n"
    )
    print("| network | contestant | pictures/s | ratio to eager (lowest to highest) | agreement | error |")
    print("|---|---|---|---|---|---|", flush=True)
    for net in nets:
        measure(net, options)


if __name__ == "__main__":
    main()
