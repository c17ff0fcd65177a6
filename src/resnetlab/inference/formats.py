"""Export formats, each with the runtime that reads its files: one entry of FORMATS per format.

A format writes a file and reads it back as a function from images of any size, uint8 (B, H, W, C), to scores, float32
(B, classes). If its runtime is also a backend of predictions, the format builds a program from a model, as bytes that can be
cached, and starts it as a function of resized and cropped images, uint8 (B, h, w, C), to scores or features.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetlab.device import default_precision
from resnetlab.errors import RunError, UsageError, unknown_name_error
from resnetlab.inference.export_graphs import PIXELS, ExportGraphs, export_metadata, export_resize, openvino_core
from resnetlab.inference.inference_module import InferenceModule
from resnetlab.inference.state_dict_export import list_differences, write_state_dict
from resnetlab.models.model_file import TrainedModel
from resnetlab.peer_words import FORMAT_ANSWERS

# ONNX Runtime's providers for GPUs, with the settings under which they compute in fp32, as is checked
GPU_PROVIDERS: Mapping[str, Mapping[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
    "TensorrtExecutionProvider": {"trt_fp16_enable": "0", "trt_int8_enable": "0"},
}
# OpenVINO computes in bf16 by default where the processor does
OPENVINO_FP32: Mapping[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
PredictFn = Callable[[Tensor], Tensor]  # images, uint8 -> scores, float32 (B, classes), or features (B, C)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The runtime of a format as a backend of predictions.

    Attributes:
        precisions: best first.
        batches_at_once: how many a service computes at the same time, so that no core is idle where one ends.
    """

    name: str
    precisions: tuple[str, ...]
    build: Callable[[ExportGraphs, str], bytes]
    start: Callable[[bytes, ExportGraphs, str], PredictFn]
    batches_at_once: int = 1


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A file format.

    Attributes:
        suffixes: of the file; the first one is the default.
        packages: required ones, which the `extra` of this package installs.
        write: writes the file in one of the `precisions`.
        read: loads the file with its runtime; None for weights only, whose scores cannot be checked.
        settings: of its runtime on a CPU under which the file is compared, where that computes something else by default.
        providers: what else its runtime computes on, which need not be here: name -> settings to run it with.
        read_on: loads the file on one of those; None if it is not here.
        notes: what the programs that read the file compute differently.
    """

    suffixes: tuple[str, ...]
    write: Callable[[ExportGraphs, str, Path], object]
    read: Callable[[Path], PredictFn] | None
    precisions: tuple[str, ...] = ("fp32",)
    packages: tuple[str, ...] = ()
    extra: str = ""
    backend: Backend | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    providers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    read_on: Callable[[Path, str], PredictFn | None] = lambda file, provider: None
    notes: Callable[[TrainedModel], list[str]] = lambda model: []

    def missing_packages(self) -> list[str]:
        """The required packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def cpu_has_bf16() -> bool:
    """Whether the CPU computes bf16."""
    return default_precision(torch.device("cpu")) == "bf16"


def _write_torch(graphs: ExportGraphs, precision: str, file: Path) -> None:
    program = export_resize(graphs.model, InferenceModule(graphs.model))
    torch.export.save(program, str(file), extra_files=dict(export_metadata(graphs.model)))


def _open_torch(file: Path) -> PredictFn:
    module: PredictFn = torch.export.load(str(file)).module()
    return module


def _start_torch(program: bytes, graphs: ExportGraphs, precision: str) -> PredictFn:
    module, preprocessing = InferenceModule(graphs.model, graphs.output), graphs.model.preprocessing
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # pure bf16 after the normalisation, not autocast: the weights are converted once, not for every batch
    net = module.net.to(dtype).to(memory_format=torch.channels_last)

    def predict(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            x = preprocessing.normalise(pixels)
            return module.finish(net(x.to(dtype)).float(), module.temperature, module.multi_label)

    return predict


def _write_onnx(graphs: ExportGraphs, precision: str, file: Path) -> None:
    file.write_bytes(graphs.onnx(precision, any_size=True))


def _write_aotinductor(graphs: ExportGraphs, precision: str, file: Path) -> None:
    """A library of kernels compiled for the GPU of this machine, or else for its CPU."""
    from torch._inductor import aoti_compile_and_package
    from torch.export.passes import move_to_device_pass

    program = export_resize(graphs.model, InferenceModule(graphs.model))
    if torch.cuda.is_available():
        program = move_to_device_pass(program, f"cuda:{torch.cuda.current_device()}")
        program.graph_module.recompile()  # torch 2.11 leaves the code of the CPU's graph: on a GPU the library crashed
    settings = {"aot_inductor.metadata": dict(export_metadata(graphs.model))}
    try:
        aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
    except Exception as error:  # of many kinds: a compiler that is missing, or fails
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"torch cannot compile the network here ({reason[:300]}); use --to torch.") from error


def _open_aotinductor(file: Path) -> PredictFn:
    package: Any = torch._inductor.aoti_load_package(str(file))
    device = package.get_metadata()["AOTI_DEVICE_KEY"]
    return lambda pixels: package(pixels.to(device)).cpu()


def _run_onnx(source: str | bytes, provider: str = "CPUExecutionProvider") -> PredictFn:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers = [provider] if provider not in GPU_PROVIDERS else [(provider, dict(GPU_PROVIDERS[provider]))]
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    if session.get_providers()[0] != provider:  # it falls back to the CPU
        raise RunError(f"ONNX Runtime has {provider} but cannot start it; see what it logs.")
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _run_onnx_on(file: Path, provider: str) -> PredictFn | None:
    import onnxruntime

    return _run_onnx(str(file), provider) if provider in onnxruntime.get_available_providers() else None


def _write_openvino(graphs: ExportGraphs, precision: str, file: Path) -> None:
    import openvino

    openvino.save_model(graphs.openvino(precision, any_size=True), str(file), compress_to_fp16=False)


def _open_openvino(file: Path) -> PredictFn:
    settings = {**OPENVINO_FP32, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino_core().compile_model(str(file), "CPU", settings)
    return lambda pixels: torch.from_numpy(compiled([pixels.numpy()])[0].copy())


def _openvino_settings(precision: str) -> dict[str, Any]:
    # the rest of an int8 graph is computed in bf16 if the hardware supports it
    hint = "bf16" if precision == "bf16" or (precision == "int8" and cpu_has_bf16()) else "f32"
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one image at a time on all threads
    }


def _build_openvino(graphs: ExportGraphs, precision: str) -> bytes:
    compiled = openvino_core().compile_model(graphs.openvino(precision), "CPU", _openvino_settings(precision))
    content: bytes = compiled.export_model().getvalue()
    return content


def _start_openvino(program: bytes, graphs: ExportGraphs, precision: str) -> PredictFn:
    """A function that several threads may call; their batches are then computed beside each other.

    A batch is divided into parts, each of which has a core, or a few, to itself. Cores that share an image wait for each other
    in every layer, and longer where one of them also decodes the next images or runs another program. Batches of fewer images
    than there are such streams are computed by all cores together.
    """
    settings = _openvino_settings(precision)
    together = openvino_core().import_model(program, "CPU", settings)
    apart = openvino_core().import_model(program, "CPU", settings | {"PERFORMANCE_HINT": "THROUGHPUT"})
    streams = apart.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    local = threading.local()  # a request computes one batch at a time, so each thread has its own

    def predict(pixels: Tensor) -> Tensor:
        if not hasattr(local, "request"):
            local.request = together.create_infer_request()
            local.requests = [apart.create_infer_request() for _ in range(2 * streams)]
        if len(pixels) < max(2, streams):
            return torch.from_numpy(local.request.infer([pixels.numpy()], share_inputs=True)[0])
        # twice as many parts as streams: a stream that is disturbed takes fewer
        requests = local.requests[: len(pixels)]
        with contextlib.ExitStack() as running:  # an error leaves it when all have ended
            for request, part in zip(requests, pixels.tensor_split(len(requests)), strict=True):
                request.start_async([part.numpy()], share_inputs=True)
                running.callback(request.wait)
        return torch.cat([torch.from_numpy(request.results[0]) for request in requests])

    return predict


FORMATS: Mapping[str, ExportFormat] = {
    "torch": ExportFormat(  # torch.export
        suffixes=(".pt2",),
        write=_write_torch,
        read=_open_torch,
        backend=Backend(name="torch", precisions=("bf16", "fp32"), build=lambda *_: b"", start=_start_torch),
    ),
    "onnx": ExportFormat(
        suffixes=(".onnx",),
        precisions=("fp32", "int8"),
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        write=_write_onnx,
        read=lambda file: _run_onnx(str(file)),
        providers=GPU_PROVIDERS,
        read_on=_run_onnx_on,
        backend=Backend(
            name="onnxruntime",
            precisions=("fp32", "int8"),
            build=lambda graphs, precision: graphs.onnx(precision),
            start=lambda program, graphs, precision: _run_onnx(program),
        ),
    ),
    "aotinductor": ExportFormat(suffixes=(".pt2",), write=_write_aotinductor, read=_open_aotinductor),
    "openvino": ExportFormat(  # IR: FILE.xml and FILE.bin
        suffixes=(".xml",),
        precisions=("fp32", "int8"),
        packages=("onnx", "onnxscript", "openvino", "nncf"),
        extra="openvino",
        write=_write_openvino,
        read=_open_openvino,
        settings=OPENVINO_FP32,
        backend=Backend(
            name="openvino",
            precisions=("bf16", "fp32", "int8"),
            build=_build_openvino,
            start=_start_openvino,
            batches_at_once=2,
        ),
    ),
    "torchvision": ExportFormat(  # a state_dict with torchvision's names
        suffixes=(".pth", ".safetensors"),
        write=lambda graphs, precision, file: write_state_dict(graphs.model, file),
        read=None,
        notes=lambda model: list_differences(model.spec),
    ),
}


def get_format(name: str) -> ExportFormat:
    """The format of a name; raises UsageError for an unknown one."""
    if answer := name not in FORMATS and FORMAT_ANSWERS.get(name.lower()):
        raise UsageError(f"there is no format {name!r}; {answer}")
    if name not in FORMATS:
        raise unknown_name_error("target", name, FORMATS)
    return FORMATS[name]


def find_format(suffix: str) -> str:
    """The name of the format whose files have a suffix, such as ".onnx"; raises UsageError if there is none."""
    found = [name for name, format in FORMATS.items() if suffix in format.suffixes]
    if not found:
        known = ", ".join(dict.fromkeys(suffix for format in FORMATS.values() for suffix in format.suffixes))
        what = f"no format has files that end in {suffix!r}" if suffix else "the file's ending decides the format"
        raise UsageError(f"{what}; {FORMAT_ANSWERS.get(suffix.lower().lstrip('.'), f'known: {known}.')}")
    return found[0]
