"""The share of a training step's time that data loading takes."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import Split
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import select_device
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.recipe import Recipe


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
    loader = TrainLoader(split, shape, Augmentation(flip=recipe.flip), recipe.batch, 0, device_config, crop)
    batch = loader.batch(0)
    began = time.perf_counter()
    for step in (1, 2):
        loader.batch(step)
    loaded = (time.perf_counter() - began) / 2
    net = build(recipe.net, classes=classes)
    device_config.place(net).train()
    for step in range(3):
        if step == 1:
            began = time.perf_counter()
        with device_config.autocast():
            loss = F.cross_entropy(net(batch.images).float(), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # synchronises with the device
    trained = (time.perf_counter() - began) / 2
    return {"images_per_second": recipe.batch / loaded, "share_of_step": loaded / (loaded + trained)}
