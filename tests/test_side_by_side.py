"""One thread carries one micro-batch: bit-identical for any number of threads, errors and older runs as before."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cells
import resnetlab
from resnetlab.device import count_cores
from resnetlab.random import draw_from
from resnetlab.stopping import StopSignal
from resnetlab.training import recipes, recorder
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recipe import BaseRecipe, Overrides, Recipe
from resnetlab.training.result import Progress
from resnetlab.training.side_by_side import SideBySideGradients, divide_threads, share_weights
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task, resume, start_run
from runs import assert_same
from tiny_runs import tiny

IN_FOUR = {"bn_batch": 8, "val_images": 0}  # micro-batches of a batch of 32


def trained(recipe: BaseRecipe, steps: int = 3) -> TrainState:
    """The state after a few steps, as a run makes them."""
    threads = torch.get_num_threads()
    try:
        train_state = TrainState.create(build_task(recipe, RunOptions(device="cpu")))
        gradients = select_gradients(train_state, print)
        set_train_mode(train_state.task.net)
        for step in range(steps):
            train_step(train_state, train_state.task.micro_batches(step), 0.1, gradients)
    finally:
        torch.set_num_threads(threads)
    return train_state


def digest(train_state: TrainState) -> str:
    tensors = train_state.tensors()
    return hashlib.sha256(b"".join(x.detach().float().numpy().tobytes() for x in tensors.values())).hexdigest()


@pytest.mark.parametrize(
    "values",
    [
        {"stochastic_depth": 0.3, "recompute": True},
        {"specification": {"shortcut": "dropout"}, "net": "preresnet8", "ema_decay": 0.9},
    ],
    ids=["stochastic depth recomputed", "dropout"],
)
def test_any_number_of_threads_is_bit_identical(values: dict[str, Any]) -> None:
    states = {n: trained(tiny(**IN_FOUR | {"threads": n} | values), steps=2) for n in (1, 3, 4)}
    assert {n: state.task.device_config.side_by_side for n, state in states.items()} == {n: n for n in states}
    assert len({digest(state) for state in states.values()}) == 1
    assert len({state.recipe.key for state in states.values()}) == 1


def test_threads_that_are_left_over_work_inside_operations() -> None:
    """Their number is recorded, since the last bits depend on it, and kept when there are others."""
    train_state = trained(tiny(**IN_FOUR, threads=9), steps=1)
    recipe, device_config = train_state.recipe, train_state.task.device_config
    assert (recipe.op_threads, device_config.side_by_side, recipe.threads) == (2, 4, 9)
    assert "8 threads, 2 for each of 4 micro-batches at a time" in str(device_config)
    for threads, side_by_side in ((4, 2), (1, 1)):
        fewer = trained(replace(recipe, threads=threads), steps=1)
        assert fewer.task.device_config.side_by_side == side_by_side and digest(fewer) == digest(train_state)


@pytest.mark.filterwarnings("ignore::resnetlab.models.resnet.SmallImageWarning")
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_detectors_and_segmenters_too(task: str, tmp_path: Path) -> None:
    """Their heads draw (proposals, scales, dropout), and a pyramid's head is used on several maps."""
    values = {"image_size": 64, "longest": 96, "batch": 4, "bn_batch": 2, "sides": (48, 80), "precision": "bf16"}
    specification = {"widths": (8, 8, 8, 16), "depths": (1, 1, 1, 1)}
    recipe = recipes.find_recipe({"detect": "boxes", "segment": "masks"}[task], task)
    values |= {"regions": 16, "pyramid": 16} if task == "detect" else {}
    recipe = replace(recipe, data=str(cells.make_voc_folder(tmp_path)), specification=specification, **values)
    one, two = (trained(replace(recipe, threads=threads), steps=2) for threads in (1, 2))
    assert two.task.device_config.side_by_side == 2
    assert digest(one) == digest(two)


def test_a_run_is_resumed_with_another_number_of_threads(tmp_path: Path) -> None:
    recipe = replace(tiny(**IN_FOUR, threads=2, checkpoint_minutes=0.0).rescale(4), log_every=1)

    def stop(p: Progress) -> None:
        if p.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    straight, out = tmp_path / "straight", tmp_path / "run"
    resnetlab.train(recipe, out=straight, device="cpu")
    with pytest.raises(StopSignal):
        resnetlab.train(recipe, out=out, device="cpu", progress=stop)
    resume(out, overrides=Overrides(values={"threads": "3"}))
    assert_same(out, straight)


def test_older_runs_keep_all_threads_inside_operations() -> None:
    """They recorded one number, which decided the bits; their checkpoints are found by the same key."""
    values = tiny(**IN_FOUR, threads=2, compile="off").to_json()
    del values["op_threads"], values["fused_bn"], values["winograd"], values["sampling"]
    recipe = Recipe.from_values(values)
    assert recipe.op_threads == 2
    assert recipe.key == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    train_state = trained(recipe, steps=0)
    assert train_state.task.device_config.side_by_side == 1 and train_state.recipe == recipe


class Strange(nn.Module):
    """A layer of a user."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and len(x) == 8 and float(x.detach().sum()) > 0:
            raise self.error
        return x + 0 * torch.rand(1)


def test_layers_of_users_get_one_micro_batch_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(tiny(**IN_FOUR, threads=2), RunOptions(device="cpu"))
    task.net.maxpool = Strange()
    fresh = replace(task, recipe=replace(task.recipe, op_threads=0))
    in_turn = divide_threads(fresh)
    assert in_turn.recipe.op_threads == 2 and in_turn.device_config.side_by_side == 1
    assert "one micro-batch after the other: Strange may not be safe in several threads" in str(in_turn.device_config)
    monkeypatch.setattr(Strange, "thread_safe", True, raising=False)
    assert divide_threads(fresh).device_config.side_by_side == 2
    torch.set_num_threads(1)


def test_an_error_in_a_thread_is_the_step_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(tiny(**IN_FOUR, threads=2), RunOptions(device="cpu"))
    task.net.maxpool = Strange(ValueError("a sentence of its own"))
    train_state, before = TrainState.create(task), threading.active_count()
    gradients = SideBySideGradients(task)
    averages = [x.clone() for x in train_state.statistics.averages]
    with pytest.raises(ValueError, match="a sentence of its own"):
        train_step(train_state, task.micro_batches(0), 0.1, gradients)
    assert train_state.state.step == 0 and all(map(torch.equal, averages, train_state.statistics.averages))
    del gradients
    assert threading.active_count() <= before + 2


def test_replicas_share_weights_but_not_statistics() -> None:
    net = resnetlab.build("resnet8", seed=0)
    replica = share_weights(net)
    for p, q in zip(net.parameters(), replica.parameters(), strict=True):
        assert (
            p is not q and p.data_ptr() == q.data_ptr() and not q._is_view()
        )  # autocast does not cache casts of views
    replica.bn1.running_mean.fill_(7)
    assert not net.bn1.running_mean.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_generator_draws_what_torch_s_global_one_draws(dtype: torch.dtype) -> None:
    x = torch.ones(3, 5, 7, 9, dtype=dtype)

    def draw() -> list[Tensor]:
        inplace = F.dropout(x.clone(), 0.4, inplace=True)
        return [torch.rand(5), F.dropout(x, 0.3), nn.Dropout(0.9)(x), torch.randperm(50), x.clone().uniform_(), inplace]

    torch.manual_seed(3)
    expected, state = draw(), torch.get_rng_state()
    with draw_from(torch.Generator().manual_seed(3)):
        found = draw()
    assert all(map(torch.equal, found, expected)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000", "job/cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 1000),
        ({}, 1000),
    ],
)
def test_threads_follow_a_container_s_quota(
    files: dict[str, str], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1000))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    assert count_cores(tmp_path, own) == limit


@pytest.mark.parametrize(("share", "told"), [(0.5, "other programs take 50% of the CPU time"), (0.8, "")])
def test_other_programs_are_reported_once(
    share: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a second, in which this process computes for a share of what its two threads could."""
    monkeypatch.setattr(recorder, "count_cores", lambda: 2)
    monkeypatch.setattr(recorder, "MIN_COMPUTING", 0.0)
    monkeypatch.setattr(recorder.time, "process_time", lambda: 2 * share * time.perf_counter())
    messages: list[str] = []
    start_run(tiny(**IN_FOUR, threads=2).rescale(4), tmp_path / "run", RunOptions(device="cpu", report=messages.append))
    assert [told in m for m in messages if "other programs" in m] == [True] * bool(told)


def test_threads_that_a_step_keeps_busy() -> None:
    task = build_task(tiny(batch=24, bn_batch=8, val_images=0, threads=2), RunOptions(device="cpu"))
    assert task.busy_threads == 1.5
    torch.set_num_threads(1)
