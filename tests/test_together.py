"""Several processes, really killed and stopped, end bit-identical to one undisturbed process.

The recipe uses everything that a checkpoint must hold: bf16, micro-batches, the average, clipping, plateaus, stochastic depth.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import zygote
from process_groups import call_in_processes, free_port
from resnetlab.cli.main import run_command as cli
from resnetlab.distributed import PROCESS_GONE, World
from resnetlab.errors import UsageError
from resnetlab.nn.batchnorm import convert_sync_batchnorm
from resnetlab.training.micro_batches import count_micro_batches
from resnetlab.training.recipes import paper_cifar, paper_imagenet, photos
from resnetlab.training.train import RunOptions, resume
from runs import assert_same, figures

VALUES = {
    "image_size": 8, "batch": 32, "bn_batch": 8, "log_every": 3, "eval_every": 5, "checkpoint_minutes": 0,
    "schedule": "plateau", "patience": 1, "ema_decay": 0.9, "clip_norm": 1.0, "stochastic_depth": 0.3,
    "label_smoothing": 0.1, "precise_bn": 3, "zero_init_last_bn": True,
    "mixup": 0.2, "recompute": True, "precision": "bf16", "threads": 1,
}  # fmt: skip
SETTINGS = [part for key, value in VALUES.items() for part in ("--set", f"{key}={str(value).lower()}")]
COMMAND = [sys.executable, "-m", "resnetlab", "train", "digits", "--net", "resnet8", "--device", "cpu", *SETTINGS]
STEPS = 16


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, from beginning to end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli([*COMMAND[3:], "--steps", str(STEPS), "--out", str(out)]) == 0
    return out


def last_step(run: Path) -> int:
    found = [int(p.stem[5:]) for p in (run / "checkpoints").glob("step-*.safetensors")]
    return max(found, default=0)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def process_of_rank(rank: int, job: Path) -> int:
    """The process id of a rank of the job that `start` started."""
    wanted = {f"RANK={rank}".encode(), f"JOB={job}".encode()}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set(place.joinpath("environ").read_bytes().split(b"\0")):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} of {job} is not there")


def start(job: Path, *command: str, python: str = sys.executable) -> subprocess.Popen[str]:
    """Starts a job of several processes, which have its name in their environment."""
    environment = os.environ | {"JOB": str(job)}
    return subprocess.Popen(
        [python, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank through /proc")


@needs_proc
def test_a_killed_rank_restarts_the_job_and_nothing_is_lost(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND[1:], "--steps", str(STEPS), "--out", str(out), "--procs", "2", "--max-restarts", "1"]
    with start(tmp_path, *command, python=zygote.python()) as process:
        wait_until(lambda: last_step(out) >= 4, process)
        os.kill(process_of_rank(1, tmp_path), signal.SIGKILL)
        killed_at = last_step(out)
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert killed_at < STEPS and "resuming from step" in stderr
    assert_same(out, undisturbed)
    assert json.loads((out / "environment.json").read_text())["processes"] == 2


@needs_proc
def test_all_ranks_stop_at_one_step_and_one_process_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM to one rank alone; the other hears of it, and the number of processes changes in between."""
    out = tmp_path / "run"
    command = [*COMMAND[1:], "--steps", str(STEPS), "--out", str(out), "--procs", "2"]
    with start(tmp_path, *command, python=zygote.python()) as process:
        wait_until(lambda: last_step(out) >= 4, process)
        os.kill(process_of_rank(1, tmp_path), signal.SIGTERM)
        _, stderr = process.communicate()
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr and stderr.count(f"resume with: resnetlab train --resume {out}") >= 1
    assert not (out / "model.safetensors").exists()
    said: list[str] = []
    resume(out, RunOptions(report=said.append))
    assert any("resuming from step" in sentence for sentence in said)
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_processes_need_no_host_name_and_report_a_common_error_once(tmp_path: Path) -> None:
    """As in a container, whose host name may not resolve; and the loss is not finite in any process."""
    (tmp_path / "sitecustomize.py").write_text("import socket\nsocket.getfqdn = lambda *_: 'pod.invalid'\n")
    command = [*COMMAND, "--steps", "9", "--set", "lr=1e30", "--out", str(tmp_path / "run"), "--procs", "2"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True, capture_output=True, timeout=200
    )
    assert done.returncode == 1 and done.stderr.count("the loss is not finite at step") == 1, done.stderr
    assert PROCESS_GONE not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@needs_proc
def test_plain_torchrun_is_bit_identical(tmp_path: Path, undisturbed: Path) -> None:
    """Four processes started by torchrun, which is all that several machines need."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    command = [*launcher, *COMMAND[2:], "--steps", str(STEPS), "--out", str(out)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert_same(out, undisturbed)


@pytest.mark.slow
@needs_proc
def test_plain_torchrun_goes_on_after_four_kills(tmp_path: Path, undisturbed: Path) -> None:
    """No environment variable is set; every attempt finds the others in the same store."""
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*launcher, "--max-restarts", "4", "-m", *COMMAND[2:], "--steps", str(STEPS), "--out", str(out)]
    with start(tmp_path, *command) as process:
        for step, rank in ((2, 3), (5, 2), (8, 1), (11, 0)):
            wait_until(lambda: last_step(out) >= step, process)  # noqa: B023
            os.kill(process_of_rank(rank, tmp_path), signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stderr.count("resuming from step") == 4
    assert_same(out, undisturbed)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_two_launchers_go_on_after_two_kills(backend: str, tmp_path: Path, undisturbed: Path) -> None:
    """As two machines of two processes, which meet by torchrun's two ways; a rank of each is killed."""
    out, port = tmp_path / "run", str(free_port())
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "4"]
    meet = {
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}"],
        "static": ["--master-addr", "127.0.0.1", "--master-port", port],
    }[backend]
    command = ["-m", *COMMAND[2:], "--steps", str(STEPS), "--out", str(out)]
    ranks = [["--node-rank", str(machine)] if backend == "static" else [] for machine in range(2)]
    with (
        start(tmp_path, *launcher, *meet, *ranks[0], *command) as one,
        start(tmp_path, *launcher, *meet, *ranks[1], *command) as two,
    ):
        for step, rank in ((2, 3), (8, 0)):
            wait_until(lambda: last_step(out) >= step, one)  # noqa: B023
            os.kill(process_of_rank(rank, tmp_path), signal.SIGKILL)
        errors = [each.communicate()[1] for each in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), errors
    assert "".join(errors).count("resuming from step") == 2
    assert_same(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "sizes"), [(64, (2, 4)), (192, (3, 6))])
def test_one_model_file_for_any_number_of_processes(batch: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    values = VALUES | {"batch": batch, "bn_batch": 16, "checkpoint_minutes": 1}
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={str(value).lower()}")]
    digests = []
    for n in (1, *sizes):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
        out = tmp_path / str(n)
        command = [
            sys.executable,
            *launcher,
            *COMMAND[1 : -len(SETTINGS)],
            *settings,
            "--steps",
            "8",
            "--out",
            str(out),
        ]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(set(digests)) == 1


REPLAYED = """
import sys
from dataclasses import replace
from resnetlab.cli.main import main
from resnetlab.training import cuda_graph
from resnetlab.training.tasks import classification
from test_cuda_graph import anew
cuda_graph.record_cuda_graph = lambda compute, **_: anew(compute)
classification.choose_compilation = lambda config, *_: replace(config, cuda_graph=True)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_whole_run_whose_steps_two_processes_replay(tmp_path: Path) -> None:
    """From the first step to the report, beside evaluations and checkpoints; a CPU computes the "graphs" anew."""
    values = VALUES | {"stochastic_depth": 0, "recompute": False}  # a replay has one seed for all micro-batches
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={str(value).lower()}")]
    command = [*COMMAND[3 : -len(SETTINGS)], *settings, "--steps", str(STEPS), "--out"]
    assert cli([*command, str(tmp_path / "alone")]) == 0
    (tmp_path / "program.py").write_text(REPLAYED)
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | places | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), *command, str(tmp_path / "run")],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    for process in processes:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    assert figures(tmp_path / "run") == figures(tmp_path / "alone")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (recorded["processes"], recorded["replayed_steps"]) == (2, STEPS)
    assert "replayed from one recording" in recorded["steps"]


@pytest.mark.slow
def test_a_kill_of_the_only_process_loses_nothing(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    command = [*COMMAND, "--steps", str(STEPS), "--out", str(out)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: last_step(out) >= 7, process)
        process.kill()
    assert last_step(out) < STEPS
    resume(out)
    assert_same(out, undisturbed)


SLOW_TO_READ = """
import time
from datetime import timedelta
from resnetlab import distributed
distributed.TIMEOUT = timedelta(seconds=2)
with distributed.join_process_group() as world:
    with world.first_process_first():
        time.sleep(6 if world.is_first else 0)
    assert world.all_reduce_max(world.rank) == (1,)
"""


@pytest.mark.slow
def test_processes_wait_while_the_first_one_reads(tmp_path: Path) -> None:
    """Longer than during a step, in which a silent process counts as gone."""
    (tmp_path / "program.py").write_text(SLOW_TO_READ)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_batch_must_divide() -> None:
    assert count_micro_batches(paper_cifar(), World()) == 2 and count_micro_batches(paper_cifar(), World(1, 2)) == 1
    assert (
        count_micro_batches(paper_imagenet(), World(0, 8)) == 1
        and count_micro_batches(replace(paper_cifar(), bn_sync=True), World(0, 4)) == 2
    )
    assert count_micro_batches(replace(paper_cifar(), bn_batch=0), World(0, 4)) == 1
    with pytest.raises(
        UsageError, match="batch 128 in micro-batches of 64 cannot be shared evenly by 3 processes, only by 1 or 2;"
    ):
        count_micro_batches(paper_cifar(), World(0, 3))
    with pytest.raises(UsageError, match=r"change --procs, batch or bn_batch \(bn_batch=8 would fit\)\."):
        count_micro_batches(photos(), World(0, 4))


def test_more_processes_than_there_are_cores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["train", "--device", "cpu", "--procs", "4096", "--out", str(tmp_path / "run")]) == 2
    assert "--procs 4096 is not from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def take_part(world: World) -> list[np.ndarray]:
    """Synchronised BN in one of two processes: forward and backward over its half of the images."""
    net, x = bn_net(), images()
    convert_sync_batchnorm(net, world)
    half = x[4 * world.rank : 4 * world.rank + 4].clone().requires_grad_()
    collectives: list[str] = []
    for name in ("all_to_all_single", "all_gather_into_tensor", "all_reduce"):  # this process ends with the test
        setattr(torch.distributed, name, count_calls(name, getattr(torch.distributed, name), collectives))
    net(half).square().sum().backward()
    assert collectives == ["all_gather_into_tensor"] * 2, "one collective each way"
    return [value.detach().numpy() for value in (half.grad, *(p.grad for p in net.parameters()), *net.buffers())]


def count_calls(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*args, **options)

    return called


def bn_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Conv2d(5, 4, 3)).train()


def images() -> torch.Tensor:
    """Those of the second process are brighter."""
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1)) + torch.arange(8).view(8, 1, 1, 1)


def test_synchronised_statistics_are_those_of_all_images() -> None:
    found = call_in_processes(2, take_part)
    net, x = bn_net(), images().requires_grad_()
    net(x).square().sum().backward()
    a, b = ([torch.as_tensor(value) for value in values] for values in found)
    torch.testing.assert_close(torch.cat([a[0], b[0]]), x.grad, rtol=1e-4, atol=1e-5)
    for i, parameter in enumerate(net.parameters(), 1):
        torch.testing.assert_close(a[i] + b[i], parameter.grad, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(a[-3:], net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
