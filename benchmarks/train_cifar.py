#!/usr/bin/env python3
"""Training images per second on CIFAR-10: ResNetLab beside the loop that people copy from public repositories.

    python benchmarks/train_cifar.py --data-dir DATA [--nets resnet20] [--blocks 7] [--steps 20]

The plain loop: a CIFAR ResNet of its own (option A), eager, fp32, NCHW, torch.optim.SGD, and a DataLoader that reads PIL
images through torchvision's RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize, with as many workers as
there are cores. ResNetLab: `resnetlab train`'s own task and step, with its augmentation, from the recipe paper-cifar. Both
run in blocks of steps that alternate in one process; a block's rate covers everything from the images in memory to the
updated weights. Printed: the median rate of each, and the median of the block-by-block ratios with their extremes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from resnetlab.data import sources
from resnetlab.data.dataset import MemorySplit
from resnetlab.device import environment
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.recipe import Overrides
from resnetlab.training.recipes import find_classification_recipe
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task

BATCH = 128


class PlainBlock(nn.Module):
    """Two 3x3 convolutions and option A, as public CIFAR repositories write them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.extra = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


def plain_resnet(depth: int) -> nn.Module:
    """The CIFAR ResNet of depth 6n+2."""
    n, blocks, c_in = (depth - 2) // 6, [], 16
    for c_out in (16, 32, 64):
        for i in range(n):
            blocks.append(PlainBlock(c_in, c_out, 2 if i == 0 and c_out > 16 else 1))
            c_in = c_out
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """CIFAR-10 as torchvision's class serves it: an array turned into a PIL image and through per-image transforms."""

    def __init__(self, split: MemorySplit) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        normalise = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        crop = (transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def plain_loop(depth: int, split: MemorySplit) -> Callable[[int], None]:
    """A function that makes the args number of steps of the plain loop."""
    loader = DataLoader(
        Images(split), BATCH, shuffle=True, num_workers=os.cpu_count() or 1, drop_last=True, persistent_workers=True
    )
    net = plain_resnet(depth)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = forever()

    def steps(count: int) -> None:
        for _ in range(count):
            x, y = next(batches)
            sgd.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            sgd.step()

    return steps


def resnetlab_loop(net: str, data_dir: Path) -> Callable[[int], None]:
    """The same for ResNetLab's own task and step."""
    recipe = Overrides(net=net).apply(find_classification_recipe("paper-cifar"))
    task = build_task(recipe, RunOptions(data_dir=data_dir, device="cpu", report=print))
    set_train_mode(task.net)
    train_state, position = TrainState.create(task), iter(range(10**9))

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(train_state, task.micro_batches(next(position)), 0.1)

    return steps


def rate(steps: Callable[[int], None], count: int) -> float:
    """Images per second over `count` steps."""
    began = time.perf_counter()
    steps(count)
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--nets", default="resnet20", help="comma list of CIFAR nets")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each, alternating")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    options = parser.parse_args()
    split = sources.load_dataset("cifar10", options.data_dir).train
    rows = []
    for net in options.nets.split(","):
        plain, ours = plain_loop(int(net.removeprefix("resnet")), split), resnetlab_loop(net, options.data_dir)
        plain(3), ours(3)
        pairs = [(rate(plain, options.steps), rate(ours, options.steps)) for _ in range(options.blocks)]
        ratios = sorted(b / a for a, b in pairs)
        medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append(f"| {net} | {medians[0]:.0f} | {medians[1]:.0f} | {spread} |")
    machine = environment()
    print(f"\n{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, torchvision {machine['torchvision']}; "
          f"batch {BATCH}, {options.blocks} alternating blocks of {options.steps} steps, medians\n")  # fmt: skip
    print(
        "| net | plain eager fp32 loop, images/s | ResNetLab, images/s | ratio (lowest to highest) |\n|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
