"""Real lack of memory: a limited process reports the micro-batch that would fit, and --batch auto finds it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnetlab
from resnetlab import out_of_memory
from resnetlab.cli.main import run_command
from resnetlab.device import DeviceConfig
from resnetlab.out_of_memory import is_out_of_memory
from resnetlab.training import memory
from resnetlab.training.train import RunOptions, start_run
from tiny_runs import tiny

CODE = """
import resource, sys
from pathlib import Path
from resnetlab.cli.main import run_command
arguments = "train digits --net resnet14 --steps 2 --device cpu --set image_size=64".split()
arguments += ["--set", "threads=1", "--set", "precision=fp32"]
assert run_command([*arguments, "--set", "batch=2", "--out", "warm"]) == 0  # all that is loaded late is there now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
print("short", run_command([*arguments, "--set", "batch=1024", "--out", "short"]))
print("auto", run_command([*arguments, "--batch", "auto", "--set", "batch=1024", "--out", "auto"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
def test_short_memory_says_what_fits_and_auto_finds_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "short 1" in done.stdout and "auto 0" in done.stdout, done.stderr
    found = re.search(
        r"1,024 images at once do not fit into memory; (\d+) would fit: start again with --set bn_batch=", done.stderr
    )
    assert found and 2 <= int(found[1]) < 1024, done.stderr
    assert "batch auto: micro-batches of" in done.stderr
    recipe = (tmp_path / "auto" / "recipe.toml").read_text()
    assert "\nbatch = 1024\n" in recipe and re.search(r"\nbn_batch = (4|8|16|32|64|128|256)\n", recipe)
    assert "Traceback" not in done.stderr


def test_a_trial_counts_what_a_cuda_graph_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def count(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        held.append((made := make(*args, **kwargs)).numel())
        return made

    for name in ("zeros", "zeros_like"):
        monkeypatch.setattr(torch, name, partial(count, getattr(torch, name)))
    net, totals = nn.Linear(10, 1000), []
    monkeypatch.setattr(memory, "forward_backward", lambda *_: 0.0)
    for graph in (False, True):
        held.clear()
        config = DeviceConfig(torch.device("cpu"), "fp32", 1, "for the test", cuda_graph=graph)
        assert memory.largest_micro_batch(net, config, (3, 8, 8), 4, [4]) == 4
        totals.append(sum(held))
    assert totals[1] - totals[0] == 11_000 + 4 * 3 * 8 * 8  # the gradients of weights and biases, and a batch


def test_a_command_without_memory_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one image does not fit; what is no lack of memory stays a traceback."""
    image = Path(__file__).parents[1] / "docs" / "three.png"
    command = ["predict", "cifar10:resnet20", str(image), "--backend", "torch"]
    for error in (RuntimeError("can't allocate memory: 64 MB\nat"), MemoryError("can't allocate memory: 64 MB")):
        monkeypatch.setattr("torch.nn.functional.conv2d", Mock(side_effect=error))
        assert run_command(command) == 1
        *_, said = capsys.readouterr().err.splitlines()
        reason = "there is not enough memory (can't allocate memory: 64 MB)"
        assert said == f"resnetlab: predict: {reason}; end other programs, or take smaller images."
    monkeypatch.setattr("torch.nn.functional.conv2d", Mock(side_effect=RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        run_command(command)


def test_batches_that_do_not_fit_are_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an evaluation, a prediction and an embedding alike: with the scores of whole batches, and one warning."""
    run = start_run(tiny(), tmp_path / "run", RunOptions(device="cpu"))
    model = resnetlab.load(run.model, device="cpu")
    images = [np.full((8, 8), 10 * i, np.uint8) for i in range(5)]
    conv2d, sizes, released = torch.nn.functional.conv2d, list[int](), list[torch.device]()

    def compute() -> tuple[Any, ...]:
        scores = [each.top for each in model.predict(images)]
        return scores, model.embed(images), model.evaluate("digits").to_dict()["top1_error"]

    def convolve(x: Tensor, *args: Any) -> Tensor:
        if len(x) > 2:
            raise RuntimeError("could not create a memory object")
        sizes.append(len(x))
        return conv2d(x, *args)

    (scores, features, error), release = compute(), out_of_memory.release_memory
    monkeypatch.setattr(out_of_memory, "release_memory", lambda device: released.append(device) or release(device))
    monkeypatch.setattr("torch.nn.functional.conv2d", convolve)
    with pytest.warns(UserWarning, match="a batch does not fit into memory and is computed in parts"):
        in_parts, features_in_parts, error_in_parts = compute()
    assert set(sizes) == {1, 2} and released and error_in_parts == error
    for one, other in zip(scores, in_parts, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-6)
    torch.testing.assert_close(features_in_parts, features)


def test_out_of_memory_messages_of_gpu_libraries_are_recognised() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle)`")
    )


def test_a_gpu_without_an_algorithm_is_out_of_memory_only_if_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says the same where no algorithm finds workspace and where cuDNN has none."""
    error, second = RuntimeError("GET was unable to find an engine to execute this computation"), torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 2**30, 80 * 2**30))
    monkeypatch.setattr(out_of_memory, "release_memory", lambda device: None)
    for allocated, full in ((69 * 2**30, True), (20 * 2**30, False)):
        used = {None: allocated, second: 69 * 2**30}  # of the current GPU, and of another one
        monkeypatch.setattr(torch.cuda, "memory_allocated", used.__getitem__)
        assert is_out_of_memory(error) is full and is_out_of_memory(error, second)
    compute = Mock(side_effect=[error, torch.ones(1, 2), torch.ones(1, 2)])
    with pytest.warns(UserWarning, match="computed in parts"):  # predicting on it, whatever is free on the current one
        assert len(out_of_memory.compute_in_parts(compute, torch.ones(2, 3), second)) == 2
