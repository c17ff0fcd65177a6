"""fp16 with a scaled loss, TF32: on a CPU where torch computes it there, on a simulated GPU otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnetlab import device
from resnetlab.device import default_precision, preserve_settings, select_device, standard_torch_state
from resnetlab.errors import DivergedError, UsageError
from resnetlab.run_folder import RunFolder
from resnetlab.training.checkpoint import CheckpointWriter, TrainState, restore_checkpoint
from resnetlab.training.gradients import select_gradients
from resnetlab.training.run_state import GROWTH_STEPS, INITIAL_SCALE, RunState
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task
from simulated_gpu import GPU, simulated_gpu
from tiny_runs import make_train_state, tiny


def train(train_state: TrainState, steps: range) -> None:
    gradients = select_gradients(train_state, lambda _: None)
    for step in steps:
        output = train_step(train_state, train_state.task.micro_batches(step), 0.05, gradients)
        assert output.loss.isfinite() and output.grad_norm.isfinite()


def test_the_scale_halves_and_grows_as_that_of_torch() -> None:
    """The reference is torch's own update, given the same steps with and without overflow."""
    state, scale, growth = (
        RunState(loss_scale=INITIAL_SCALE),
        torch.tensor(INITIAL_SCALE),
        torch.tensor(0, dtype=torch.int32),
    )
    overflows = {0, 1, 7, 2500, 2501}
    for step in range(3 * GROWTH_STEPS):
        state.update_loss_scale(step not in overflows)
        torch._amp_update_scale_(scale, growth, torch.tensor(float(step in overflows)), 2.0, 0.5, GROWTH_STEPS)  # type: ignore[attr-defined]
        assert (state.loss_scale, state.steps_at_scale) == (float(scale), int(growth)), step
    assert state.skipped_updates == len(overflows) and state.loss_scale == INITIAL_SCALE / 32 * 4


@pytest.mark.parametrize("values", [{}, {"bn_batch": 8, "threads": 2, "clip_norm": 1.0}], ids=["whole", "side by side"])
def test_fp16_trains_nearly_as_fp32(values: dict[str, object]) -> None:
    half, full = (make_train_state(tiny(precision=precision, **values)) for precision in ("fp16", "fp32"))
    before = {name: value.clone() for name, value in full.task.net.state_dict().items()}
    for train_state in (half, full):
        train(train_state, range(2))
    assert half.state.loss_scale == INITIAL_SCALE / 2**half.state.skipped_updates and full.state.loss_scale == 0
    name = "layer1.0.conv1.weight"
    moved, same = (x.task.net.state_dict()[name] - before[name] for x in (half, full))
    assert half.state.skipped_updates == 0 and moved.abs().max() > 0
    assert (moved - same).norm() < 0.05 * same.norm()


def test_an_update_that_overflows_is_left_out() -> None:
    train_state = make_train_state(tiny(precision="fp16", optimizer="adamw", ema_decay=0.9))
    train_state.state.loss_scale = 2.0**40
    before = {name: value.clone() for name, value in train_state.task.net.named_parameters()}
    train(train_state, range(1))
    assert train_state.state.loss_scale == 2.0**39 and train_state.state.skipped_updates == train_state.state.step == 1
    assert not train_state.optimizer.state and not train_state.optimizer.grads()
    assert all(torch.equal(value, before[name]) for name, value in train_state.task.net.named_parameters())
    train_state.state.loss_scale = 2.0**-10
    with pytest.raises(DivergedError, match="overflow in fp16 at step 1, whatever the loss's scale"):
        train_step(train_state, [], 0.1, overflow)


def overflow(train_state: TrainState, micro_batches: object) -> list[torch.Tensor]:
    """Gradients of which one is not finite."""
    for parameter in train_state.task.net.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    return [torch.tensor(1.0), torch.tensor(0.5)]


def test_the_scale_is_resumed_exactly(tmp_path: Path) -> None:
    recipe = tiny(precision="fp16", steps=6)
    whole, first, second = (make_train_state(recipe) for _ in range(3))
    for train_state in (whole, first):
        train_state.state.loss_scale, train_state.state.steps_at_scale = 2.0**34, GROWTH_STEPS - 1  # overflows at first
    train(whole, range(6))
    train(first, range(2))
    run = RunFolder.create(tmp_path / "run", "run")
    writer = CheckpointWriter(run)
    writer.save(first)
    writer.close()
    restore_checkpoint(run, second)
    assert second.state == replace(first.state, losses=second.state.losses, errors=second.state.errors)
    train(second, range(2, 6))
    assert second.state.loss_scale == whole.state.loss_scale < 2.0**34
    assert second.state.skipped_updates == whole.state.skipped_updates > 0
    for name, tensor in whole.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name


def test_auto_takes_fp16_where_a_gpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch):
        assert default_precision(GPU) == "bf16"
        monkeypatch.setattr(device, "_computes_bf16", lambda _: False)
        for capability, precision in (((7, 5), "fp16"), ((6, 1), "fp32")):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
            chosen = select_device("auto", str(GPU), training=True)
            assert chosen.precision == default_precision(GPU) == precision
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert select_device("auto", str(GPU)).precision == "fp32"  # nothing but training scales a loss
        assert "but fp16" in str(select_device("auto", str(GPU), training=True))
    with pytest.raises(UsageError, match="unknown precision 'fp16'"):
        select_device("fp16", "cpu")


def test_a_step_of_fp16_on_a_gpu_waits_only_for_the_overflow_check(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as gpu:
        train_state = TrainState.create(build_task(tiny(precision="fp16"), RunOptions(device=str(GPU))))
        train(train_state, range(1))
        batch = train_state.task.micro_batches(1)
        gpu.waits.clear()
        train_step(train_state, batch, 0.1)
        assert gpu.waits == ["_local_scalar_dense in resnetlab.training.step._keep_update"]


def test_tf32_is_switched_on_for_a_gpu_alone_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tf32 is a format of NVIDIA's GPUs"):
        select_device("tf32", "cpu", training=True)
    before = torch.get_float32_matmul_precision()
    with simulated_gpu(monkeypatch), standard_torch_state():
        config = select_device("tf32", str(GPU), training=True)
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        with config.autocast():
            assert not torch.is_autocast_enabled("cuda")
        with monkeypatch.context() as turing:  # which takes the switch, and computes in fp32
            turing.setattr(device, "_computes_tf32", lambda _: False)
            with pytest.raises(UsageError, match="since Ampere"):
                select_device("tf32", str(GPU), training=True)
        with preserve_settings():
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        select_device("fp32", str(GPU))  # not to train: it leaves a run's
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == before
