"""What computes the answers: PyTorch, ONNX Runtime or OpenVINO, in fp32, bf16 or int8; and which of them is the fastest here.

An engine is a value of the table ENGINES. What it runs is made of a model, which takes its time, and can be kept as bytes;
started, it is a function of pictures, uint8 (B, h, w, C), to scores, float32 (B, classes). `choose` builds those that are
installed, holds each to what torch says in fp32 of the model's check pictures, and takes the fastest of those that agree; or
it takes what an earlier start has kept (`use.kept`).
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

from residuum.errors import UsageError, unknown
from residuum.models.bundle import Bundle
from residuum.models.samples import apart
from residuum.runtime import automatic_precision
from residuum.use.graphs import PIXELS, Graphs
from residuum.use.kept import Kept, kept
from residuum.use.whole import Whole, reference

Answers = Callable[[Tensor], Tensor]  # uint8 (B, h, w, C) -> float32 (B, classes)
PRECISIONS = ("auto", "fp32", "bf16", "int8")
BOUNDS = {  # what agrees with torch in fp32: least top-1 agreement, largest difference of a score
    "fp32": (1.0, 1e-3),
    "bf16": (0.99, 0.05),
    "int8": (0.9, 0.3),  # of 16 pictures one may fall to another class
}


@dataclass(frozen=True)
class Kind:
    """One engine: what it needs, what it computes in, what is made for it (graphs, precision), and how that is started."""

    packages: tuple[str, ...]
    precisions: tuple[str, ...]  # best first
    make: Callable[[Graphs, str], bytes]
    start: Callable[[bytes, Graphs, str], Answers]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


PAUSE = 0.05  # seconds, longer than the threads of any engine wait for more work
TIE = 0.005  # the reference is undecided between classes whose scores are no further apart: rounding alone turns them round


@dataclass(frozen=True)
class Agreement:
    """How far scores are from the reference's.

    Attributes:
        top1_agreement: share of pictures with the same best class, or one between which and that the reference is undecided.
        largest_difference: of a score.
    """

    top1_agreement: float
    largest_difference: float

    @staticmethod
    def between(scores: Tensor, expected: Tensor) -> Agreement:
        """Of two tables of scores, (N, classes) each; scores that are not numbers agree with nothing."""
        if scores.shape != expected.shape or not bool(scores.isfinite().all()):
            return Agreement(0.0, 1.0)
        taken = expected.gather(1, scores.argmax(1, keepdim=True))[:, 0]  # what the reference gives to that class; (N,)
        same = (taken >= expected.amax(1) - TIE).float().mean()
        return Agreement(float(same), float((scores - expected).abs().max()))

    def within(self, agreement: float, difference: float) -> bool:
        """Whether it is as good as that."""
        return self.top1_agreement >= agreement and self.largest_difference <= difference

    def __str__(self) -> str:
        return f"top-1 agrees on {self.top1_agreement:.1%}, scores within {self.largest_difference:.2g}"


@dataclass(frozen=True)
class Chosen:
    """An engine built for a model, and one line on why it is this one."""

    name: str
    precision: str
    answer: Answers
    why: str
    made: bytes = b""  # what was made for it, to be kept

    def __str__(self) -> str:
        return f"{self.name} {self.precision} ({self.why})"


def _torch(made: bytes, graphs: Graphs, precision: str) -> Answers:
    whole, prepared = Whole(graphs.bundle), graphs.bundle.preprocessing
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # pure bf16 behind the normalisation, not autocast: the weights are turned once, not with every batch
    net = whole.net.to(dtype).to(memory_format=torch.channels_last)

    def answer(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            x = prepared.normalise(pixels)
            return torch.softmax(net(x.to(dtype)).float() / whole.temperature, 1)

    return answer


def _onnxruntime(made: bytes, graphs: Graphs, precision: str) -> Answers:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _openvino_made(graphs: Graphs, precision: str) -> bytes:
    import openvino

    compiled = openvino.compile_model(graphs.openvino(precision), "CPU", _openvino_settings(precision))
    content: bytes = compiled.export_model().getvalue()
    return content


def _openvino_settings(precision: str) -> dict[str, Any]:
    # int8 graphs compute the rest in bf16 where the hardware does
    hint = "bf16" if precision == "bf16" or (precision == "int8" and _bf16()) else "f32"
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
    }


def _openvino(made: bytes, graphs: Graphs, precision: str) -> Answers:
    import openvino

    compiled = openvino.Core().import_model(made, "CPU", _openvino_settings(precision))
    own = threading.local()  # a request computes one batch at a time; each thread that asks has its own

    def answer(pixels: Tensor) -> Tensor:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        return torch.from_numpy(own.request.infer([pixels.numpy()], share_inputs=True)[0])

    return answer


ENGINES: Mapping[str, Kind] = {
    "torch": Kind((), ("bf16", "fp32"), lambda graphs, precision: b"", _torch),
    "onnxruntime": Kind(("onnx", "onnxscript", "onnxruntime"), ("fp32", "int8"), Graphs.onnx, _onnxruntime),
    "openvino": Kind(("onnx", "onnxscript", "openvino", "nncf"), ("bf16", "fp32", "int8"), _openvino_made, _openvino),
}
NAMES = ("auto", *ENGINES)


def _built(graphs: Graphs, name: str, precision: str) -> Chosen:
    """One engine, ready, of which nothing is said yet."""
    made = ENGINES[name].make(graphs, precision)
    return Chosen(name, precision, ENGINES[name].start(made, graphs, precision), "", made)


def choose(
    bundle: Bundle,
    engine: str = "auto",
    precision: str = "auto",
    *,
    check: Tensor | None = None,
    training: Tensor | None = None,
    batch: int = 16,
    keep: bool = False,
) -> Chosen:
    """The engine asked for, or the fastest that is installed and agrees with torch in fp32.

    Args:
        engine: "auto" or a name in ENGINES; one that is named is not held to the bound, but its agreement is told.
        precision: "auto" is bf16 where the hardware computes it, else fp32; never int8, which is for who asks for it.
        check: pictures to hold engines to, uint8 (n, h, w, C); the model file's own where None.
        training: pictures to calibrate int8 on, likewise.
        batch: pictures in the batches that are timed.
        keep: whether what an earlier start has kept is taken, and what is built is kept for later ones.

    Raises:
        UsageError: an unknown name, an engine that is not installed or has no such precision, int8 without pictures.
    """
    samples = bundle.samples
    check = samples.check if check is None and samples is not None else check
    training = samples.training if training is None and samples is not None else training
    wanted = _candidates(engine, precision)
    if training is not None and check is not None:  # a person may have given some of the same pictures for both
        training = apart(training, check)
    if precision == "int8" and (training is None or not len(training)):
        raise UsageError(
            "int8 is calibrated on other pictures than it is judged on, and there are none in the model file; give some: "
            "--calibrate FOLDER"
        )
    graphs = Graphs(bundle, training)
    if not keep:
        return _chosen(graphs, wanted, engine, precision, check, batch)
    place = kept(bundle, {"wanted": wanted, "batch": batch, "asked": [engine, precision]}, check, training)
    if (before := _started(place, graphs)) is not None:
        return before
    chosen = _chosen(graphs, wanted, engine, precision, check, batch)
    place.put("engine", chosen.made)
    place.put("choice", json.dumps([chosen.name, chosen.precision, chosen.why]).encode())
    return replace(chosen, made=b"")


def _started(place: Kept, graphs: Graphs) -> Chosen | None:
    """What an earlier start has chosen and built; None where there is none, or it does not start."""
    choice, made = place.get("choice"), place.get("engine")
    if choice is None or made is None:
        return None
    name, precision, why = json.loads(choice)
    try:
        return Chosen(
            name, precision, ENGINES[name].start(made, graphs, precision), f"{why}; built by an earlier start"
        )
    except RuntimeError:  # it is built anew
        return None


def _chosen(
    graphs: Graphs,
    wanted: Sequence[tuple[str, tuple[str, ...]]],
    engine: str,
    precision: str,
    check: Tensor | None,
    batch: int,
) -> Chosen:
    name, (first, *_) = wanted[0]
    if check is None or not len(check):
        if engine == "auto" and precision == "auto":
            first = "fp32"
        why = "as asked" if engine != "auto" else "there are no check pictures to hold another engine to"
        return replace(_built(graphs, name, first), why=why)
    expected = reference(graphs.bundle, check)
    if engine != "auto":
        one = _built(graphs, name, first)
        said = Agreement.between(one.answer(check), expected)
        return replace(one, why=f"as asked; {said} with torch fp32 on {len(check)} check pictures")
    return _fastest(graphs, wanted, check, expected, batch)


def check_names(engine: str, precision: str) -> None:
    """Raises UsageError for an engine or a precision that is not known."""
    if engine not in NAMES:
        raise unknown("engine", engine, NAMES)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def _candidates(engine: str, precision: str) -> list[tuple[str, tuple[str, ...]]]:
    """(engine, its precisions that come into question, best first) of all that are installed; UsageError where none is."""
    check_names(engine, precision)
    automatic = ("bf16", "fp32") if _bf16() else ("fp32",)
    found = []
    for name, kind in ENGINES.items():
        allowed = tuple(p for p in kind.precisions if p == precision or (precision == "auto" and p in automatic))
        if engine not in ("auto", name):
            continue
        if engine == name and not allowed:
            raise UsageError(f"{name} computes in {' or '.join(kind.precisions)} here, not in {precision}.")
        if engine == name and (missing := kind.missing()):
            extra = "openvino" if name == "openvino" else "onnx"
            raise UsageError(f"{name} needs the package {missing[0]}; install it with: pip install 'residuum[{extra}]'")
        if allowed and not kind.missing():
            found.append((name, allowed))
    if not found:
        raise UsageError(
            f"no engine installed here computes in {precision}; pip install 'residuum[openvino]' brings one."
        )
    return found


def _fastest(
    graphs: Graphs, wanted: Sequence[tuple[str, tuple[str, ...]]], check: Tensor, expected: Tensor, batch: int
) -> Chosen:
    """Of each engine the best precision that agrees, and of those the one that takes the least time."""
    agreeing: list[tuple[Chosen, Agreement]] = []
    refused = []
    pixels = check[torch.arange(batch) % len(check)]  # (batch, h, w, C)
    for name, precisions in wanted:
        for precision in precisions:
            one = _built(graphs, name, precision)
            said = Agreement.between(one.answer(check), expected)
            if said.within(*BOUNDS[precision]):
                agreeing.append((one, said))
                break
            refused.append(f"{name} {precision} does not agree ({said})")
    if not agreeing:
        return replace(_built(graphs, "torch", "fp32"), why="; ".join(refused))
    times = seconds([one.answer for one, _ in agreeing], pixels)
    (best, (one, said)), *rest = sorted(zip(times, agreeing, strict=True), key=lambda row: row[0])
    others = [f"{other.name} {other.precision} takes {s / best:.2f} times as long" for s, (other, _) in rest]
    words = [f"{said} with torch fp32 on {len(check)} check pictures", *others, *refused]
    return replace(one, why="; ".join(words))


def seconds(answers: Sequence[Answers], pixels: Tensor, budget: float = 0.5) -> list[float]:
    """The least seconds that a batch takes each, of as many as fit into the budget, three turns at least.

    They take turns, so that what else the machine does meets all of them. A turn begins with a pause and with batches that are
    not counted: for a while the threads of the one before still hold the cores, waiting for more of its own work.
    """
    least, began, n = [float("inf")] * len(answers), time.perf_counter(), 0
    while n < 3 or (time.perf_counter() - began < budget * len(answers) and n < 50):
        for k, answer in enumerate(answers):
            time.sleep(PAUSE)
            _least(answer, pixels)
            least[k] = min(least[k], _least(answer, pixels))
        n += 1
    return least


def _least(answer: Answers, pixels: Tensor) -> float:
    """The least seconds of a batch, of as many as fit into the length of a pause, one at least."""
    least, began = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - began < PAUSE:
        answer(pixels)
        least = min(least, time.perf_counter() - start)
    return least


def _bf16() -> bool:
    return automatic_precision(torch.device("cpu")) == "bf16"
