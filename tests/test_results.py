"""The page of results/, made by scripts/results_page from the files there alone, and the records that studies file there."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resnetlab.studies import degradation, report
from resnetlab.studies.degradation import Degradation
from resnetlab.studies.figures import StudyFigure
from resnetlab.studies.runs import RunOutcome
from study_settings import make_setting

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(degradation, "draw_degradation", lambda *_: StudyFigure("t", "<svg/>", "<svg/>", "c"))
    loader = SourceFileLoader("results_page", str(REPOSITORY / "scripts" / "results_page"))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


def test_the_page_in_the_repository_is_that_of_its_files(script: ModuleType) -> None:
    def without_figures(page: str) -> str:
        return re.sub("<figure.*?</figure>", "", page, flags=re.DOTALL)

    results = REPOSITORY / "results"
    committed = (results / "index.html").read_text()
    assert without_figures(committed) == without_figures(script.render(results)), "run scripts/results_page"
    for target in re.findall(r'<a href="([^"]+)"', committed):
        assert (results / target).is_file()
    result = json.loads((results / "resnet20-cifar10-7820-steps" / "result.json").read_text())
    assert f"{100 * result['top1_error']:.2f} %".replace(" ", "\u00a0") in committed


@pytest.mark.parametrize(
    ("what", "data", "figure", "printed"),
    [
        ("resnet20", "cifar10", "test error", 0.0875),
        ("resnet20", "cifar10", "training error", None),
        ("resnet20", "digits", "test error", None),
        ("preact", "cifar10", "test error", None),  # a study's label, whatever its depth
        ("F of 2", "cifar10", "test error", None),
    ],
)
def test_a_printed_error_stands_beside_a_network_of_its_name_alone(
    script: ModuleType, what: str, data: str, figure: str, printed: float | None
) -> None:
    found = script.beside_printed({"what": what, "data": data, "figure": figure})["printed"]
    assert (found and found.top1) == printed


def test_records_have_no_weights_and_nothing_of_this_machine(tmp_path: Path) -> None:
    trials = Degradation().plan(make_setting("digits", (8,), 1))
    outcomes = []
    for i, trial in enumerate(trials):
        folder = tmp_path / "made" / f"run{i}"
        folder.mkdir(parents=True)
        for name in ("recipe.toml", "metrics.jsonl", "result.json", "model.safetensors", "report.html"):
            (folder / name).write_text(f"{name} {i}")
        (folder / "environment.json").write_text('{"torch": "2", "data_dir": "/home/me", "started_in": "/home/me"}')
        outcomes.append(RunOutcome(trial, folder))
    outputs: Any = [SimpleNamespace(outcomes=outcomes), SimpleNamespace(outcomes=outcomes[:1])]
    assert report.write_records(outputs, tmp_path / "out") == 2
    kept = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    files = ("environment.json", "metrics.jsonl", "recipe.toml", "result.json")
    assert kept == [f"runs/run{i}/{name}" for i in (0, 1) for name in files]
    assert json.loads((tmp_path / "out" / "runs" / "run1" / "environment.json").read_text()) == {"torch": "2"}
    assert (tmp_path / "out" / "runs" / "run0" / "metrics.jsonl").read_text() == "metrics.jsonl 0"


def test_the_page_of_speed_is_that_of_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    table = importlib.import_module("speed_table")
    monkeypatch.setattr(table, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(table, "DRAWING", tmp_path / "speed.svg")
    record = json.loads((REPOSITORY / "results" / "speed.json").read_text())
    table.write_page(record)
    assert (tmp_path / "speed.md").read_text() == (REPOSITORY / "docs" / "speed.md").read_text(), (
        "run speed_table.py --draw"
    )
    assert set(record) <= {row.name for row in table.ROWS}
    for row in table.ROWS:
        if row.name in record:  # its pattern still reads the ratio that stands there
            ratios = [
                float(m if isinstance(m, str) else m[0])
                for m in re.findall(row.pattern, "\n".join(record[row.name]["output"]))
            ]
            assert statistics.median(ratios) / (100 if "%" in row.pattern else 1) == pytest.approx(
                record[row.name]["ratio"]
            )
