"""Whole runs on a simulated GPU and on a simulated MPS, and what is done with their models: equal to what a CPU computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cells
import resnetlab
from resnetlab.data.objects import dataset_from_object
from resnetlab.device import select_device, standard_torch_state
from resnetlab.training.annotated_recipes import boxes, masks
from resnetlab.training.train import RunOptions, start_run
from simulated_gpu import GPU, MPS, record_graphs, simulated_gpu
from test_gpu_path import annotated
from tiny_runs import tiny

DRAWS = np.random.default_rng(0)
IMAGES = [DRAWS.integers(256, size=(9, 8), dtype=np.uint8) for _ in range(4)]
LABEL_SETS = DRAWS.integers(256, size=(80, 8, 8, 1), dtype=np.uint8), DRAWS.random((80, 3)) < 0.5


def use(model: Any, data: Any) -> tuple[list[Tensor], list[Any]]:
    """What is done with a classifier: numbers that are nearly equal on all devices, and values that are equal."""
    model.select_backend("torch", "fp32")
    model.select_backend("torch", "fp32", output="features")
    every = {"top": len(model.classes)}
    predictions = [model.predict(IMAGES, **every, protocol=protocol) for protocol in (None, None, "flip")]
    fit_on = None if model.multi_label else 100  # images, for a temperature
    explained = model.explain(IMAGES[0])
    evaluated = resnetlab.evaluate(model, data, fit_on=fit_on, device=str(model.device), precision="fp32")
    scores = [[dict(each.top)[name] for name in model.classes] for found in predictions for each in found]
    kept = {key: value for key, value in evaluated.to_dict().items() if isinstance(value, int | str)}
    temperature = torch.tensor(evaluated.trained_models[0].temperature)
    numbers = [torch.tensor(scores), model.embed(IMAGES), model.embed(IMAGES), explained.heat, temperature]
    return numbers, [kept, explained.top[0][0], [each.labels for each in predictions[0]]]


def test_auto_takes_mps_in_fp32_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch, MPS):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        for training in (True, False):
            config = select_device(training=training)
            assert (config.device.type, config.precision) == ("mps", "fp32") and "was not checked" in config.reason
        with select_device("bf16", "mps", training=True).autocast():
            assert torch.is_autocast_enabled("mps") and torch.get_autocast_dtype("mps") == torch.bfloat16


@pytest.mark.parametrize("place", [GPU, MPS], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
def test_a_classifier_trained_on_a_gpu_is_used_on_it_as_on_a_cpu(
    several: bool, place: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights kept at their best, averaged and calibrated; thresholds; scores, features, explanations, evaluations."""
    recorded = record_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1)
    data: Any = LABEL_SETS if several else "digits"
    values: dict[str, Any] = {"data": "python"} if several else {}
    recipe = tiny(steps=4, eval_every=2, keep="best", ema_decay=0.5, clip_norm=1.0, mixup=0.1, val_images=24, **values)
    with simulated_gpu(monkeypatch, place) as gpu, standard_torch_state():
        options = RunOptions(device=str(place), dataset=dataset_from_object(data) if several else None)
        result = start_run(recipe, tmp_path / "run", options)
        found, values = use(resnetlab.load(result.model, device=str(place)), data)
        assert gpu.float64 == set() and gpu.reused == []
    assert bool(recorded) is (place is GPU)
    expected, others = use(resnetlab.load(result.model, device="cpu"), data)
    assert values == others
    for x, y in zip(found, expected, strict=True):
        assert x.device.type == "cpu"
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("place", [GPU, MPS], ids=str)
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_detector_or_segmenter_trained_on_a_gpu_is_used_on_it_as_on_a_cpu(
    task: str, place: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1)
    folder = cells.make_voc_folder(tmp_path / "voc", 4, 2)
    if task == "detect":
        recipe: Any = annotated(boxes(), folder, regions=16, pyramid=8, sides=(66,), longest=96)
    else:
        recipe = annotated(masks(), folder, sides=(80,), head="deeplab")
    image, found = np.array(cells.scene(7)[0].convert("RGB")), []
    with simulated_gpu(monkeypatch, place) as gpu, standard_torch_state():
        result = start_run(recipe.rescale(2), tmp_path / "run", RunOptions(device=str(place), workers=0))
        found.append(resnetlab.load(result.model, device=str(place)).predict(image))
        assert gpu.float64 == set() and gpu.reused == []
    found.append(resnetlab.load(result.model, device="cpu").predict(image))
    assert found[0] == found[1]
