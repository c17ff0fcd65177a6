"""Backends compute predictions: PyTorch, ONNX Runtime or OpenVINO, in fp32, bf16 or int8.

A backend is an entry of BACKENDS. It builds bytes from a model, which can be cached, and starts them as a function of images,
uint8 (B, h, w, C), to scores, float32 (B, classes). `select_backend` builds the installed ones, compares each with torch in
fp32 on the model's check images, and takes the fastest that agrees; or it takes one from the cache (`backend_cache`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from resnetlab.device import default_precision
from resnetlab.errors import UsageError, install_hint, missing_package, unknown_name_error
from resnetlab.inference.backend_cache import BackendCache, open_cache
from resnetlab.inference.export_graphs import PIXELS, ExportGraphs
from resnetlab.inference.inference_module import InferenceModule, compute_reference_scores
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.reference_images import exclude_images

PredictFn = Callable[[Tensor], Tensor]  # uint8 (B, h, w, C) -> float32 (B, classes)
PRECISIONS = ("auto", "fp32", "bf16", "int8")
PARITY_BOUNDS = {  # least top-1 agreement with torch in fp32, largest difference of a score
    "fp32": (1.0, 1e-3),
    "bf16": (0.99, 0.05),
    "int8": (0.9, 0.3),  # one of 16 images may get another class
}


@dataclass(frozen=True)
class Backend:
    """One runtime: its packages and precisions, how its program is built, and how that is started."""

    packages: tuple[str, ...]
    precisions: tuple[str, ...]  # best first
    build: Callable[[ExportGraphs, str], bytes]
    start: Callable[[bytes, ExportGraphs, str], PredictFn]

    def missing_packages(self) -> list[str]:
        """The required packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


PAUSE = 0.05  # seconds; longer than the threads of any backend spin while waiting for work
TIE = 0.005  # the reference's classes with scores this close count as tied: rounding may swap them


@dataclass(frozen=True)
class Agreement:
    """Agreement of scores with the reference's.

    Attributes:
        top1_agreement: share of images with the same best class, ties of the reference included.
        largest_difference: of a score.
    """

    top1_agreement: float
    largest_difference: float

    @staticmethod
    def between(scores: Tensor, expected: Tensor) -> Agreement:
        """Compares two tables of scores, (N, classes) each; scores that are not finite agree with nothing."""
        if scores.shape != expected.shape or not bool(scores.isfinite().all()):
            return Agreement(0.0, 1.0)
        reference = expected.gather(1, scores.argmax(1, keepdim=True))[
            :, 0
        ]  # the reference's score of that class; (N,)
        same = (reference >= expected.amax(1) - TIE).float().mean()
        return Agreement(float(same), float((scores - expected).abs().max()))

    def within(self, agreement: float, difference: float) -> bool:
        """Whether both figures are within the bounds."""
        return self.top1_agreement >= agreement and self.largest_difference <= difference

    def __str__(self) -> str:
        return f"top-1 agrees on {self.top1_agreement:.1%}, scores within {self.largest_difference:.2g}"


@dataclass(frozen=True)
class BackendChoice:
    """A backend built for a model, and the reason for choosing it."""

    name: str
    precision: str
    predict: PredictFn
    why: str
    program: bytes = b""  # what was built, for the cache

    def __str__(self) -> str:
        return f"{self.name} {self.precision} ({self.why})"


def _start_torch(program: bytes, graphs: ExportGraphs, precision: str) -> PredictFn:
    module, preprocessing = InferenceModule(graphs.model), graphs.model.preprocessing
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # pure bf16 after the normalisation, not autocast: the weights are converted once, not for every batch
    net = module.net.to(dtype).to(memory_format=torch.channels_last)

    def predict(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            x = preprocessing.normalise(pixels)
            return torch.softmax(net(x.to(dtype)).float() / module.temperature, 1)

    return predict


def _start_onnxruntime(program: bytes, graphs: ExportGraphs, precision: str) -> PredictFn:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _build_openvino(graphs: ExportGraphs, precision: str) -> bytes:
    import openvino

    compiled = openvino.compile_model(graphs.openvino(precision), "CPU", _openvino_settings(precision))
    content: bytes = compiled.export_model().getvalue()
    return content


def _openvino_settings(precision: str) -> dict[str, Any]:
    # the rest of an int8 graph is computed in bf16 if the hardware supports it
    hint = "bf16" if precision == "bf16" or (precision == "int8" and _cpu_has_bf16()) else "f32"
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time on all threads
    }


def _start_openvino(program: bytes, graphs: ExportGraphs, precision: str) -> PredictFn:
    import openvino

    compiled = openvino.Core().import_model(program, "CPU", _openvino_settings(precision))
    local = threading.local()  # a request computes one batch at a time, so each thread has its own

    def predict(pixels: Tensor) -> Tensor:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return torch.from_numpy(local.request.infer([pixels.numpy()], share_inputs=True)[0])

    return predict


BACKENDS: Mapping[str, Backend] = {
    "torch": Backend((), ("bf16", "fp32"), lambda graphs, precision: b"", _start_torch),
    "onnxruntime": Backend(
        ("onnx", "onnxscript", "onnxruntime"), ("fp32", "int8"), ExportGraphs.onnx, _start_onnxruntime
    ),
    "openvino": Backend(
        ("onnx", "onnxscript", "openvino", "nncf"), ("bf16", "fp32", "int8"), _build_openvino, _start_openvino
    ),
}
BACKEND_NAMES = ("auto", *BACKENDS)


def _build_choice(graphs: ExportGraphs, name: str, precision: str) -> BackendChoice:
    """Builds and starts one backend, without a reason yet."""
    program = BACKENDS[name].build(graphs, precision)
    return BackendChoice(name, precision, BACKENDS[name].start(program, graphs, precision), "", program)


def select_backend(
    model: TrainedModel,
    backend: str = "auto",
    precision: str = "auto",
    *,
    check_images: Tensor | None = None,
    calibration_images: Tensor | None = None,
    batch: int = 16,
    use_cache: bool = False,
) -> BackendChoice:
    """Builds the requested backend, or the fastest installed one that agrees with torch in fp32.

    Args:
        backend: "auto" or a name in BACKENDS; a named one is used whatever its agreement, which `why` reports.
        precision: "auto" is bf16 if the hardware supports it, else fp32; int8 is only used on request.
        check_images: to compare backends on, uint8 (n, h, w, C); by default those of the model file.
        calibration_images: to calibrate int8 on, likewise.
        batch: images in the batches that are timed.
        use_cache: load from the cache if possible, and write what is built to it.

    Raises:
        UsageError: an unknown name, a backend that is not installed or has no such precision, int8 without images.
    """
    if (images := model.reference_images) is not None:
        check_images = images.check if check_images is None else check_images
        calibration_images = images.training if calibration_images is None else calibration_images
    candidates = _find_candidates(backend, precision)
    if calibration_images is not None and check_images is not None:  # the user may have given some images for both
        calibration_images = exclude_images(calibration_images, check_images)
    if precision == "int8" and (calibration_images is None or not len(calibration_images)):
        raise UsageError(
            "int8 is calibrated on other images than it is evaluated on, and there are none in the model file; give some: "
            "--calibrate FOLDER"
        )
    graphs = ExportGraphs(model, calibration_images)
    if not use_cache:
        return _select(graphs, candidates, backend, precision, check_images, batch)
    request = {"candidates": candidates, "batch": batch, "backend": backend, "precision": precision}
    cache = open_cache(model, request, check_images, calibration_images)
    if (cached := _load_cached(cache, graphs)) is not None:
        return cached
    choice = _select(graphs, candidates, backend, precision, check_images, batch)
    cache.put("program", choice.program)
    cache.put("choice", json.dumps([choice.name, choice.precision, choice.why]).encode())
    return replace(choice, program=b"")


def _load_cached(cache: BackendCache, graphs: ExportGraphs) -> BackendChoice | None:
    """Starts the backend that an earlier process chose and built; None if there is none or it does not start."""
    choice, program = cache.get("choice"), cache.get("program")
    if choice is None or program is None:
        return None
    name, precision, why = json.loads(choice)
    try:
        predict = BACKENDS[name].start(program, graphs, precision)
    except RuntimeError:  # it is built again
        return None
    return BackendChoice(name, precision, predict, f"{why}; loaded from the cache")


def _select(
    graphs: ExportGraphs,
    candidates: Sequence[tuple[str, tuple[str, ...]]],
    backend: str,
    precision: str,
    check_images: Tensor | None,
    batch: int,
) -> BackendChoice:
    name, (best_precision, *_) = candidates[0]
    if check_images is None or not len(check_images):
        if backend == "auto" and precision == "auto":
            best_precision = "fp32"
        why = "as requested" if backend != "auto" else "there are no check images to compare other backends on"
        return replace(_build_choice(graphs, name, best_precision), why=why)
    expected = compute_reference_scores(graphs.model, check_images)
    if backend != "auto":
        choice = _build_choice(graphs, name, best_precision)
        agreement = Agreement.between(choice.predict(check_images), expected)
        return replace(choice, why=f"as requested; {agreement} with torch fp32 on {len(check_images)} check images")
    return _select_fastest(graphs, candidates, check_images, expected, batch)


def check_backend_request(backend: str, precision: str) -> None:
    """Raises UsageError for an unknown backend or precision."""
    if backend not in BACKEND_NAMES:
        raise unknown_name_error("backend", backend, BACKEND_NAMES)
    if precision not in PRECISIONS:
        raise unknown_name_error("precision", precision, PRECISIONS)


def _find_candidates(backend: str, precision: str) -> list[tuple[str, tuple[str, ...]]]:
    """(backend, its possible precisions, best first) of all that are installed; raises UsageError if there is none."""
    check_backend_request(backend, precision)
    automatic = ("bf16", "fp32") if _cpu_has_bf16() else ("fp32",)
    found = []
    for name, kind in BACKENDS.items():
        allowed = tuple(p for p in kind.precisions if p == precision or (precision == "auto" and p in automatic))
        if backend not in ("auto", name):
            continue
        if backend == name and not allowed:
            raise UsageError(f"{name} computes in {' or '.join(kind.precisions)} here, not in {precision}.")
        if backend == name and (missing := kind.missing_packages()):
            raise missing_package(name, missing[0], "openvino" if name == "openvino" else "onnx")
        if allowed and not kind.missing_packages():
            found.append((name, allowed))
    if not found:
        raise UsageError(
            f"no backend installed here computes in {precision}; this installs one: {install_hint('openvino')}"
        )
    return found


def _select_fastest(
    graphs: ExportGraphs,
    candidates: Sequence[tuple[str, tuple[str, ...]]],
    check_images: Tensor,
    expected: Tensor,
    batch: int,
) -> BackendChoice:
    """Takes the best agreeing precision of each backend, and the fastest of those."""
    agreeing: list[tuple[BackendChoice, Agreement]] = []
    rejected = []
    pixels = check_images[torch.arange(batch) % len(check_images)]  # (batch, h, w, C)
    for name, precisions in candidates:
        for precision in precisions:
            choice = _build_choice(graphs, name, precision)
            agreement = Agreement.between(choice.predict(check_images), expected)
            if agreement.within(*PARITY_BOUNDS[precision]):
                agreeing.append((choice, agreement))
                break
            rejected.append(f"{name} {precision} does not agree ({agreement})")
    if not agreeing:
        return replace(_build_choice(graphs, "torch", "fp32"), why="; ".join(rejected))
    times = measure_seconds([choice.predict for choice, _ in agreeing], pixels)
    (best, (choice, agreement)), *rest = sorted(zip(times, agreeing, strict=True), key=lambda row: row[0])
    slower = [f"{other.name} {other.precision} takes {s / best:.2f} times as long" for s, (other, _) in rest]
    reasons = [f"{agreement} with torch fp32 on {len(check_images)} check images", *slower, *rejected]
    return replace(choice, why="; ".join(reasons))


def measure_seconds(functions: Sequence[PredictFn], pixels: Tensor, budget: float = 0.5) -> list[float]:
    """Measures the minimum time of a batch for each function, in rounds within the budget (seconds), at least three.

    The functions take turns, so that other load on the machine affects all of them. A turn begins with a pause and uncounted
    batches, because the threads of the previous runtime hold the cores for a while, waiting for more work.
    """
    best, start, n = [float("inf")] * len(functions), time.perf_counter(), 0
    while n < 3 or (time.perf_counter() - start < budget * len(functions) and n < 50):
        for k, predict in enumerate(functions):
            time.sleep(PAUSE)
            _measure_min_seconds(predict, pixels)
            best[k] = min(best[k], _measure_min_seconds(predict, pixels))
        n += 1
    return best


def _measure_min_seconds(predict: PredictFn, pixels: Tensor) -> float:
    """Measures the minimum time of a batch, of as many as fit into PAUSE, at least one."""
    best, start = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) - start < PAUSE:
        predict(pixels)
        best = min(best, time.perf_counter() - before)
    return best


def _cpu_has_bf16() -> bool:
    return default_precision(torch.device("cpu")) == "bf16"
