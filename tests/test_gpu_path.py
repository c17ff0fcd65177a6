"""What only a GPU would show, shown without one: a simulated queue, devices that are not there, groups that fail."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import cells
import resnetlab.serve.service
from images import NAMES, folder
from resnetlab import distributed
from resnetlab.cli.train import TrainOptions, read_overrides
from resnetlab.data import prefetch
from resnetlab.data.batch_copier import BatchCopier
from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.objects import dataset_from_object
from resnetlab.data.prefetch import LoadedBatch, Prefetcher
from resnetlab.data.sources import load_dataset
from resnetlab.device import (
    DeviceConfig,
    is_usable,
    preserve_process_state,
    release_memory,
    select_device,
    standard_torch_state,
    to_device,
)
from resnetlab.distributed import World
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.evaluation import detection, scores, segmentation
from resnetlab.evaluation.protocols import generate_views, parse_protocol
from resnetlab.inference import annotated as annotated_inference
from resnetlab.inference import backends, predict
from resnetlab.models import segmentation as segmentation_nets
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.run_folder import RunFolder
from resnetlab.stopping import catch_stop_signals
from resnetlab.studies.workers import worker_devices
from resnetlab.training import recorder, step_trace, train
from resnetlab.training.annotated_recipes import AnnotatedRecipe, boxes, masks
from resnetlab.training.backbone_graph import BackboneGraph
from resnetlab.training.checkpoint import TrainState, restore_checkpoint
from resnetlab.training.gradients import select_gradients
from resnetlab.training.machine import describe_machine
from resnetlab.training.micro_batches import BatchNormStatistics
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.recipes import find_named
from resnetlab.training.recorder import Recorder, RunContext
from resnetlab.training.step import StepOutput, train_step
from resnetlab.training.step_trace import trace_steps
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.train import RunOptions, build_task, start_run
from simulated_gpu import GPU, GPUTensor, record_graphs, simulated_gpu
from tiny_runs import make_train_state, tiny


@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt, None])
def test_a_process_that_fails_does_not_wait_for_the_others(
    error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """destroy_process_group would wait for GPU work that a lost process never completes."""
    ended: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed, "_meet", lambda store, *_: (store, False))
    monkeypatch.setattr(distributed, "_connect_levels", lambda *_: [None])
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    if error is None:
        with distributed.join_process_group():
            pass
    else:
        with pytest.raises(error), distributed.join_process_group():
            raise error("gone")
    assert ended == ["destroyed" if error is None else "aborted"]


@pytest.mark.parametrize(
    ("gpus", "nccl", "backend"), [(2, True, "cpu:gloo,cuda:nccl"), (2, False, "gloo"), (0, True, "gloo")]
)
def test_processes_take_nccl_where_there_are_gpus_and_torch_has_it(
    gpus: int, nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch for Windows has none: there even processes on CPUs could not meet. Nor do any exchange gradients on MPS."""
    chosen, current = [], []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(None, 3, 4)]))
    monkeypatch.setattr(distributed, "_meet", lambda store, *_: (store, False))
    monkeypatch.setattr(distributed, "Links", lambda levels: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(distributed, "_connect_levels", lambda *_: [None])
    with distributed.join_process_group():
        pass
    assert chosen == [backend] and current == [1] * (gpus > 0)
    monkeypatch.setattr(train, "share_loading", lambda world: contextlib.nullcontext(lambda load: load()))
    for place in ("cuda", "mps", "cpu"):
        config = DeviceConfig(torch.device(place), "fp32", 1, "for the test")
        monkeypatch.setattr(train, "select_device", lambda *_, config=config, **__: config)
        monkeypatch.setattr(ClassificationTask, "build", Mock(side_effect=KeyError("the task is built")))
        refused = place == "mps" or (place == "cuda" and backend == "gloo")
        with pytest.raises(UsageError if refused else KeyError) as error:
            build_task(tiny(), RunOptions(device=place), World(0, 2))
        assert f"cannot exchange gradients on {place} here" in str(error.value) or not refused


class Queue:
    """A GPU's queue: every step adds work, and whoever reads a result waits for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wait(self) -> None:
        time.sleep(self.seconds)
        self.seconds = 0.0


def record_on_gpu(train_state: TrainState, out: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A recorder of a run that believes to be on a GPU with the queue."""
    config = replace(train_state.task.device_config, device=torch.device("cuda"), cuda_graph=True)
    train_state.task = replace(train_state.task, device_config=config)  # type: ignore[type-var]
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    monkeypatch.setattr(recorder, "_check_finite", lambda *_: queue.wait())
    monkeypatch.setattr(ClassificationTask, "evaluate_held_out", lambda _: queue.wait() or {"top1_error": 0.5})
    run = RunFolder.create(out, "run")
    with catch_stop_signals() as request:
        return Recorder(train_state, RunContext(run, RunOptions()), request)


def test_the_wait_of_an_evaluation_for_queued_steps_counts_as_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, `images_per_second` is the speed of launching."""
    train_state, queue = make_train_state(tiny(log_every=6, eval_every=2, steps=6)), Queue()
    here = record_on_gpu(train_state, tmp_path / "run", queue, monkeypatch)
    output = StepOutput(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(1.0))
    with here.closing():
        for _ in range(6):
            here.timer.start()
            here.timer.batch_ready()
            queue.seconds += 0.02
            train_state.state.step += 1
            train_state.state.replayed_steps += 1
            here.end_step(output, 0.1)
    assert train_state.state.step_seconds >= 6 * 0.02
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded == {"peak_memory_bytes": 5 * 2**30, "replayed_steps": 6}
    resumed = make_train_state(train_state.recipe)  # type: ignore[arg-type]
    restore_checkpoint(RunFolder(tmp_path / "run"), resumed)
    assert resumed.state.replayed_steps == 6


def test_a_full_queue_is_no_wait_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_state, queue = make_train_state(tiny(log_every=2, eval_every=9, steps=20)), Queue()
    here = record_on_gpu(train_state, tmp_path / "run", queue, monkeypatch)
    output = StepOutput(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(1.0))
    shares = []
    with here.closing():
        for reading in (0.0, 0.02):
            monkeypatch.setattr(ClassificationTask, "seconds_reading", reading * 2)
            for _ in range(2):
                here.timer.start()
                time.sleep(0.02)  # launches that wait until the queue has room
                here.timer.batch_ready()
                train_state.state.step += 1
                here.end_step(output, 0.1)
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            shares.append(json.loads(lines[-1])["share_waiting"])
    assert shares[0] == 0 < shares[1] <= 1


def test_a_prefetcher_measures_its_reading() -> None:
    def read(batch: int) -> LoadedBatch[int]:
        time.sleep(0.02)
        return LoadedBatch(batch, [0], {})

    prefetcher: Prefetcher[int] = Prefetcher(read, ErrorPolicy(), 0)  # type: ignore[arg-type]
    assert [prefetcher.get(step).samples for step in (0, 1)] == [0, 1]
    assert prefetcher.seconds >= 0.04


def test_a_study_takes_one_process_for_each_gpu_or_eight_under_mps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worker_devices("auto", 9) == worker_devices("cuda", 9) == ["cuda:0", "cuda:1"]
    assert worker_devices("cuda:1", 9) == ["cuda:1"] and worker_devices("cuda", 1) == ["cuda:0"]
    (tmp_path / "control").touch()
    assert (
        worker_devices("cuda", 99, 32) == ["cuda:0", "cuda:1"] * 8 and worker_devices("cuda:1", 3, 32) == ["cuda:1"] * 3
    )
    assert worker_devices("cuda", 99, 224) == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(("cores", "processes", "workers"), [(64, 8, 7), (64, 1, 12), (4, 8, 1), (1, 1, 1)])
def test_the_processes_of_a_machine_share_its_cores_for_decoding(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "count_cores", lambda: cores)
    monkeypatch.setenv("WORLD_SIZE", str(2 * processes))  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert prefetch.default_workers(DeviceConfig(torch.device("cuda"), "bf16", 2, "for the test")) == workers


def test_workers_crop_images_in_memory() -> None:
    task = build_task(tiny(crop="resized"), RunOptions(device="cpu", workers=2))
    assert isinstance(task, ClassificationTask) and task.loader.split.workers == 2
    alone = build_task(tiny(crop="resized"), RunOptions(device="cpu"))
    assert isinstance(alone, ClassificationTask) and alone.loader.split.workers == 0
    batch, other = task.loader.batch(0), alone.loader.batch(0)
    task.close()
    assert torch.equal(batch.images, other.images)


def test_a_failed_gpu_makes_the_service_unhealthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    from resnetlab.serve.app import make_app
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.models import load_served_model
    from resnetlab.serve.service import Service
    from service import write_classifier

    served, *_ = load_served_model(str(write_classifier(tmp_path / "m.safetensors")), "torch", "fp32", "cpu")
    with TestClient(make_app(Service(served, Limits()))) as client:
        assert client.get("/healthz").status_code == 200
        monkeypatch.setattr(resnetlab.serve.service, "is_usable", lambda device: False)
        answer = client.get("/healthz")
    assert answer.status_code == 503 and "restart the service" in answer.json()["error"]


@pytest.mark.parametrize(
    ("error", "usable"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (None, True),
    ],
)
def test_a_device_that_refuses_everything_is_not_usable(
    error: Exception | None, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(*_: object, **__: object) -> float:
        if error is not None:
            raise error
        return 1.0

    assert is_usable(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", ones)
    assert is_usable(torch.device("cuda")) is usable


class Operations(TorchDispatchMode):
    """Lists the operations of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **kwargs or {})

    def kernels(self) -> list[str]:
        """The operations that a GPU would launch something for."""
        return [name for name in self.names if "empty" not in name]


def test_bookkeeping_of_bn_takes_few_kernels() -> None:
    """One by one they were more launches than a small network's own."""
    net = build("resnet20", classes=10)
    statistics, before = BatchNormStatistics(net), {k: v.clone() for k, v in net.state_dict().items()}
    statistics.save()
    net(torch.rand(2, 3, 32, 32))
    with Operations() as rewinding:
        updated = statistics.rewind()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with Operations() as ending:
        statistics.save()
        statistics.set(updated)
    copy = "aten._foreach_copy_.default"
    assert rewinding.kernels() == [copy] * 3
    assert ending.kernels() == [copy] * 3 + ["aten._foreach_add_.Scalar"]
    after = net.state_dict()
    assert int(after["bn1.num_batches_tracked"]) == 1 and torch.equal(after["bn1.running_mean"], updated[0])
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])


# of torch.use_deterministic_algorithms and of torchvision's kernels: what adds atomically on CUDA (2.15). Pooling's gradient
# gathers, and index_put with accumulate sorts.
NONDETERMINISTIC = {
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    *(
        "_adaptive_avg_pool2d_backward",
        "adaptive_max_pool2d_backward",
        "reflection_pad2d_backward",
        "histc",
        "bincount",
    ),
    *("replication_pad2d_backward", "grid_sampler_2d_backward", "median", "cumsum", "put_", "index_copy"),
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "embedding_dense_backward"),
    *("_roi_align_backward", "_roi_pool_backward", "_ps_roi_align_backward", "_deform_conv2d_backward"),
}
SMALL_NET = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (tiny(), set()),
        (tiny(label_smoothing=0.1, mixup=0.2, crop="resized", stochastic_depth=0.5), set()),
        (
            replace(boxes(), image_size=72, batch=2, regions=16, pyramid=8, sides=(66,), longest=96),
            {"_roi_align_backward"},
        ),
    ],
    ids=["classify", "classify more", "detect"],
)
def test_a_step_has_no_nondeterministic_operation_but_those_said(
    recipe: BaseRecipe, expected: set[str], tmp_path: Path
) -> None:
    if not isinstance(recipe, Recipe):
        changes = {"data": str(cells.make_voc_folder(tmp_path)), "bn": "live", "start_from": ""}
        recipe = replace(recipe.rescale(4), net="resnet18", specification=SMALL_NET, **changes)  # type: ignore[arg-type]
    messages: list[str] = []
    train_state = TrainState.create(build_task(recipe, RunOptions(device="cpu", report=messages.append)))
    micro_batches = train_state.task.micro_batches(0)
    with Operations() as operations:
        train_step(train_state, micro_batches, 0.1)
    found = {name.split(".")[1] for name in operations.names} & NONDETERMINISTIC
    assert found == expected and "convolution_backward" in {name.split(".")[1] for name in operations.names}
    assert bool(train_state.task.nondeterministic_on_gpu) is bool(expected)
    assert not any("no fixed order" in message for message in messages)  # a CPU adds in order


def annotated(recipe: AnnotatedRecipe, folder: Path, **values: object) -> AnnotatedRecipe:
    """A short run of a small network on drawn images."""
    changes = {
        "data": str(folder),
        "bn": "live",
        "start_from": "",
        "image_size": 72,
        "batch": 2,
        "bn_batch": 0,
    } | values
    return replace(recipe.rescale(4), net="resnet18", specification=SMALL_NET, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["classify", "classify files", "classify sets", "detect", "segment"])
def test_a_step_on_a_gpu_waits_for_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path on a simulated GPU: devices, waits of the host, operations without a fixed order, memory that another
    stream may still use, in every task.
    """
    many: dict[str, Any] = {"bn_batch": 16, "ema_decay": 0.9, "clip_norm": 0.5, "erasing": 0.3, "rotate": 10.0}
    dataset = None
    if kind == "classify sets":
        draws = np.random.default_rng(0)
        dataset = dataset_from_object(
            (draws.integers(256, size=(60, 8, 8, 1), dtype=np.uint8), draws.random((60, 3)) < 0.5)
        )
        recipe: BaseRecipe = tiny(data="python", precision="bf16", cutmix=0.5, val_images=8, **many)
    elif kind.startswith("classify"):
        one_by_one = {"crop": "resized", "trivial_augment": True} if kind.endswith("files") else {}
        recipe = tiny(precision="bf16", mixup=0.2, stochastic_depth=0.5, **many, **one_by_one)
    elif kind == "detect":
        values = {"regions": 16, "pyramid": 8, "sides": (66,), "longest": 96, "context": True}
        recipe = annotated(boxes(), cells.make_voc_folder(tmp_path / "voc"), **values)
    else:
        recipe = annotated(masks(), cells.make_voc_folder(tmp_path / "voc"), sides=(80,), head="deeplab")
    messages: list[str] = []
    with simulated_gpu(monkeypatch) as gpu:
        train_state = TrainState.create(
            build_task(recipe, RunOptions(device=str(GPU), workers=0, report=messages.append, dataset=dataset))
        )
        assert all(isinstance(tensor, GPUTensor) for tensor in train_state.task.net.state_dict().values())
        train_step(train_state, train_state.task.micro_batches(0), 0.1)  # what is made once is made here
        gpu.waits.clear()
        gpu.names.clear()
        output = train_step(train_state, train_state.task.micro_batches(1), 0.1)
        waits, names = set(gpu.waits), set(gpu.names)
        assert float(output.loss) > 0 and isinstance(output.grad_norm, GPUTensor)
        assert {wait for wait in waits if " in torchvision." not in wait} == set()
        assert bool(waits) is (kind == "detect")  # torchvision's proposals and samples have sizes that depend on values
        assert "convolution_backward" in names
        expected = bool(train_state.task.nondeterministic_on_gpu)
        assert bool(names & NONDETERMINISTIC) is expected is any("no fixed order" in message for message in messages)
        gpu.waits.clear()
        gpu.names.clear()
        evaluate = "_evaluate_label_sets" if kind == "classify sets" else "evaluate"
        getattr(train_state.task, evaluate)(train_state.task.test)
        assert "convolution" in gpu.names and not set(gpu.names) & NONDETERMINISTIC and gpu.reused == []
        copies = {wait for wait in gpu.waits if " in torchvision." not in wait}
        assert gpu.float64 == set()
        where = {
            "detect": {"evaluation.detection.predict_image_boxes"},
            "segment": {"evaluation.segmentation.segment_image"},
            "classify sets": {
                "evaluation.scores._compute_logits",
                "training.tasks.classification._evaluate_label_sets",
            },
        }.get(kind, {"evaluation.scores._compute_logits"})
        assert copies == {f"copy to the CPU in resnetlab.{name}" for name in where}


@pytest.mark.parametrize("head", ["fcn", "deeplab"])
def test_a_segmenter_that_adds_in_a_fixed_order_on_a_gpu_computes_the_same(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = annotated(masks(), cells.make_voc_folder(tmp_path / "voc"), sides=(80,), head=head, precision="fp32")
    found = []
    for device in ("cpu", str(GPU)):
        with simulated_gpu(monkeypatch) if device != "cpu" else contextlib.nullcontext():
            task: Any = build_task(recipe, RunOptions(device=device, workers=0))
            task.net.train().requires_grad_(True)
            torch.manual_seed(0)  # dropout
            loss, _ = task.loss(task.micro_batches(0)[0])
            loss.backward()
            grads = {name: p.grad.cpu() for name, p in task.net.named_parameters()}
            found.append({"loss": loss.detach().cpu()} | grads)
            assert task.reason_against_exact == "" and describe_machine(task)["exact_resume"]
            about = {"recipe": SimpleNamespace(steps=25, exact=True), "device_config": task.device_config}
            select_gradients(SimpleNamespace(task=SimpleNamespace(net=task.net, **about)), print)  # type: ignore[arg-type]
            assert isinstance(task.net.backbone.forward, BackboneGraph) is (device != "cpu")
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=2e-3, atol=1e-5 + 2e-3 * float(value.abs().max()), msg=name
        )


def test_upsampling_by_matrices_is_bilinear(monkeypatch: pytest.MonkeyPatch) -> None:
    x, size = torch.randn(2, 3, 5, 7, requires_grad=True), (17, 9)
    expected = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    with simulated_gpu(monkeypatch):
        y = x.detach().pin_memory().to(GPU, non_blocking=True).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):  # which does not round the weights of a mean
            found = segmentation_nets.upsample(y, size)
        (found * weights.pin_memory().to(GPU, non_blocking=True)).sum().backward()
        assert y.grad is not None
        values, gradient = found.detach().cpu(), y.grad.cpu()
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(gradient, x.grad)


def test_evaluations_take_the_same_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the memory that a stream has used for that stream: with new ones it was kept up to 32 times."""
    config, used = DeviceConfig(GPU, "fp32", 1, "for the test"), set()
    with simulated_gpu(monkeypatch):
        for _ in range(3):
            with config.side_by_side_map(9) as side_by_side:
                list(side_by_side(lambda _: used.add(torch.cuda.current_stream()), range(9)))
        assert len(used) <= 2 and torch.cuda.current_stream() not in used


def test_a_runs_gpu_is_the_current_one_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On cuda:1 free memory was that of cuda:0, which also got a context for pinned memory."""
    current = [3]
    with simulated_gpu(monkeypatch):
        for name, fake in {
            "is_initialized": lambda: True,
            "get_rng_state_all": lambda: [torch.zeros(1)],
            "set_rng_state_all": lambda states: None,
            "current_device": lambda: current[0],
            "set_device": lambda device: current.append(getattr(device, "index", device)) or current.pop(0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        with preserve_process_state():
            build_task(tiny(), RunOptions(device=str(GPU)))
            assert current == [GPU.index]
        assert current == [3]

        def fail(device: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        for name in ("set_device", "set_rng_state_all"):
            monkeypatch.setattr(torch.cuda, name, fail)
        with pytest.raises(RunError, match="lost"), preserve_process_state():
            raise RunError("the GPU is lost")


def test_loading_predicting_and_training_leave_the_callers_switches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where a device is selected with them."""
    make_train_state(tiny()).task.trained_model({}).save(tmp_path / "m.safetensors")  # type: ignore[attr-defined]
    cudnn, seen = torch.backends.cudnn, []

    def switches() -> tuple[object, ...]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def select_and_look(*args: Any, **kwargs: Any) -> DeviceConfig:
        selected = select_device(*args, **kwargs)
        seen.append(switches())
        return selected

    for module in (predict, train):
        monkeypatch.setattr(module, "select_device", select_and_look)
    monkeypatch.setattr(train, "train_to_end", lambda task, context: None)
    standard = (True, False, False, "highest")
    with simulated_gpu(monkeypatch):
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before = False, True, True
        model = resnetlab.load(tmp_path / "m.safetensors", device=str(GPU))
        assert switches()[:3] == before
        model.predict(Image.new("L", (8, 8)))
        start_run(tiny(steps=2), tmp_path / "run", RunOptions(device=str(GPU)))
        assert switches() == (*before, "highest") and seen == [standard] * 2


def test_what_a_caller_loads_in_the_middle_of_a_run_leaves_its_switches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in TF32 with cuDNN's fastest kernels went on without both once `on_evaluate` had loaded a model."""
    make_train_state(tiny()).task.trained_model({}).save(tmp_path / "m.safetensors")  # type: ignore[attr-defined]
    cudnn, seen = torch.backends.cudnn, []

    def look() -> None:
        found = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
        seen.append((*found, torch.get_num_threads()))

    def load_a_model(_: Any) -> None:
        model = resnetlab.load(tmp_path / "m.safetensors", device=str(GPU))
        monkeypatch.setattr(model.net, "forward", lambda x: look() or torch.zeros(len(x), 10, device=x.device))
        model.predict(Image.new("L", (8, 8)))
        torch.set_num_threads(5)
        if len(seen) > 2:
            raise KeyError("enough")

    def step(*args: Any) -> Any:
        look()
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    recipe = tiny(steps=3, eval_every=1, precision="tf32", exact=False)
    with simulated_gpu(monkeypatch), standard_torch_state(), pytest.raises(KeyError, match="enough"):
        start_run(recipe, tmp_path / "run", RunOptions(device=str(GPU), on_evaluate=load_a_model))
    assert [each[:4] for each in seen[1::2]] == [(True, False, False, "highest")] * 2
    assert seen[0] == seen[2] == (False, True, True, "high", seen[0][4])


def test_mps_gets_its_copies_at_once_and_gives_back_memory_and_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is not waited for takes what is in the tensor's memory later (torch's issue 189690)."""
    copied, done = [], list[object]()

    def copy(x: torch.Tensor, place: torch.device, *, non_blocking: bool) -> torch.Tensor:
        copied.append((place.type, x.pinned, non_blocking))  # type: ignore[attr-defined]
        return x

    monkeypatch.setattr(torch.Tensor, "pinned", False, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: setattr(x, "pinned", True) or x)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    for place in ("cuda", "mps", "cpu"):
        to_device(torch.ones(2), torch.device(place))
    assert copied == [("cuda", True, True), ("mps", False, False), ("cpu", False, False)]
    for name, fake in {
        "empty_cache": lambda: done.append("emptied"),
        "get_rng_state": lambda: "the caller's",
        "set_rng_state": done.append,
    }.items():
        monkeypatch.setattr(torch.mps, name, fake)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    release_memory(torch.device("mps"))
    with preserve_process_state():
        assert done == ["emptied"]
    assert done == ["emptied", "the caller's"]


def test_a_run_on_mps_does_not_promise_its_bits() -> None:
    task = make_train_state(tiny()).task
    assert isinstance(task, ClassificationTask) and task.reason_against_exact == ""
    there = replace(task, device_config=replace(task.device_config, device=torch.device("mps")))
    assert there.reason_against_exact == "whether kernels on MPS add in a fixed order was not checked"


def test_batches_are_copied_beside_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as gpu:
        copier, current = BatchCopier(GPU), torch.cuda.current_stream()
        batches = [torch.full((2, 3), float(i)) for i in range(5)] + [torch.zeros(1, 3), torch.zeros(99, 3)]
        queued = [0]  # work when each batch was computed on
        for i, batch in enumerate(batches):
            copied = copier(batch)
            known = copier._stream.known[current]  # type: ignore[union-attr, index]
            assert (known < queued[-1]) is (1 < i < 6), "the copy waits for the step before"
            assert gpu.waits == [] and torch.equal(copied.values, batch)  # type: ignore[attr-defined]
            copied.sum()
            queued.append(current.count)  # type: ignore[attr-defined]
        late = copier(batches[0])
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(RuntimeError, match="overtakes another stream"):
            late.sum()
        for batch in batches[:3]:
            copier(batch).sum()
        assert gpu.reused == []
        monkeypatch.setattr(type(current), "wait_event", lambda *_: None)
        with pytest.raises(RuntimeError, match="overtakes another stream"):
            copier(batches[0])


def test_samples_of_any_number_and_size_are_copied_beside_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of different sizes with their boxes, as a detector's, also none of them; the last flipped, so not contiguous."""
    draws = torch.Generator().manual_seed(0)
    sizes = [(9, 7, 3), (3, 5, 1), (8, 2, 0), (4, 4, 2)]
    batches = [
        [[(torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=draws), torch.rand(n, 4, generator=draws).mT)]]
        for h, w, n in sizes
    ]
    with simulated_gpu(monkeypatch) as gpu:
        copier, current, queued = BatchCopier(GPU), torch.cuda.current_stream(), [0]
        for i, batch in enumerate(batches):
            ((copied,),) = copier(batch)
            assert (copier._stream.known[current] < queued[-1]) is (i > 1)  # type: ignore[union-attr, index]
            assert gpu.waits == [] and copied[0].dtype == torch.uint8
            assert all(torch.equal(x.values, y) for x, y in zip(copied, batch[0][0], strict=True))  # type: ignore[attr-defined]
            copied[0].sum()
            queued.append(current.count)  # type: ignore[attr-defined]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_exact_false_takes_the_fastest_kernels_of_a_gpu_and_says_so(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, messages = {}, []
    with simulated_gpu(monkeypatch), standard_torch_state():
        for exact in (True, False):
            options = RunOptions(device=str(GPU), report=messages.append)
            here = TrainState.create(build_task(tiny(optimizer=optimizer, exact=exact, lr=0.01, steps=3), options))
            cudnn = torch.backends.cudnn
            assert (cudnn.deterministic, cudnn.benchmark) == (exact, not exact)
            with Operations() as operations:
                for step in range(3):
                    train_step(here, here.task.micro_batches(step), 0.01)
            trained[exact] = here.task.net.conv1.weight.cpu()  # type: ignore[union-attr]
            fused = {name.split(".")[1] for name in operations.names if "_fused" in name}
            assert fused == (set() if exact else {f"_fused_{optimizer}_"})
            assert describe_machine(here.task)["exact_resume"] is exact
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-4, atol=1e-6)
    said = [message for message in messages if "may differ in its last bits" in message]
    assert len(said) == 1 and said[0].startswith("exact=false takes the GPU's fastest kernels")
    recipe = tiny(exact=False)
    assert (
        "exact = False (not True)" in recipe.differences(find_named(recipe, "fp32"))
        and recipe.to_json()["exact"] is False
    )
    assert "exact" not in tiny().to_json()  # as before it existed


def test_the_simulated_gpu_finds_waits_and_wrong_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as gpu:
        x, y = torch.ones(3, device=GPU), torch.ones(3)
        gpu.waits.clear()
        (x * 2)[1:].sum()
        y.pin_memory().to(GPU, non_blocking=True)
        assert gpu.waits == []
        _ = (
            float(x.sum()),
            x.nonzero(),
            x[x > 0],
            x.cpu(),
            y.to(GPU),
            x[torch.tensor([0])],
            torch.tensor([1.0], device=GPU),
        )
        assert [wait.removesuffix(" in the test") for wait in gpu.waits] == [
            *("_local_scalar_dense", "nonzero", "index by a mask", "copy to the CPU", "copy from the CPU"),
            *("index by indices on the CPU", "copy from the CPU"),
        ]
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            x + y
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        for marked in ("nothing", "by a wait", "by record_stream"):
            z = x * 2
            side.wait_stream(current)
            with torch.cuda.stream(side):
                _ = z + 1
            if marked == "by a wait":
                current.wait_stream(side)
            elif marked == "by record_stream":
                z.record_stream(side)
            del z
            assert gpu.reused == ["mul"] * (marked == "nothing"), "memory that is free while another stream may read it"
            gpu.reused.clear()


def test_a_profiled_run_has_a_trace_and_the_same_weights(tmp_path: Path) -> None:
    messages: list[str] = []
    options = RunOptions(device="cpu", report=messages.append)
    start_run(tiny(steps=6), tmp_path / "plain", options)
    start_run(tiny(steps=6), tmp_path / "traced", replace(options, profile=2))
    with trace_steps(2, tmp_path / "short.json", messages.append) as end_step:
        end_step()
    assert not (tmp_path / "plain/trace.json").exists() and not (tmp_path / "short.json").exists()
    assert [m for m in messages if m.startswith(("trace of", "no trace"))] == [
        f"trace of 2 steps, to open in Perfetto: {tmp_path / 'traced' / 'trace.json'}",
        "no trace: it begins after 3 steps, and there were no more",
    ]
    events = [event.get("name") for event in json.loads((tmp_path / "traced/trace.json").read_text())["traceEvents"]]
    assert "aten::convolution" in events and sum(name == "aten::cross_entropy_loss" for name in events) == 2
    plain, traced = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "traced"))
    assert plain == traced
    with pytest.raises(UsageError, match="--profile must be 0 or more, not -1"):
        read_overrides(None, TrainOptions(profile=-1), {})


def test_predictions_on_a_gpu_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier's network, and a detector's backbone, for a size that comes again."""
    recorded = record_graphs(monkeypatch)
    model = make_train_state(tiny()).task.trained_model({})  # type: ignore[attr-defined]
    pixels = torch.randint(256, (3, 8, 8, 1), dtype=torch.uint8)
    plain = backends.load_network(model, DeviceConfig(torch.device("cpu"), "fp32", 1, "for the test")).predict(pixels)
    detector = torch.nn.Module()
    detector.backbone = torch.nn.Conv2d(3, 4, 3)
    monkeypatch.setattr(annotated_inference, "load_annotated", lambda *_: SimpleNamespace(net=detector))
    with simulated_gpu(monkeypatch), standard_torch_state():
        backend = backends.select_backend(model, backends.BackendRequest(backend="torch", precision="fp32"), GPU)
        for count in (0, 1, 1):
            torch.testing.assert_close(backend.predict(pixels), plain, rtol=1e-4, atol=1e-5)
            assert recorded == [GPU] * count
        predictor = annotated_inference.open_annotated_model(tmp_path, "detect", "fp32", str(GPU))
        image = torch.rand(1, 3, 9, 9).pin_memory().to(GPU, non_blocking=True)
        with torch.inference_mode():
            maps = [predictor.model.net.backbone(image).cpu() for _ in range(3)]  # type: ignore[operator, union-attr]
            own = torch.cuda.Stream()
            own.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own):  # a segmenter evaluates on two, which may run at once
                maps += [predictor.model.net.backbone(image).cpu() for _ in range(3)]  # type: ignore[operator, union-attr]
        assert recorded == [GPU] * 3 and all(torch.equal(maps[0], other) for other in maps)


@pytest.mark.parametrize("agrees", [True, False])
@pytest.mark.parametrize("output", ["scores", "features"])
def test_bf16_predicts_on_a_gpu_where_it_agrees_with_fp32(
    output: str, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With BN folded into the convolutions."""
    least = (0.0 if agrees else 1.1, 9.0)
    monkeypatch.setitem(backends.OUTPUTS, output, replace(backends.OUTPUTS[output], bounds={"bf16": least}))
    model = make_train_state(tiny()).task.trained_model({})  # type: ignore[attr-defined]
    pixels = torch.randint(256, (3, 8, 8, 1), dtype=torch.uint8)
    with simulated_gpu(monkeypatch) as gpu, standard_torch_state():
        request = backends.BackendRequest(backend="torch", check_images=pixels, output=output)
        model.net.to(GPU)
        selected = backends.select_backend(model, request, GPU)
        gpu.names.clear()
        assert selected.predict(pixels[:2]).shape == (2, 10 if output == "scores" else 64)
        assert "convolution" in gpu.names and not any("batch_norm" in name for name in gpu.names)
    assert selected.precision == ("bf16" if agrees else "fp32") and "on 3 reference images" in selected.reason


def test_launches_of_traced_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's trace has them; on a CPU nothing is launched, and nothing recorded."""
    names = [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "aten::add",
    ]
    trace = SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in names])
    assert step_trace.count_launches(trace) == 4
    messages: list[str] = []
    options = RunOptions(device="cpu", report=messages.append, profile=2)
    start_run(tiny(steps=6), tmp_path / "cpu", options)
    monkeypatch.setattr(step_trace, "count_launches", lambda _: 9)
    start_run(tiny(steps=6), tmp_path / "gpu", options)
    recorded = [json.loads((tmp_path / name / "environment.json").read_text()) for name in ("cpu", "gpu")]
    assert "launches_per_step" not in recorded[0] and recorded[1]["launches_per_step"] == 4.5
    assert (
        recorded[1]["peak_memory_bytes"] > 0 and sum("trace of 2 steps (4 launches a step)" in m for m in messages) == 1
    )


def test_images_that_are_resized_ahead_give_the_same_views() -> None:
    config = DeviceConfig(GPU, "fp32", 1, "for the test")
    preprocessing = Preprocessing(3, (16, 16), 20, torch.full((3,), 0.5), torch.full((3,), 0.25))
    member = scores.Member(build("resnet8", classes=2), preprocessing, torch.arange(2))
    image = torch.randint(256, (50, 31, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for text, resized in (("10crop", True), ("dense:24", True), ("multiscale:18,24", False)):
        protocol = parse_protocol(text)
        ahead = scores._preprocess_ahead([member, member], protocol, config)(image)
        assert (min(ahead.shape[:2]) < min(image.shape[:2])) is resized
        pairs = zip(*(generate_views([each], protocol, preprocessing) for each in (image, ahead)), strict=True)
        assert all(torch.equal(views, others) for (_, views, _), (_, others, _) in pairs)


@pytest.mark.parametrize("task", [detection, segmentation])
def test_boxes_and_masks_are_decoded_in_threads_ahead(
    task: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, most, pixels = [0], [0], torch.zeros(8, 8, 3, dtype=torch.uint8)

    def read_slowly(_: object) -> Any:
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        time.sleep(0.02)
        reading[0] -= 1
        return pixels if task is detection else (pixels, pixels[..., 0])

    kind = "AnnotatedImage" if task is detection else "MaskedImage"
    monkeypatch.setattr(getattr(task, kind), "read_pixels" if task is detection else "read", read_slowly)
    monkeypatch.setattr(task, "default_workers", lambda _: 3)
    monkeypatch.setattr(task, "predict_image_boxes", lambda *_: "boxes", raising=False)
    config, images = (
        DeviceConfig(torch.device("cpu"), "fp32", 1, "for the test"),
        [SimpleNamespace(name=str(i)) for i in range(6)],
    )
    if task is detection:
        read, found = detection.predict_boxes([], images, config, None, ErrorPolicy())  # type: ignore[arg-type]
        assert read == images and found == ["boxes"] * 6
    else:
        metrics = segmentation.compute_segmentation_metrics(
            lambda x: x[..., 0].long(), images, ("a",), ErrorPolicy(), config
        )  # type: ignore[arg-type]
        assert metrics.images == images and int(metrics.confusion.sum()) == 6 * 64
    assert most[0] == 3


def test_evaluation_decodes_in_threads_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by default; here as many as a run's `workers`."""
    images = folder(tmp_path / "photos", {"train": 12, "val": 2})
    bad = sorted((images / "train").rglob("*.*"))[5]
    bad.write_bytes(b"broken")
    net, preprocessing = (
        build("resnet8", classes=len(NAMES), seed=0),
        Preprocessing(3, (16, 16), 16, torch.full((3,), 0.5), torch.full((3,), 0.25)),
    )
    config, reading, most = DeviceConfig(torch.device("cpu"), "fp32", 1, "for the test"), [0], [0]
    read = DiskSplit.read_image

    def read_slowly(split: DiskSplit, i: int) -> torch.Tensor:
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        time.sleep(0.01)
        reading[0] -= 1
        return read(split, i)

    monkeypatch.setattr(DiskSplit, "read_image", read_slowly)
    found = []
    for workers in (0, 3):
        split = load_dataset(str(images), tmp_path, ReadOptions("skip", "", workers)).train
        member = scores.Member.from_network(net, preprocessing, config)
        found += scores.predict_scores([member], split, config)
        assert list(split.errors.skipped) == [bad.relative_to(images).as_posix()] and most[0] == max(1, workers)
    assert torch.equal(*found) and int((found[0] == scores.SKIPPED).all(1).sum()) == 1
    with pytest.raises(DataError, match="bild"):
        scores.predict_scores([member], load_dataset(str(images), tmp_path, ReadOptions("stop", "", 3)).train, config)
