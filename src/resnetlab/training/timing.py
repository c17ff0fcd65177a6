"""Training steps for measurements: their time, and the share of it that data loading takes."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import Split
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import DeviceConfig, select_device
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.recipe import Recipe


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


def time_data_loading(split: Split, recipe: Recipe, classes: int, device: str = "auto") -> dict[str, float]:
    """Times the loader (one process) and the training step of a recipe, each over two batches.

    Returns:
        `images_per_second` of the loader, and `share_of_step`, its time as a fraction of loading and training.
    """
    device_config = select_device(recipe.precision, device)
    shape = Preprocessing(
        3,
        (recipe.image_size, recipe.image_size),
        recipe.eval_resize or recipe.image_size,
        torch.zeros(3),
        torch.ones(3),
    )
    crop = Crop(recipe.crop, recipe.scale, recipe.area)
    loader = TrainLoader(split, shape, Augmentation(flip=recipe.flip, crop=crop), recipe.batch, 0, device_config)
    batch = loader.batch(0)
    start = time.perf_counter()
    for step in (1, 2):
        loader.batch(step)
    loaded = (time.perf_counter() - start) / 2
    net = device_config.place(build(recipe.net, classes=classes)).train()
    trained = sum(time_steps(net, batch.images, batch.labels, device_config, 2)) / 2
    return {"images_per_second": recipe.batch / loaded, "share_of_step": loaded / (loaded + trained)}
