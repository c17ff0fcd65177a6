"""The step against torch's own optimizer and a hand computation; warm-up by training error; what a run writes."""

from __future__ import annotations

import ctypes
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import resnetlab
from cells import make_voc_folder
from resnetlab.cli.main import run_command
from resnetlab.device import select_device
from resnetlab.errors import DivergedError, RunError, UsageError
from resnetlab.models.resnet import build
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.optim import OPTIMIZERS, SGD, AdamW, Optimizer
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import quick
from resnetlab.training.step import train_step
from resnetlab.training.tasks import classification

TINY = {"net": "resnet8", "image_size": 8, "batch": 32, "log_every": 5, "eval_every": 10, "checkpoint_minutes": 0}


def tiny(**values: object) -> Recipe:
    return replace(quick().rescale(20), **(TINY | {"precision": "fp32"} | values))  # type: ignore[arg-type]


class Reached(Exception):
    """The optimizer's step was called; the names of the functions on the way there, the command's first."""


@pytest.mark.parametrize("task", ["train", "detect", "segment"])
def test_five_frames_lead_from_the_command_to_the_optimizers_step(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Optimizer, lr: float) -> None:
        raise Reached(*(frame.function for frame in reversed(inspect.stack())))

    monkeypatch.setattr(Optimizer, "step", step)
    data, words, small = "digits", ["train"], ["--set", "batch=4", "--steps", "1", "--device", "cpu"]
    if task != "train":
        data, words = str(make_voc_folder(tmp_path / "voc")), [task, "train"]
        small += ["--set", "image_size=64", "--set", "longest=80", "--set", "sides=64", "--set", "widths=8,8,8,8"]
    command = "_".join(words)
    with pytest.raises(Reached) as caught:
        run_command([*words, data, *small, "--out", str(tmp_path / "run")])
    names = list(caught.value.args)
    assert names[names.index(command) :] == [command, "start_run", "train_to_end", "train_step", "step"]


def test_sgd_equals_torch_to_the_bit() -> None:
    for decay_all in (True, False):
        ours, theirs = build("resnet8", seed=0), build("resnet8", seed=0)
        recipe = replace(quick(), momentum=0.9, weight_decay=0.01, decay_all=decay_all)
        sgd = SGD(ours, recipe)
        weights = [p for p in theirs.parameters() if p.ndim > 1 or decay_all]
        others = [p for p in theirs.parameters() if p.ndim == 1 and not decay_all]
        groups = [{"params": weights, "weight_decay": 0.01}] + (
            [{"params": others, "weight_decay": 0.0}] if others else []
        )
        reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for step, lr in enumerate((0.1, 0.1, 0.01, 0.01)):
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            for net in (ours, theirs):
                F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
            sgd.step(lr)
            for group in reference.param_groups:
                group["lr"] = lr
            reference.step()
            reference.zero_grad()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_adamw_equals_torch_to_the_bit() -> None:
    ours, theirs = build("resnet8", seed=0), build("resnet8", seed=0)
    values = {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.05, "decay_all": False}
    optimizer = AdamW(ours, replace(quick(), optimizer="adamw", **values))  # type: ignore[arg-type]
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == decays], "weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.99), eps=1e-6)
    for step, lr in enumerate((0.1, 0.1, 0.01, 0.01)):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        for net in (ours, theirs):
            F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_equal_their_papers_in_float64(name: str) -> None:
    """The papers' formulas, layer by layer; biases and BN's parameters have the update of SGD and Adam."""
    values = {
        "weight_decay": 0.05,
        "momentum": 0.8,
        "trust_coefficient": 0.02,
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-6,
    }
    net = build("resnet8", seed=0)
    torch.nn.init.zeros_(net.fc.weight)  # without a length: its ratio is 1
    optimizer = OPTIMIZERS[name](net, replace(quick(), optimizer=name, decay_all=False, **values))  # type: ignore[arg-type]
    weights = {key: p.detach().double() for key, p in net.named_parameters()}
    first, second = ({key: torch.zeros_like(w) for key, w in weights.items()} for _ in range(2))
    for step, lr in enumerate((0.1, 0.1, 0.01), 1):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3])).backward()
        for key, p in net.named_parameters():
            assert p.grad is not None
            g, w, adapts = p.grad.double(), weights[key], p.ndim > 1
            decay = 0.05 if adapts else 0.0
            if name == "lars":
                ratio = 0.02 * w.norm() / (g.norm() + decay * w.norm()) if adapts and w.norm() else 1.0
                first[key] = 0.8 * first[key] + ratio * (g + decay * w)
                weights[key] = w - lr * first[key]
            else:
                first[key], second[key] = 0.8 * first[key] + 0.2 * g, 0.99 * second[key] + 0.01 * g**2
                update = first[key] / (1 - 0.8**step) / ((second[key] / (1 - 0.99**step)).sqrt() + 1e-6) + decay * w
                weights[key] = w - lr * (w.norm() / update.norm() if adapts and w.norm() else 1.0) * update
        optimizer.step(lr)
        for key, p in net.named_parameters():
            torch.testing.assert_close(p.detach().double(), weights[key], rtol=2e-5, atol=2e-6)
            p.data.copy_(weights[key])  # so that differences do not add up over the steps
            weights[key] = p.detach().double()


def test_weight_decay_reaches_only_what_it_should() -> None:
    net = build("resnet8", seed=0)
    before = {k: v.clone() for k, v in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    SGD(net, replace(quick(), decay_all=False, weight_decay=0.5)).step(0.1)
    for name, p in net.named_parameters():
        factor = 0.95 if p.ndim > 1 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_one_step_equals_a_hand_computation(tmp_path: Path) -> None:
    recipe = tiny()
    task = prepare(recipe)
    (batch,) = task.micro_batches(0)
    hand = build("resnet8", channels=1, classes=10)
    hand.load_state_dict(task.net.state_dict())
    loss = F.cross_entropy(hand(batch.images), batch.labels)
    loss.backward()
    measured, wrong, norm = train_step(TrainState.create(task), [batch], lr=0.1)
    torch.testing.assert_close(measured, loss.detach())
    assert 0 <= float(wrong) <= 1
    gradient = torch.cat([p.grad.flatten() for p in hand.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, gradient.norm())
    for ours, theirs in zip(task.net.parameters(), hand.parameters(), strict=True):
        assert theirs.grad is not None
        expected = theirs.detach() - 0.1 * (theirs.grad + recipe.weight_decay * theirs.detach())
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-5, atol=1e-6)


def prepare(recipe: Recipe) -> classification.ClassificationTask:
    from resnetlab.training.train import RunOptions, build_task

    task = build_task(recipe, RunOptions(device="cpu"))
    assert isinstance(task, classification.ClassificationTask)
    return task


def test_a_run_writes_its_folder(tmp_path: Path) -> None:
    result = resnetlab.train(tiny(), out=tmp_path / "run", device="cpu")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "report.html",
        "result.json",
    }
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000020.safetensors",  # alone, and without the optimizer's state
    ]
    lines = read_metrics(RunFolder(tmp_path / "run"))
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 5), ("train", 10), ("held_out", 10), ("train", 15), ("train", 20), ("held_out", 20)]  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result.to_json()))
    assert result.n == 360 and result.split == "test" and result.steps == 20
    assert result.budget == "20 of the 600 steps of quick (3.3%)"
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    model = resnetlab.load(result.model)
    assert model.metrics["test"]["top1_error"] == result.top1_error
    assert model.recipe["net"] == "resnet8" and model.classes == tuple("0123456789")
    evaluated = resnetlab.evaluate(model, "digits", precision="fp32", device="cpu")
    assert evaluated.top1_error == result.top1_error and evaluated.n == 360


def test_json_keys_of_train_are_a_contract(tmp_path: Path) -> None:
    result = resnetlab.train(tiny(steps=1, milestones=()), out=tmp_path / "run", device="cpu")
    assert set(result.to_json()) == {
        "run", "model", "report", "split", "n", "top1_error", "top1_interval", "top5_error", "held_out_error", "steps",
        "balanced_error", "none_of_these", "seconds", "images_per_second", "parameters", "budget"}  # fmt: skip


def test_training_on_everything_holds_nothing_out(tmp_path: Path) -> None:
    messages: list[str] = []
    result = resnetlab.train(
        tiny(val_images=0, steps=2, milestones=()), out=tmp_path / "run", device="cpu", report=messages.append
    )
    assert result.held_out_error is None
    assert "1,437 images to train on, 0 held out" in messages[0]


def test_warmup_by_training_error_is_measured_and_ends(tmp_path: Path) -> None:
    recipe = tiny(warmup="train-error", warmup_lr=0.02, warmup_error=0.85, steps=60, milestones=(), log_every=5)
    resnetlab.train(recipe, out=tmp_path / "run", device="cpu")
    train = [line for line in read_metrics(RunFolder(tmp_path / "run")) if line["kind"] == "train"]
    ends = next(i for i, line in enumerate(train) if line["error"] < 0.85)
    assert [line["lr"] for line in train] == [0.02] * (ends + 1) + [0.1] * (len(train) - ends - 1)
    assert ends < len(train) - 1, "the warm-up never ended"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"the loss is not finite at step \d+ \(learning rate 1e\+30\); try a tenth"
    ) as error:
        resnetlab.train(tiny(lr=1e30, milestones=()), out=tmp_path / "run", device="cpu")
    assert "(lr=1e+29)" in str(error.value)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert int(checkpoint.stem[5:]) < 20


def test_an_unknown_optimizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        resnetlab.train(tiny(), optimizer="adam", out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_two_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [RunFolder.create(None, "digits").path.name for _ in range(3)] == ["digits", "digits-2", "digits-3"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"is not empty; choose another --out"):
        RunFolder.create(tmp_path / "mine", "digits")
    with pytest.raises(RunError, match=r"is a file; --out names a folder"):
        RunFolder.create(tmp_path / "mine" / "thesis.txt", "digits")
    run = RunFolder(tmp_path / "runs" / "digits")
    with run.lock(), pytest.raises(RunError, match="another process is training in"), run.lock():
        pass


def test_bad_values_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for values in ({"net": "resnt20"}, {"normalise": "mean"}, {"init": "he"}, {"shortcut": "D"}, {"precision": "fp8"}):
        with pytest.raises(UsageError):
            resnetlab.train("quick", device="cpu", **values)
    with pytest.raises(UsageError, match="device 'cuda:7' is not available"):
        resnetlab.train("quick", device="cuda:7")
    assert not (tmp_path / "runs").exists()


def test_bf16_is_selected_by_the_hardware() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = "bf16" if any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    assert select_device("auto", "cpu").precision == expected
    assert select_device("fp32", "cpu").precision == "fp32"


def test_a_run_restores_the_process_state(tmp_path: Path) -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        resnetlab.train(tiny(steps=2, milestones=(), threads=1), out=tmp_path / "run", device="cpu")
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.slow
def test_a_steps_memory_is_kept_for_the_next() -> None:
    script = """
import resource, sys, torch
from resnetlab.device import select_device
if sys.argv[1] == "picked":
    select_device("fp32", "cpu", 1)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(10))
"""
    runs = [[sys.executable, "-c", script, way] for way in ("as torch does", "picked")]
    before, after = (int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for run in runs)
    assert before > 10 * 2**26 / 2**21 > 10 * after  # a fault for each page, of 4 KiB or (huge ones) 2 MiB
