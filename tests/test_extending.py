"""What CONTRIBUTING says of adding things holds: one of each is added here, as an entry of its table, and used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from resnetlab import studies
from resnetlab.data import digits, sources
from resnetlab.models.resnet import build
from resnetlab.nn.blocks import ACTIVATION_ORDERS, ActivationOrder
from resnetlab.studies import catalogue
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import run_studies
from resnetlab.training.optim import OPTIMIZERS, Optimizer
from resnetlab.training.python_api import train


def test_an_activation_order_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown activation_order 'relu-before-bn'"):
        build("resnet8", activation_order="relu-before-bn")
    order = ActivationOrder(before="", between="rb", last="rb", after_add="")
    monkeypatch.setitem(ACTIVATION_ORDERS, "relu-before-bn", order)
    net = build("resnet8", activation_order="relu-before-bn", classes=3)
    block, x = net.layer1[0].eval(), torch.randn(2, 16, 8, 8)
    f = block.bn2(block.conv2(block.bn1(block.conv1(x).relu())).relu())
    torch.testing.assert_close(block(x), x + f)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class SignSGD(Optimizer):
    """Steps of one length in every coordinate (Bernstein et al. 2018, arXiv 1802.04434)."""

    buffers: ClassVar[tuple[str, ...]] = ()

    def _update(self, names: list[str], decay: float, lr: float) -> None:
        parameters, grads = self._tensors(names)
        torch._foreach_add_(parameters, torch._foreach_sign(grads), alpha=-lr)


def test_an_optimizer_and_a_data_source_are_one_entry_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = digits.load_digits()
    monkeypatch.setitem(OPTIMIZERS, "signsgd", SignSGD)
    monkeypatch.setitem(sources.BUILTIN, "numbers", lambda data_dir: few)
    values = {"net": "resnet8", "image_size": 8, "batch": 32, "threads": 1, "optimizer": "signsgd", "lr": 0.001}
    result = train("quick", data="numbers", steps=4, out=tmp_path / "run", device="cpu", **values)
    assert result.steps == 4 and result.n == len(few.test)


RUNS_STUDY = '''
"""How many runs a setting asks for."""

from resnetlab.studies.study import Row, Study, StudyResult


class Runs(Study):
    name = "runs"
    question = "How many runs are there?"
    place = "2015 Fig. 0"

    def plan(self, setting):
        return []

    def read(self, setting, outcomes, on_progress):
        return StudyResult(answer="None.", rows=[Row("nothing", "runs", (0.0,), "", unit="count")])
'''


def test_a_study_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "how_many_runs.py").write_text(RUNS_STUDY)
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "resnetlab.studies.how_many_runs", raising=False)
    found = catalogue.find_studies()
    assert list(found) == ["runs", *catalogue.STUDIES]  # by the place in the papers
    monkeypatch.setattr(catalogue, "STUDIES", found)
    (study,) = catalogue.select_studies("runs")
    assert study.question == "How many runs are there?"
    (output,) = run_studies([study], Setting("digits", tmp_path, "smoke", 1), root=tmp_path)
    assert output.result.answer == "None."
