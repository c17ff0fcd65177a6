"""Engines that were built are taken by the next start, and by nothing that they were not built for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from residuum.models.bundle import Bundle
from residuum.models.resnet import build
from residuum.models.samples import Samples
from residuum.preprocessing import Preprocessing
from residuum.use import engines, kept
from residuum.use.engines import Kind, choose

CHECK = torch.randint(256, (8, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def bundle(seed: int = 0) -> Bundle:
    net = build("resnet8", classes=3, channels=1, seed=seed).eval()
    prepared = Preprocessing(1, (8, 8), 8, torch.zeros(1), torch.ones(1))
    return Bundle(net, tuple("abc"), prepared, samples=Samples(CHECK, torch.zeros(8, dtype=torch.long), CHECK[:0]))


@pytest.fixture
def makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that were made, of an engine that is quick to make and to start."""
    made: list[str] = []

    def make(graphs: Any, precision: str) -> bytes:
        made.append(precision)
        return b"engine of " + precision.encode()

    def start(content: bytes, graphs: Any, precision: str) -> Any:
        if content != b"engine of " + precision.encode():
            raise RuntimeError("an engine's own words")
        return engines.ENGINES_BEFORE["torch"].start(b"", graphs, "fp32")  # type: ignore[attr-defined]

    monkeypatch.setattr(engines, "ENGINES_BEFORE", engines.ENGINES, raising=False)
    monkeypatch.setattr(engines, "ENGINES", {"quick": Kind((), ("fp32", "int8"), make, start)})
    monkeypatch.setattr(engines, "NAMES", ("auto", "quick"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/residuum/engines").iterdir())


def test_a_second_start_builds_nothing(makes: list[str], tmp_path: Path) -> None:
    first, second = choose(bundle(), keep=True), choose(bundle(), keep=True)
    assert makes == ["fp32"] and second.why == f"{first.why}; built by an earlier start"
    assert torch.equal(first.answer(CHECK), second.answer(CHECK))
    assert (tmp_path / "cache/residuum/engines").stat().st_mode & 0o777 == 0o700


def test_what_it_follows_from_is_what_it_is_found_by(makes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose(bundle(), keep=True)
    choose(bundle(), keep=False)  # as benchmarks do
    choose(bundle(1), keep=True)  # other weights
    choose(replace(bundle(), temperature=2.0), keep=True)
    choose(bundle(), "quick", "fp32", keep=True)  # another request
    choose(bundle(), keep=True, check=CHECK[:4])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    choose(bundle(), keep=True)
    torch.set_num_threads(threads)
    monkeypatch.setattr(kept, "BUILDERS", ("numpy",))  # another version of something
    choose(bundle(), keep=True)
    assert makes == ["fp32"] * 8


def test_what_is_damaged_or_does_not_start_is_built_anew(
    makes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(bundle(), keep=True)
    choice, engine = files(tmp_path)
    whole = engine.read_bytes()
    for file, content in ((engine, whole[:-1]), (engine, b""), (choice, b"x" * 40), (engine, whole[:-1] + b"!")):
        file.write_bytes(content)
        assert "earlier start" not in choose(bundle(), keep=True).why
        assert "earlier start" in choose(bundle(), keep=True).why
    kept.Kept(engine.parent, engine.name.removesuffix("-engine")).put("engine", b"of another version")
    assert "earlier start" not in choose(bundle(), keep=True).why
    assert len(makes) == 6 and engine.read_bytes() == whole


def test_where_nothing_can_be_written_nothing_is_kept(makes: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert choose(bundle(), keep=True).name == choose(bundle(), keep=True).name == "quick"
    assert makes == ["fp32"] * 2


def test_the_place_is_limited_and_cleaned(makes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = kept.Kept(tmp_path, "key")
    monkeypatch.setattr(kept, "MOST", 350)
    for i, name in enumerate("abc"):
        place.put(name, bytes(84))  # with its digest a hundred bytes
        os.utime(tmp_path / f"key-{name}", (1000 + i, 1000 + i))
    assert place.get("a") == bytes(84)  # used now
    (tmp_path / ".key-x.1.tmp").write_bytes(b"left by kill -9, long ago")
    os.utime(tmp_path / ".key-x.1.tmp", (1, 1))
    (tmp_path / ".key-y.1.tmp").write_bytes(b"")
    os.utime(tmp_path / ".key-y.1.tmp", (time.time() - 60,) * 2)
    place.put("d", bytes(84))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key-y.1.tmp", "key-a", "key-c", "key-d"]
    assert place.get("b") is None


@pytest.mark.slow
def test_processes_at_once_and_kill_9_leave_whole_engines(tmp_path: Path) -> None:
    """Three commands keep the same engine at once; others are killed at ever later moments; the next start is right."""
    model, pictures = tmp_path / "model.safetensors", tmp_path / "pictures"
    bundle().save(model)
    pictures.mkdir()
    for i in range(65):  # an engine is looked for where there are more than 64
        Image.new("L", (8, 8), 3 * i).save(pictures / f"{i}.png")

    def command(cache: Path) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-m",
            "residuum",
            "predict",
            str(model),
            str(pictures),
            "--engine=onnxruntime",
            "--json",
        ]
        env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def answer(process: subprocess.Popen[str]) -> tuple[Any, bool]:
        out, told = process.communicate()
        assert process.returncode == 0, told
        return json.loads(out)["predictions"], "built by an earlier start" in told + out

    began = time.monotonic()
    expected, _ = answer(command(tmp_path / "alone"))
    took = time.monotonic() - began
    for one, _ in [answer(p) for p in [command(tmp_path / "shared") for _ in range(3)]]:
        assert one == expected
    for k in range(1, 9):  # the last of them dies after it has answered
        victim = command(tmp_path / "killed")
        time.sleep(took * k / 8)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    for cache in ("shared", "killed"):
        answer(command(tmp_path / cache))
        assert answer(command(tmp_path / cache)) == (expected, True)
