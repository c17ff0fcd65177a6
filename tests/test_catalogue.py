"""The commands that show what there is: models, recipes, doctor, runs and their comparison, completion."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import resnetlab
from resnetlab.cli.main import app, run_command
from resnetlab.models.cost import compute_cost, compute_totals
from resnetlab.models.spec import get_specification
from tiny_runs import TINY


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run_command([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["resnet20", "preresnet164", "resnet50v1.5", "plain34", "resnet18"])
def test_the_totals_are_those_of_all_layers(name: str) -> None:
    spec = get_specification(
        name, shortcut="exclusive-gate" if name == "resnet20" else get_specification(name).shortcut
    )
    cost = compute_cost(spec)
    assert compute_totals(spec) == (cost.parameters, cost.multiply_adds)


def test_models_lists_networks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["net"]: row for row in printed(capsys, "models", "resnet*")["models"]}
    assert rows["resnet50"]["parameters"] == 25_557_032 and rows["resnet50"]["multiply_adds"] == 3_857_973_248
    assert rows["resnet50"]["paper_top1_error"] == 0.2285 and rows["resnet20"]["paper_top1_error"] == 0.0875
    assert "plain20" not in rows and rows["resnet50v1.5"]["paper_top1_error"] is None
    assert run_command(["models", "resnet5*"]) == 0
    assert re.search(r"resnet56 +32 +0\.85 M +0\.1\d\d G +6\.97% \(cifar10\)", capsys.readouterr().out)
    assert run_command(["models", "vgg*"]) == 2
    assert "no network matches 'vgg*'" in capsys.readouterr().err


def test_recipes_lists_and_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {recipe["name"]: recipe for recipe in printed(capsys, "recipes")["recipes"]}
    assert listed["paper-cifar"]["steps"] == 64_000 and listed["boxes"]["task"] == "detect"
    assert "64k iterations" in listed["paper-cifar"]["about"]
    assert run_command(["recipes", "boxes"]) == 0
    assert 'name = "boxes"' in capsys.readouterr().out
    assert run_command(["recipes", "papr-cifar"]) == 2
    assert "did you mean 'paper-cifar'" in capsys.readouterr().err


def test_doctor_names_what_is_missing_and_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnetlab.cli import catalogue

    found = catalogue._version
    monkeypatch.setattr(catalogue, "_version", lambda name: None if name == "uvicorn" else found(name))
    monkeypatch.setattr("resnetlab.training.timing.measure_bf16", lambda: 1.25)
    document = printed(capsys, "doctor")
    assert document["cores"] >= 1 and document["bf16_speedup"] == 1.25
    assert document["fused_kernel"].startswith("fused BN and ReLU, Winograd's convolution: ")
    serve = document["extras"]["serve"]
    assert serve["missing"] == ["uvicorn"] and not serve["installed"] and "[serve]" in serve["install"]
    assert document["extras"]["fast"] == {"installed": True, "missing": [], "install": None}
    assert document["versions"]["torch"] and document["devices"][-1].startswith("cpu, ")
    assert run_command(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "takes 0.80 times as long as in fp32" in out and document["fused_kernel"] in out and "cores  " in out
    assert not re.search("[0-9a-f]{32}", out)  # a key of the kernel's cache made a line of 190 columns
    assert "without uvicorn" in out and serve["install"] in out and "all" not in document["extras"]


def test_doctor_runs_from_source_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import PackageNotFoundError

    from resnetlab.cli import catalogue

    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(catalogue, "requires", requires)
    monkeypatch.setattr("resnetlab.training.timing.measure_bf16", lambda: 1.25)
    assert printed(capsys, "doctor")["extras"] == {}
    assert run_command(["doctor"]) == 0


def test_bf16_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnetlab.training import timing

    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    assert 0.001 < timing.measure_bf16(seconds=0.0) < 100


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 0.1), ("b", 0.2)):
        values: dict[str, Any] = TINY | {"lr": lr, "eval_every": 5, "log_every": 2, "device": "cpu", "progress": False}
        resnetlab.train("digits", steps=10, out=folder / name, **values)
    shutil.copytree(folder / "b", folder / "c")
    (folder / "c" / "result.json").unlink()
    for step in (3, 12):  # one that was stopped before it logged its next line
        (folder / "c" / "checkpoints" / f"step-{step:08}.safetensors").touch()
    return folder


def test_runs_lists_them_with_their_figures(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _, c = printed(capsys, "runs", str(runs))["runs"]
    result = json.loads((runs / "a" / "result.json").read_text())
    assert a["result"] == {"top1_error": result["top1_error"]} and a["step"] == a["steps"] == 10 and a["finished"]
    assert a["held_out"]["top1_error"] == result["held_out_error"] and not c["finished"] and c["result"] == {}
    assert c["step"] == 12
    assert run_command(["runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert f"test error {100 * result['top1_error']:.2f} %" in out and "not finished" in out
    assert run_command(["runs", str(runs / "no")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "kitchen" / "recipe.toml").write_text('title = "soup"')
    assert "has no number of steps" in printed(capsys, "runs", str(tmp_path / "kitchen"))["runs"][0]["error"]
    assert run_command(["runs", str(tmp_path / "kitchen")]) == 0


def test_runs_says_what_a_result_lacks(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(runs / "a", tmp_path / "runs" / "a")
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    (folder / "result.json").write_text(json.dumps(result))
    (summary,) = printed(capsys, "runs", str(folder.parent))["runs"]
    assert "result.json lacks seconds; `resnetlab train --resume" in summary["error"]
    assert run_command(["runs", str(folder.parent)]) == 0


def test_runs_compare_writes_one_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    document = printed(capsys, "runs", "compare", str(runs / "a"), str(runs / "c"), "--out", str(out))
    assert document["differences"] == {"lr": ["0.1", "0.2"]} and len(document["runs"]) == 2
    page = out.read_text()
    assert page.count("<svg") == 4  # loss and error, training and held out
    assert "var(--series-1)" in page and "not finished" in page and "Held-out error by step" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for arguments, sentence in (
        ([runs / "a"], "needs from 2 to 7 run folders, not 1"),
        ([runs / "a", tmp_path], "is not a run folder"),
    ):
        assert run_command(["runs", "compare", *map(str, arguments)]) > 0
        assert sentence in capsys.readouterr().err


def test_completion_is_installed_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert run_command(["--install-completion"]) == 0
    script = (tmp_path / ".local/share/bash-completion/completions/resnetlab").read_text()
    assert "--start-from" in script and "compare" in script and "completion" in (tmp_path / ".bashrc").read_text()


def test_every_command_has_an_example() -> None:
    for group in (app, app["data"], app["detect"], app["segment"], app["runs"]):
        for name in group:
            command = group[name]
            if not name.startswith(("-", "_")) and (command.default_command or name == "runs"):
                text = command.help + (command.default_command.__doc__ or "")
                assert "Example: `resnetlab " in text, name
