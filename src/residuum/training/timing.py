"""How much of a training step goes into making its pictures ready."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.dataset import Pictures
from residuum.data.loader import Loader
from residuum.models.resnet import build
from residuum.preprocessing import Preprocessing
from residuum.runtime import pick_engine
from residuum.training.recipe import Recipe


def loading(split: Pictures, recipe: Recipe, classes: int, device: str = "auto") -> dict[str, float]:
    """Times the loader (one process) and the network's step under a recipe's values, each over two batches.

    Returns:
        `images_per_second`, of the loader, and `share_of_step`, its time as a fraction of a step that waits for it.
    """
    engine = pick_engine(recipe.precision, device)
    shape = Preprocessing(3, (recipe.size, recipe.size), recipe.resize or recipe.size, torch.zeros(3), torch.ones(3))
    crop = Crop(recipe.crop, recipe.scale, recipe.area)
    loader = Loader(split, shape, Augmentation(flip=recipe.flip), recipe.batch, 0, engine, crop)
    batch = loader.batch(0)
    began = time.perf_counter()
    for step in (1, 2):
        loader.batch(step)
    loaded = (time.perf_counter() - began) / 2
    net = build(recipe.net, classes=classes)
    engine.place(net).train()
    for step in range(3):
        if step == 1:
            began = time.perf_counter()
        with engine.autocast():
            loss = F.cross_entropy(net(batch.pictures).float(), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # waits for the device
    trained = (time.perf_counter() - began) / 2
    return {"images_per_second": recipe.batch / loaded, "share_of_step": loaded / (loaded + trained)}
