"""Selects the backend that computes a model's scores or features: PyTorch, ONNX Runtime or OpenVINO, in fp32, bf16 or int8.

`select_backend` is the only place that decides. On a CPU it builds the installed backends, compares each with torch in fp32
on the model's reference images, and takes the fastest that agrees; or it loads one from the cache (`backend_cache`). On a GPU,
and for a few images, it takes torch; on a GPU in bf16 only if that agrees too, and replayed from CUDA graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from resnetlab.device import DeviceConfig, eval_mode, select_device, to_device
from resnetlab.errors import DataError, UsageError, install_hint, missing_package, unknown_name_error
from resnetlab.graph_capture import GraphedFunction
from resnetlab.inference.backend_cache import BackendCache, open_cache
from resnetlab.inference.export_graphs import ExportGraphs
from resnetlab.inference.formats import FORMATS, Backend, ExportFormat, PredictFn, cpu_has_bf16
from resnetlab.inference.inference_module import compute_reference
from resnetlab.inference.outputs import OUTPUTS, SCORES, Agreement, Output
from resnetlab.inference.parity_check import measure_seconds
from resnetlab.models.fold import fold_batchnorm
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OwnNetwork
from resnetlab.models.reference_images import exclude_images
from resnetlab.progress import log

BACKENDS: Mapping[str, tuple[Backend, ExportFormat]] = {
    format.backend.name: (format.backend, format) for format in FORMATS.values() if format.backend
}
PRECISIONS = ("auto", "fp32", "bf16", "int8")
FEW_IMAGES = 64  # torch predicts these sooner than another backend is built
TIMED_BATCH = 16  # images
MAX_GRAPHS = 16  # sizes of batches that a GPU has a CUDA graph for


@dataclass(frozen=True, kw_only=True)
class BackendRequest:
    """A request for a backend.

    Attributes:
        backend: "auto" or a name in BACKENDS; a named one is used whatever its agreement, which is reported.
        precision: "auto" is bf16 if the hardware supports it, else fp32; int8 is only used on request.
        check_images: to compare backends on, uint8 (n, h, w, C); by default those of the model file.
        calibration_images: to calibrate int8 on, likewise.
        num_images: how many images will be predicted, if known.
        use_cache: load from the cache if possible, and write what is built to it.
        output: "scores" or "features".
    """

    backend: str = "auto"
    precision: str = "auto"
    check_images: Tensor | None = None
    calibration_images: Tensor | None = None
    num_images: int | None = None
    use_cache: bool = False
    output: str = SCORES.name


@dataclass(frozen=True)
class LoadedBackend:
    """A backend that is ready to predict, and the reason for selecting it."""

    name: str
    precision: str
    predict: PredictFn
    reason: str
    program: bytes = b""  # what was built, for the cache

    def __str__(self) -> str:
        return f"{self.name} {self.precision} ({self.reason})"


def load_network(
    model: TrainedModel, device_config: DeviceConfig, net: nn.Module | None = None, output: Output = SCORES
) -> LoadedBackend:
    """The model's own network, or `net`, which ends at what is computed, in torch, on its device and in its precision."""

    def predict(pixels: Tensor) -> Tensor:
        network = net or output.end(model.net)  # the model's may be exchanged
        with eval_mode(network), device_config.autocast():
            found = network(model.preprocessing.normalise(to_device(pixels, device_config.device)))
        return output.finish(found.float().cpu(), model.temperature, model.multi_label)

    return LoadedBackend("torch", device_config.precision, predict, str(device_config))


def select_backend(
    model: TrainedModel, request: BackendRequest | None = None, device: torch.device | None = None
) -> LoadedBackend:
    """Loads the requested backend, or the fastest installed one that agrees with torch in fp32.

    Args:
        device: of the model's network; the CPU by default.

    Raises:
        UsageError: an unknown name, a backend that is not installed or has no such precision, int8 without images.
    """
    request = request or BackendRequest()
    if request.output not in OUTPUTS:
        raise unknown_name_error("output", request.output, OUTPUTS)
    output = OUTPUTS[request.output]
    check_backend_request(request.backend, request.precision)
    if device is not None and device.type != "cpu":
        if request.backend not in ("auto", "torch"):
            raise UsageError(f"{request.backend} computes on the CPU here; use --backend torch, or --device cpu.")
        if request.precision == "int8":
            raise UsageError("torch computes in bf16 or fp32 here, not in int8; --device cpu has backends that do.")
        return _load_folded_network(model, request, select_device(request.precision, str(device)))
    few = request.num_images is not None and request.num_images <= FEW_IMAGES
    if few and request.backend == "auto" and request.precision != "int8":
        reason = f"for {FEW_IMAGES} images or fewer building another takes longer than it saves"
        graphs = ExportGraphs(model, output=output)
        return _build_backend(graphs, "torch", request.precision.replace("auto", "fp32"), reason)
    request = _complete_request(model, request)
    candidates = _find_candidates(request)
    graphs = ExportGraphs(model, request.calibration_images, output)
    if not request.use_cache or isinstance(model.net, OwnNetwork):  # whose code the cache does not know
        return _select(graphs, candidates, request)
    key = {"candidates": candidates, "backend": request.backend, "precision": request.precision, "output": output.name}
    cache = open_cache(model, key | {"batch": TIMED_BATCH}, request.check_images, request.calibration_images)
    if (cached := _load_cached(cache, graphs, request)) is not None:
        return cached
    selected = _select(graphs, candidates, request)
    cache.put("program", selected.program)
    cache.put("choice", json.dumps([selected.name, selected.precision, selected.reason]).encode())
    return replace(selected, program=b"")


def _load_folded_network(model: TrainedModel, request: BackendRequest, device_config: DeviceConfig) -> LoadedBackend:
    """The network in torch on its device, with BN folded; bf16 only if it agrees with fp32, or is asked for."""
    output = OUTPUTS[request.output]
    net = device_config.place(output.end(fold_batchnorm(model.net)))
    if device_config.device.type == "cuda" and not isinstance(model.net, OwnNetwork):
        net.forward = GraphedFunction(net.forward, MAX_GRAPHS)
    loaded = load_network(model, device_config, net, output)
    images = _complete_request(model, request).check_images
    if device_config.precision == "fp32":
        return loaded
    if images is None or not len(images):
        reason = f"there are no reference images to compare {device_config.precision} on"
        if request.precision != "auto":
            return replace(loaded, reason=f"{loaded.reason}; {reason}")
    else:
        agreement = output.compare(loaded.predict(images), compute_reference(model, images, output))
        reason = f"{device_config.precision}: {agreement} with torch fp32 on {len(images)} reference images"
        if request.precision != "auto" or agreement.within(*output.bounds[device_config.precision]):
            return replace(loaded, reason=f"{loaded.reason}; {reason}")
    return load_network(model, replace(device_config, precision="fp32", reason=reason), net, output)


def check_backend_request(backend: str, precision: str, calibrate: Path | None = None) -> None:
    """Raises UsageError for an unknown backend or precision, DataError if there is no folder to calibrate on."""
    if backend not in ("auto", *BACKENDS):
        raise unknown_name_error("backend", backend, ("auto", *BACKENDS))
    if precision not in PRECISIONS:
        raise unknown_name_error("precision", precision, PRECISIONS)
    if calibrate is not None and not calibrate.is_dir():
        raise DataError(f"{calibrate} is not a folder; --calibrate takes a folder of images.")


def _complete_request(model: TrainedModel, request: BackendRequest) -> BackendRequest:
    """Adds the model file's images where none are given; no image is used for both purposes."""
    check, calibration = request.check_images, request.calibration_images
    if (images := model.reference_images) is not None:
        check = images.check if check is None else check
        calibration = images.training if calibration is None else calibration
    if calibration is not None and check is not None:  # the user may have given some images for both
        calibration = exclude_images(calibration, check)
    if request.precision == "int8" and (calibration is None or not len(calibration)):
        raise UsageError(
            "int8 is calibrated on other images than it is evaluated on, and there are none in the model file; give some: "
            "--calibrate FOLDER"
        )
    return replace(request, check_images=check, calibration_images=calibration)


def _find_candidates(request: BackendRequest) -> list[tuple[str, tuple[str, ...]]]:
    """(backend, its possible precisions, best first) of all that are installed; raises UsageError if there is none."""
    precision, automatic = request.precision, ("bf16", "fp32") if cpu_has_bf16() else ("fp32",)
    found = []
    for name, (backend, format) in BACKENDS.items():
        allowed = tuple(p for p in backend.precisions if p == precision or (precision == "auto" and p in automatic))
        if request.backend not in ("auto", name):
            continue
        if request.backend == name and not allowed:
            raise UsageError(f"{name} computes in {' or '.join(backend.precisions)} here, not in {precision}.")
        missing = format.missing_packages()
        if request.backend == name and missing:
            raise missing_package(name, missing[0], format.extra)
        if allowed and not missing:
            found.append((name, allowed))
    if not found:
        raise UsageError(
            f"no backend installed here computes in {precision}; this installs one: {install_hint('openvino')}"
        )
    return found


def _build_backend(graphs: ExportGraphs, name: str, precision: str, reason: str = "") -> LoadedBackend:
    """Builds and starts one backend."""
    backend, _ = BACKENDS[name]
    program = backend.build(graphs, precision)
    return LoadedBackend(name, precision, backend.start(program, graphs, precision), reason, program)


def _load_cached(cache: BackendCache, graphs: ExportGraphs, request: BackendRequest) -> LoadedBackend | None:
    """Starts the backend that an earlier process selected and built, and compares it with torch.

    None if there is none, or if anything about it is wrong: then it is built again.
    """
    choice, program = cache.get("choice"), cache.get("program")
    if choice is None or program is None:
        return None
    try:
        name, precision, reason = json.loads(choice)
        predict = BACKENDS[name][0].start(program, graphs, precision)
        images, preprocessing = request.check_images, graphs.model.preprocessing
        if images is None or not len(images):
            images = preprocessing.blank_image(*preprocessing.size)[None] + preprocessing.white // 2 + 1
        agreement = graphs.output.compare(predict(images), compute_reference(graphs.model, images, graphs.output))
    except Exception:  # the runtimes raise errors of many types
        return None
    # a backend that was asked for is used whatever its agreement, which its reason states
    wanted = request.backend != "auto" and (str(agreement) in reason or request.check_images is None)
    if not wanted and not agreement.within(*graphs.output.bounds[precision]):
        return None
    return LoadedBackend(name, precision, predict, f"{reason}; loaded from the cache")


def _select(
    graphs: ExportGraphs, candidates: Sequence[tuple[str, tuple[str, ...]]], request: BackendRequest
) -> LoadedBackend:
    (name, (precision, *_)), check_images = candidates[0], request.check_images
    if check_images is None or not len(check_images):
        if request.backend == "auto":
            precision = "fp32" if request.precision == "auto" else precision
            reason = "there are no reference images to compare other backends on"
            return _build_backend(graphs, name, precision, reason)
        return _build_backend(graphs, name, precision, "as requested")
    expected = compute_reference(graphs.model, check_images, graphs.output)
    if request.backend != "auto":
        built = _build_backend(graphs, name, precision)
        agreement = graphs.output.compare(built.predict(check_images), expected)
        reason = f"as requested; {agreement} with torch fp32 on {len(check_images)} reference images"
        return replace(built, reason=reason)
    return _select_fastest(graphs, candidates, check_images, expected)


def _select_fastest(
    graphs: ExportGraphs, candidates: Sequence[tuple[str, tuple[str, ...]]], check_images: Tensor, expected: Tensor
) -> LoadedBackend:
    """Takes the best agreeing precision of each backend, and the fastest of those."""
    agreeing: list[tuple[LoadedBackend, Agreement]] = []
    rejected = []
    if len(candidates) > 1:
        log(
            f"comparing {', '.join(name for name, _ in candidates)}, once, for a minute or more where other programs work "
            "(--backend torch starts at once); the next start takes the fastest at once"
        )
    for name, precisions in candidates:
        for precision in precisions:
            try:
                built = _build_backend(graphs, name, precision)
            except UsageError as error:  # a network of the user's own that cannot be traced
                rejected.append(f"not {name}: {str(error).rstrip('.')}")
                break
            agreement = graphs.output.compare(built.predict(check_images), expected)
            if agreement.within(*graphs.output.bounds[precision]):
                agreeing.append((built, agreement))
                break
            rejected.append(f"{name} {precision} does not agree ({agreement})")
    if not agreeing:
        return _build_backend(graphs, "torch", "fp32", "; ".join(rejected))
    pixels = check_images[torch.arange(TIMED_BATCH) % len(check_images)]  # (TIMED_BATCH, h, w, C)
    times = measure_seconds([built.predict for built, _ in agreeing], pixels) if len(agreeing) > 1 else [0.0]
    (best, (fastest, agreement)), *rest = sorted(zip(times, agreeing, strict=True), key=lambda row: row[0])
    slower = [f"{other.name} {other.precision} takes {s / best:.2f} times as long" for s, (other, _) in rest]
    reasons = [f"{agreement} with torch fp32 on {len(check_images)} reference images", *slower, *rejected]
    return replace(fastest, reason="; ".join(reasons))
