"""Training steps for measurements: their time, and the share of it that data loading takes."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import Split
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import DeviceConfig, select_device
from resnetlab.models.resnet import build
from resnetlab.training.recipe import Recipe
from resnetlab.training.tasks.classification_data import plan_preprocessing

TIMED_IMAGES = 8  # of a step on a CPU, whose time is in proportion to them
MIN_ROUNDS = 10  # of a comparison: a program beside this one disturbs most of a few


def forward_backward(net: nn.Module, images: Tensor, labels: Tensor, device_config: DeviceConfig) -> float:
    """One forward and backward pass that adds to the gradients; returns the loss, and so waits for the device."""
    with device_config.autocast():
        loss = F.cross_entropy(net(images).float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def time_steps(net: nn.Module, images: Tensor, labels: Tensor, device_config: DeviceConfig, n: int) -> list[float]:
    """Seconds of `n` steps (forward and backward), after one to warm up."""
    seconds = []
    for _ in range(n + 1):
        start = time.perf_counter()
        forward_backward(net, images, labels, device_config)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure_bf16(seconds: float = 1.0) -> float:
    """How many times as fast as in fp32 a training step is in bf16 here: resnet8, 16 images of 32 pixels, the best of a few.

    Args:
        seconds: to measure for, beside the first steps.
    """
    fp32 = select_device("fp32")
    net = fp32.place(build("resnet8", classes=10, seed=0)).train()
    images = torch.zeros(16, 3, 32, 32, device=fp32.device).to(memory_format=torch.channels_last)
    labels = torch.zeros(16, dtype=torch.long, device=fp32.device)
    best, until, rounds = [math.inf, math.inf], time.perf_counter() + seconds, 0
    while time.perf_counter() < until or rounds < MIN_ROUNDS:
        rounds += 1
        for i, config in enumerate((fp32, replace(fp32, precision="bf16"))):
            best[i] = min(best[i], *time_steps(net, images, labels, config, 1))
    return best[0] / best[1]


def time_data_loading(split: Split, recipe: Recipe) -> dict[str, float]:
    """Times the loader (one process) and the training step of a recipe, each over two batches; on a CPU of fewer images.

    Returns:
        `images_per_second` of the loader, and `share_of_step`, its time as a fraction of loading and training.
    """
    device_config = select_device(recipe.precision)
    batch_size = min(recipe.batch, TIMED_IMAGES) if device_config.device.type == "cpu" else recipe.batch
    shape, crop = plan_preprocessing(recipe, split.pixel_format), Crop(recipe.crop, recipe.scale, recipe.area)
    loader = TrainLoader(split, shape, Augmentation(flip=recipe.flip, crop=crop), batch_size, 0, device_config)
    batch = loader.batch(0)
    start = time.perf_counter()
    for step in (1, 2):
        loader.batch(step)
    loaded = (time.perf_counter() - start) / 2
    classes = int(split.labels.max()) + 1  # or label sets, each as a class: the head takes no time to speak of
    net = device_config.place(build(recipe.net, classes=classes, channels=shape.channels)).train()
    trained = sum(time_steps(net, batch.images, batch.labels, device_config, 2)) / 2
    return {"images_per_second": batch_size / loaded, "share_of_step": loaded / (loaded + trained)}
