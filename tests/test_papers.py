"""docs/papers.md: every command in it parses, and its plan or recipe builds."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from images import folder, photo
from resnetlab.cli.main import app, run_command
from resnetlab.cli.study import study
from resnetlab.cli.train import complete_recipe, read_overrides
from resnetlab.evaluation.protocols import parse_protocol
from resnetlab.evaluation.published import PRINTED
from resnetlab.models.spec import get_specification, parse_value
from resnetlab.studies import catalogue, code_version, workers
from resnetlab.studies.imagenet import ImageNet
from resnetlab.studies.paper import NO_FIGURE
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import Study, run_studies
from study_settings import make_setting


def adapt(study: Study, setting: Setting) -> Setting:
    """The study's own setting, with the same stand-in for the data."""
    own = study.adapt(setting)
    own.__dict__["source"] = setting.source
    return own


PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
COMMANDS = sorted(set(re.findall(r"`(resnetlab [^`]+)`", PAGE.read_text())))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_parses_and_its_plan_builds(command: str) -> None:
    parsed, bound, _ = app.parse_args(shlex.split(command)[1:], print_error=False, exit_on_error=False)
    given = bound.arguments
    if parsed is study:
        depths = tuple(parse_value("--depths", given.get("depths", ""), "tuple[int, ...]"))
        setting = make_setting(given.get("data", "digits").lower(), depths)
        (chosen,) = catalogue.select_studies(given["name"])
        setting = adapt(chosen, setting)
        assert chosen.plan(setting) or given["name"] == "cost"
    elif parsed.__name__ in ("train", "detect_train"):
        options = given["options"]
        task = "classify" if parsed.__name__ == "train" else "detect"
        recipe = complete_recipe(task, options, read_overrides(given["data"], options, {}))
        get_specification(recipe.net, **recipe.specification)
    elif "protocol" in given:
        parse_protocol(given["protocol"])


@pytest.mark.slow
def test_the_imagenet_plan_runs_at_its_smallest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2015 Tables 2 to 5: training by the paper's recipe on ImageNet's layout, 10 crops, several scales, an ensemble."""
    for i, synset in enumerate(("n01440764", "n01443537")):
        (tmp_path / "train" / synset).mkdir(parents=True)
        for k in range(8):
            photo(10 * i + k).save(tmp_path / "train" / synset / f"{synset}_{k}.JPEG")
    (tmp_path / "val").mkdir()
    for i in range(4):
        photo(100 + i).save(tmp_path / "val" / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    synsets = [f"ILSVRC2012_val_{i + 1:08d}.JPEG {('n01440764', 'n01443537')[i % 2]}\n" for i in range(4)]
    (tmp_path / "val.txt").write_text("".join(synsets))
    small = ["image_size=32", "eval_resize=36", "batch=4", "bn_batch=2", "val_images=4", "precise_bn=1", "scale=36,40",
             "widths=8,8,16,16", "depths=1,1,1,1", "eval_every=1"]  # fmt: skip
    models = []
    for net, shortcut in (("plain34", "none"), ("resnet34", "A"), ("resnet34", "C"), ("resnet50", "B")):
        models.append(str(tmp_path / f"{net}-{shortcut}"))
        values = [part for value in [*small, f"shortcut={shortcut}"] for part in ("--set", value)]
        command = ["train", str(tmp_path), "--net", net, "--recipe", "paper-imagenet", "--steps", "2", *values]
        assert run_command([*command, "--device", "cpu", "--out", models[-1]]) == 0, capsys.readouterr().err
    for protocol in ("10crop", "multiscale:32,36,40", "dense:36"):
        arguments = ["evaluate", *models, "--data", str(tmp_path), "--protocol", protocol, "--json", "--device", "cpu"]
        capsys.readouterr()
        assert run_command([*arguments, "--out", str(tmp_path / "out")]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["n"] == 4 and len(document["members"]) == 4 and document["protocol"].startswith(protocol[:5])


@pytest.mark.slow
def test_the_study_of_imagenet_runs_at_its_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network, narrow and shallow, by every protocol, with the ensemble; no printed figure is of so little."""
    data = folder(tmp_path / "d", {"train": 10, "val": 2}, ("n01440764", "n01443537"))
    thin = {"widths": (4, 4, 4, 4), "depths": (1, 1, 1, 1)}
    networks = tuple(replace(v, values=dict(v.values) | thin) for v in ImageNet.networks)
    monkeypatch.setattr(ImageNet, "networks", networks)
    monkeypatch.setattr(code_version, "measure_fingerprint", lambda device: "tiny weights")
    monkeypatch.setattr(workers, "make_runs", lambda runs, data_dir, *_: [r.make(data_dir, "cpu", print) for r in runs])
    here = Setting(str(data), tmp_path, "smoke", 1, steps=1, device="cpu")
    ((result, setting),) = [(o.result, o.setting) for o in run_studies([ImageNet()], here, root=tmp_path / "runs")]
    assert (setting.base.batch, setting.base.image_size, setting.base.crop) == (8, 66, "scale")
    rows = {(row.what, row.figure): row for row in result.rows}
    assert (
        len(rows) == 9 + 3 + 5 + 1 + 1 + 9
    )  # 10 crops, 1 crop, several scales and their ensemble, dense, training errors
    assert all(row.paper is None or row.paper.source == NO_FIGURE for row in rows.values())
    assert f"Of {len(ImageNet.better)} orders" in result.answer and "after 1 step (" in result.answer


def test_the_page_names_every_study_and_the_recipes_of_printed_imagenet_errors() -> None:
    text = " ".join(COMMANDS)
    assert [name for name in catalogue.STUDIES if f"resnetlab study {name} " not in f"{text} "] == []
    assert {e.recipe for e in PRINTED if e.data == "imagenet"} <= set(re.findall(r"--recipe (\S+)", text))
