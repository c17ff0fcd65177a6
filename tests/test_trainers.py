"""The examples of docs/how-to/trainers.md train a network under other programs' trainers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import resnetlab
from documents import REPOSITORY, blocks

EXAMPLES = blocks("python", REPOSITORY / "docs" / "how-to" / "trainers.md")


@pytest.mark.parametrize(
    "package",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("lightning", "transformers")), "accelerate"],
)
def test_an_example_trains(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in EXAMPLES if f"import {package}\n" in block or f"from {package} import" in block)
    torch.manual_seed(0)
    build, before = resnetlab.build, []

    def build_and_copy(*args: object, **values: object) -> torch.nn.Module:
        net = build(*args, **values)  # type: ignore[arg-type]
        before.append(net.fc.weight.detach().clone())
        return net

    monkeypatch.setattr(resnetlab, "build", build_and_copy, raising=False)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        pytest.importorskip(package, reason="the dependency group dev")
        exec(compile(example, package, "exec"), names)
    net = names["classifier"].net if package == "lightning" else names["net"]  # type: ignore[attr-defined]
    assert isinstance(net, resnetlab.models.resnet.ResNet) and not torch.equal(net.fc.weight, before[0])
    assert all(value.isfinite().all() for value in net.state_dict().values())
