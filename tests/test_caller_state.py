"""What the caller has switched on in torch changes no result, and is as it was afterwards."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import resnetlab
from resnetlab.evaluation.label_errors import out_of_fold_scores
from resnetlab.inference.embed import EmbeddingRow
from resnetlab.inference.explain import explain
from resnetlab.inference.export import export_weights
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.inference.neighbours import FeatureIndex
from resnetlab.training.train import RunOptions, start_run
from tiny_runs import tiny


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextlib.contextmanager
def no_grad_and_flags() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.conv.fp32_precision = "none"
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def inference_mode_and_device() -> Iterator[None]:
    with torch.inference_mode(), torch.device("meta"):
        yield


def read_state() -> list[object]:
    """Everything that a caller may have switched on."""
    backends = torch.backends
    parts = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    return [
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        (backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
        *(part.fp32_precision for part in parts),
    ]


def compute_everything(out: Path, precision: str) -> list[object]:
    """What training, evaluation, prediction, explanation and export give."""
    recipe = replace(tiny(precision=precision), steps=3)
    result = start_run(recipe, out, RunOptions(device="cpu"))
    model = resnetlab.load(result.model, device="cpu")
    assert not any(p.is_inference() for p in model.net.parameters())  # it can be trained further
    image = Image.linear_gradient("L").resize((9, 8))
    evaluation = resnetlab.evaluate(model, "digits", precision=precision, device="cpu")
    export_weights(model, "torchvision", out / "weights.safetensors")
    imported, _ = import_weights(out / "weights.safetensors", ImportOptions())
    vectors = model.embed([image, image.rotate(90), image.rotate(180)])
    index = FeatureIndex.from_rows(EmbeddingRow(str(i), "", "", vector) for i, vector in enumerate(vectors))
    scores = out_of_fold_scores(vectors.repeat(4, 1), torch.arange(12, device="cpu") % 2, 2, 0)
    return [
        hashlib.sha256(Path(result.model).read_bytes()).hexdigest(),
        evaluation.metrics.loss,
        model.predict(image),
        {name: tensor.tolist() for name, tensor in imported.net.state_dict().items()},
        (vectors.tolist(), index.features.tolist(), index.search(vectors, 3), scores.tolist()),
        explain(model, model.preprocessing(image)).to_json(),
        {name: tensor.tolist() for name, tensor in load_file(out / "weights.safetensors").items()},
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    folder = tmp_path_factory.mktemp("plain")
    return {precision: compute_everything(folder / precision, precision) for precision in ("fp32", "bf16")}


@pytest.mark.parametrize("state", [autocast, no_grad_and_flags, inference_mode_and_device])
def test_results_do_not_depend_on_what_the_caller_has_switched_on(
    state: Callable[[], contextlib.AbstractContextManager[None]], expected: dict[str, list[object]], tmp_path: Path
) -> None:
    with state():
        before = read_state()
        assert compute_everything(tmp_path / "fp32", "fp32") == expected["fp32"]
        if state is autocast:
            assert compute_everything(tmp_path / "bf16", "bf16") == expected["bf16"]
        assert read_state() == before
