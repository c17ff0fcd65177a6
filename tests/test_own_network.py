"""A network of the user's own, `train(net=module)`, is trained, resumed, saved, loaded, evaluated and exported."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnetlab
from resnetlab.data.digits import load_digits
from resnetlab.errors import ModelFileError, ResNetLabError, RunError, UsageError
from resnetlab.evaluation.evaluate import Evaluation
from resnetlab.inference.hub import save_pretrained
from resnetlab.inference.predict import Model
from resnetlab.tensor_file import read_metadata
from resnetlab.training.average import reestimate_bn_statistics
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recorder import RunStopped
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task
from runs import assert_same
from tiny_runs import TINY, tiny

VALUES = {k: v for k, v in TINY.items() if k != "net"} | {"device": "cpu", "progress": False}
VALUES |= {"steps": 8, "eval_every": 3, "checkpoint_minutes": 0.0, "bn_batch": 16}


class Small(nn.Module):
    """With dropout, tied weights, a statistic of its own and an output object, as other libraries' networks have."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(width), nn.Dropout2d(0.2)
        self.head = nn.Linear(width, classes)
        self.also_head = self.head
        self.register_buffer("calls", torch.zeros(()))

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.calls += 1
        logits = self.head(self.drop(self.forward_features(x)).mean((2, 3)))
        return type("Output", (), {"logits": logits})() if self.training else logits


class Other(Small):
    pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("own") / "run"
    resnetlab.train("digits", net=Small(), out=out, **VALUES)  # type: ignore[arg-type]
    return out


@pytest.fixture
def model(run: Path) -> Model:
    loaded = resnetlab.load(run, net=Small(), device="cpu")
    assert isinstance(loaded, Model)
    return loaded


def test_it_trains_in_place_and_resumes_bit_identically_from_any_step(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Small()
    with pytest.raises(RunStopped):
        resnetlab.train("digits", net=net, out=tmp_path / "b", on_evaluate=lambda _: True, **VALUES)  # type: ignore[arg-type]
    assert net.calls == 2 * 3  # two micro-batches in each of three steps; trials are made on copies
    for other, error, sentence in (
        (None, UsageError, r"the network of this recipe, Small, was given in Python; give it again: .*net=Small\(…\)"),
        (Other(), RunError, "you ask for net = 'own:Other' \\(not 'own:Small'\\)"),
        ("resnet8", RunError, "you ask for net = 'resnet8'"),
        (Small(width=4), RunError, "does not fit this run's network"),
    ):
        with pytest.raises(error, match=sentence):
            resnetlab.train(resume=tmp_path / "b", net=other, progress=False)
    resnetlab.train(resume=tmp_path / "b", net=Small(), progress=False)  # its weights come from the checkpoint
    assert_same(run, tmp_path / "b")
    # one that was stopped before its first step had its first weights from the caller alone
    stopped = tmp_path / "c"
    torch.manual_seed(0)

    def stop(_: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resnetlab.train("digits", net=Small(), out=stopped, **VALUES | {"progress": stop, "log_every": 1})  # type: ignore[arg-type]
    for later in (stopped / "checkpoints").glob("step-*[1-9].safetensors"):
        later.unlink()
    assert [file.name for file in (stopped / "checkpoints").iterdir()] == ["step-00000000.safetensors"]
    resnetlab.train(resume=stopped, net=Small(), progress=False)
    first, second = (resnetlab.load(each, net=Small()).net.state_dict() for each in (run, stopped))
    assert all(torch.equal(first[key], second[key]) for key in first)
    # a finished run is known as one without the network, and is extended with it
    assert resnetlab.train(resume=stopped, progress=False).steps == 8
    with pytest.raises(UsageError, match="was given in Python; give it again"):
        resnetlab.train(resume=stopped, steps=10, progress=False)
    assert resnetlab.train(resume=stopped, progress=False).steps == 8
    assert resnetlab.train(resume=stopped, net=Small(), steps=10, progress=False).steps == 10


def test_files_say_that_the_network_is_the_users(run: Path) -> None:
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    assert recipe["net"] == "own:Small" and recipe["compile"] == "off" and not recipe.get("specification")
    about = read_metadata(run / "model.safetensors")
    assert about["specification"] == {"own_class": "Small", "channels": 1, "classes": 10}
    assert "Small on digits" in (run / "report.html").read_text()
    with pytest.raises(UsageError, match="was given in Python"):
        resnetlab.train(run / "recipe.toml", progress=False)


def test_the_model_is_used_as_any_other(model: Model, tmp_path: Path) -> None:
    assert repr(model).startswith("Model(network Small (a network of your own); classes 10:")
    evaluation = model.evaluate("digits")
    assert isinstance(evaluation, Evaluation)
    assert evaluation.top1_error == model.metrics["test"]["top1_error"]
    images = load_digits().test.images[:5]  # type: ignore[attr-defined]
    predicted = [each.label for each in model(list(images))]
    assert predicted == [model.classes[i] for i in evaluation.metrics.scores[:5].argmax(1).tolist()]
    assert model.embed(images[0]).shape == (8,)
    model.save(tmp_path / "copy.safetensors")
    again = resnetlab.load(tmp_path / "copy.safetensors", net=Small(), device="cpu")
    assert [each.label for each in again(list(images))] == predicted  # type: ignore[operator]


@pytest.mark.slow
def test_it_is_exported_where_torch_can_trace_it(model: Model, tmp_path: Path) -> None:
    file = model.export(tmp_path / "m.pt2")
    assert json.loads(Path(f"{file}.parity.json").read_text())["top1_agreement"] == 1.0

    class Branching(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    torch.manual_seed(0)
    branching = resnetlab.train("digits", net=Branching(), out=tmp_path / "x", **VALUES | {"steps": 1}).model  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"torch\.export cannot trace"):
        resnetlab.load(branching, net=Branching(), device="cpu").export(tmp_path / "b.pt2")  # type: ignore[union-attr]
    assert not (tmp_path / "b.pt2").exists()


def test_what_a_users_network_lacks_is_a_sentence(model: Model, run: Path, tmp_path: Path) -> None:
    file, image = run / "model.safetensors", load_digits().test.images[0]  # type: ignore[attr-defined]

    cases: tuple[tuple[Callable[[], object], type[Exception], str], ...] = (
        (
            lambda: resnetlab.load(file),
            ModelFileError,
            r"network of your own; give it again, in Python: .*net=Small\(…\)",
        ),
        (lambda: resnetlab.load(file, net=Other()), ModelFileError, "holds the weights of Small, not of Other"),
        (lambda: resnetlab.load(file, net=Small(4)), ModelFileError, r"other layers .*: conv.weight is \(4, 1"),
        (lambda: resnetlab.evaluate(str(file), "digits"), ModelFileError, "network of your own"),
        (lambda: model.explain(image), UsageError, "needs the layers of one of ResNetLab's networks; Small is"),
        (lambda: model.predict(image, protocol="dense:8"), UsageError, "needs the layers"),
        (lambda: model.keep_classes(["1", "2"]), UsageError, "needs the layers"),
        (lambda: model.export(tmp_path / "m.pth"), UsageError, "needs the layers"),
        (lambda: save_pretrained(model, tmp_path / "hub"), UsageError, "needs the layers"),
        (lambda: resnetlab.build("resnet20", weights=str(file)), ModelFileError, "network of your own"),
    )
    for call, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            call()


WRONG: dict[str, dict[str, Any]] = {
    "Small gives shape (2, 7) for two images, not logits of shape (2, 10): the data have 10 classes": {
        "net": Small(classes=7)
    },
    "failed on two images of 1 x 8 x 8 (channels, height, width)": {"net": nn.Sequential(nn.Conv2d(3, 8, 3))},
    "ReLU has no parameter to train": {"net": nn.ReLU()},
    "net has parameters without a shape": {"net": nn.Sequential(nn.Flatten(), nn.LazyLinear(10))},
    "net is wrapped in DataParallel; give the network inside it, net.module": {"net": nn.DataParallel(Small())},
    "stochastic_depth = 0.2 is for networks that are built by name": {"net": Small(), "stochastic_depth": 0.2},
    "specification = {'shortcut': 'C'} is for networks that are built by name": {"net": Small(), "shortcut": "C"},
    "fused_bn=on cannot be used: it is for networks that are built by name": {"net": Small(), "fused_bn": True},
    "a network of your own brings its own": {"net": Small(), "pretrained": True},
    "quick takes the size of a model to start from; give Small one": {
        "net": Small(),
        "image_size": 0,
    },
    "model and net are the same value; give it once": {"model": Small(), "net": Small()},
    "Small gives shape (2, 3) for two images": {"arch": Small(classes=3)},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_networks_and_values_are_named_before_a_run_folder_is_made(sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ResNetLabError, match=re.escape(sentence)):
        resnetlab.train("digits", out=tmp_path / "run", **VALUES | WRONG[sentence])
    assert not (tmp_path / "run").exists()


def test_one_of_resnetlabs_networks_brings_its_weights_and_gives_an_ordinary_model_file(tmp_path: Path) -> None:
    net = resnetlab.build("resnet8", num_classes=10, in_chans=1, shortcut="B", seed=3)
    before = copy.deepcopy(net.state_dict())
    values = VALUES | {"steps": 1, "lr": 1e-12}
    result = resnetlab.train("digits", net=net, out=tmp_path / "run", **values)  # type: ignore[arg-type]
    model = resnetlab.load(result.model, device="cpu")
    assert isinstance(model, Model) and model.spec.shortcut == "B"
    assert torch.allclose(model.net.state_dict()["fc.weight"], before["fc.weight"], atol=1e-6)
    assert 'net = "own:resnet8"' in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.parametrize("norm", [nn.Identity, partial(nn.BatchNorm2d, 8)])
def test_a_weight_without_a_gradient_or_a_network_without_bn_is_trained_alike_by_any_number_of_threads(
    norm: Any,
) -> None:
    class Partly(nn.Sequential):
        thread_safe = True

    nets = []
    for threads in (1, 2):
        torch.manual_seed(0)
        nets.append(Partly(nn.Conv2d(1, 8, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)))
        nets[-1].unused = nn.Parameter(torch.ones(3))
        task = build_task(tiny(threads=threads, bn_batch=16, net="own:Partly"), RunOptions(device="cpu", net=nets[-1]))
        assert task.device_config.side_by_side == threads
        state = TrainState.create(task)
        gradients = select_gradients(state, print)
        for step in range(2):
            train_step(state, task.micro_batches(step), 0.1, gradients)
        reestimate_bn_statistics(task, 1)
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(one[name], other[name]) for name in one) and bool((one["unused"] < 1).all())


def test_its_micro_batches_go_side_by_side_only_where_nothing_is_drawn_and_its_class_allows_it() -> None:
    class Safe(Small):
        thread_safe = True

    quiet, drawing, counting = Safe(), Safe(), Safe()
    quiet.drop = counting.drop = nn.Identity()  # type: ignore[assignment]
    del quiet._buffers["calls"]
    quiet.calls = 0  # type: ignore[assignment]
    for net, side_by_side, reason in (
        (quiet, 2, ""),
        (drawing, 1, "the network draws random numbers"),
        (counting, 1, "the network keeps calls from step to step"),
        (Small(), 1, "the network draws random numbers"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 2, ""),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.RReLU()), 1, "the network draws random numbers"),
    ):
        named = tiny(threads=2, bn_batch=16, net=f"own:{type(net).__name__}")
        config = build_task(named, RunOptions(device="cpu", net=net)).device_config
        assert config.side_by_side == side_by_side and reason in config.reason
