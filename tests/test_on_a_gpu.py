"""benchmarks/on_a_gpu: its plan, what it does where a section fails, and its sections in a tiny size on the CPU."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# which start processes of their own, compile, or are much like another
SLOW = ("graph", "resume", "order", "waits", "small compiled", "small exact off", "large graph", "service", "studies")
QUICK = ("small eager", "memory", "photos", "predict")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = SourceFileLoader("on_a_gpu", str(BENCHMARKS / "on_a_gpu"))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    return module


def test_the_plan_of_the_quarter_of_an_hour_adds_up(script: ModuleType) -> None:
    assert sum(section.seconds for section in script.SECTIONS.values()) <= 14 * 60
    assert set(SLOW) | set(QUICK) <= script.SECTIONS.keys() and set(script.FORMS) == {
        *("eager", "graph", "compiled", "exact off")
    }
    lines = list(script.plan())
    assert lines[0] == " 0:00  graph, up to 30 s" and lines[1].startswith(" 0:30  resume")


def test_sections_that_fail_or_hang_cost_no_other(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "HERE", tmp_path)
    (tmp_path / "on_a_gpu").write_text(
        "import sys, time\nname = sys.argv[2]\nprint(f'first line of {name} | more', flush=True)\n"
        "print('warning', file=sys.stderr)\n"
        "if name == 'resume': raise ValueError('the GPU is gone')\nif name == 'order': time.sleep(600)\nprint('second')\n"
    )
    monkeypatch.setattr(script, "describe_here", lambda: "a machine")
    monkeypatch.setattr(script, "LEAST", 1)
    monkeypatch.setitem(script.SECTIONS, "order", script.SECTIONS["order"]._replace(seconds=2))
    monkeypatch.setitem(script.SECTIONS, "memory", script.SECTIONS["memory"]._replace(seconds=0))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["on_a_gpu", str(out), "--only", "graph", "resume", "order", "waits", "memory"])
    assert script.main() == 1
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and table.startswith("a machine\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert [row[0] for row in rows if row[0]] == ["graph", "resume", "order", "waits", "memory"]
    outcomes = {row[0]: row[1:] for row in rows if row[0]}
    assert outcomes["graph"][0].startswith("ok") and outcomes["graph"][1] == "first line of graph / more"
    assert outcomes["resume"][0] == "FAILED (1): ValueError: the GPU is gone" and "resume" in outcomes["resume"][1]
    assert outcomes["order"] == ["CUT after 2 s", "first line of order / more"]
    assert outcomes["memory"][0] == "not begun: no time left" and outcomes["waits"][0].startswith("ok")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_section_runs_in_a_tiny_size_on_the_cpu(
    name: str, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.SECTIONS[name].run(script.DRY)
    printed = capsys.readouterr().out
    expected = {
        "graph": "0 of 121 tensors differ",
        "memory": "0 of 4 steps replayed",
        "photos": "0.0 grey levels apart at most",
        "predict": "2 images: ",
        "resume": "two runs of 8 steps: the same file",
        "order": "segment: ",
        "waits": "disk, 2 steps: no wait",
        "service": "16 clients: ",
        "studies": "4 processes: ",
    }
    assert expected.get(name, " images/s") in printed
