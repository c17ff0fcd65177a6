"""Built backends are loaded by the next start, and only for what they were built for."""

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

from resnetlab.inference import backend_cache, backends
from resnetlab.inference.backends import BackendRequest, LoadedBackend
from resnetlab.inference.export_graphs import ExportGraphs
from resnetlab.inference.formats import Backend, ExportFormat
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing

CHECK = torch.randint(256, (8, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_model(seed: int = 0) -> TrainedModel:
    net = build("resnet8", classes=3, channels=1, seed=seed).eval()
    preprocessing = Preprocessing(1, (8, 8), 8, torch.zeros(1), torch.ones(1))
    return TrainedModel(
        net,
        tuple("abc"),
        preprocessing,
        reference_images=ReferenceImages(CHECK, torch.zeros(8, dtype=torch.long), CHECK[:0]),
    )


def select_backend(
    model: TrainedModel, backend: str = "auto", precision: str = "auto", **options: Any
) -> LoadedBackend:
    return backends.select_backend(model, BackendRequest(backend=backend, precision=precision, **options))


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the precisions that a fake backend builds."""
    builds: list[str] = []

    def build_program(graphs: Any, precision: str) -> bytes:
        builds.append(precision)
        return b"program of " + precision.encode()

    def start(content: bytes, graphs: ExportGraphs, precision: str) -> Any:
        if content != b"program of " + precision.encode():
            raise RuntimeError("a runtime's own message")
        return torch_backend.start(b"", graphs, "fp32")

    torch_backend, _ = backends.BACKENDS["torch"]
    backend = Backend(name="quick", precisions=("fp32", "int8"), build=build_program, start=start)
    format = ExportFormat(suffixes=(), write=lambda *_: None, read=None, backend=backend)
    monkeypatch.setattr(backends, "BACKENDS", {"quick": (backend, format)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return builds


def cached_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/resnetlab/backends").iterdir())


def test_a_second_start_builds_nothing(builds: list[str], tmp_path: Path) -> None:
    first, second = select_backend(make_model(), use_cache=True), select_backend(make_model(), use_cache=True)
    assert builds == ["fp32"] and second.reason == f"{first.reason}; loaded from the cache"
    assert torch.equal(first.predict(CHECK), second.predict(CHECK))
    assert (tmp_path / "cache/resnetlab/backends").stat().st_mode & 0o777 == 0o700


def test_the_key_depends_on_everything_that_is_built_from(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    select_backend(make_model(), use_cache=True)
    select_backend(make_model(), use_cache=False)  # as in benchmarks
    select_backend(make_model(1), use_cache=True)  # other weights
    select_backend(replace(make_model(), temperature=2.0), use_cache=True)
    select_backend(make_model(), "quick", "fp32", use_cache=True)  # another request
    select_backend(make_model(), use_cache=True, check_images=CHECK[:4])
    features = select_backend(make_model(), use_cache=True, output="features")  # not the scores'
    assert features.predict(CHECK).shape == (8, 64) and "features agree" in features.reason
    again = select_backend(make_model(), use_cache=True, output="features")
    assert "from the cache" in again.reason and torch.equal(again.predict(CHECK), features.predict(CHECK))
    assert select_backend(make_model(), use_cache=True).predict(CHECK).shape == (8, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    select_backend(make_model(), use_cache=True)
    torch.set_num_threads(threads)
    monkeypatch.setattr(backend_cache, "PACKAGES", ("numpy",))  # another version of something
    select_backend(make_model(), use_cache=True)
    assert builds == ["fp32"] * 9


def test_damaged_entries_are_built_again(builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select_backend(make_model(), use_cache=True)
    choice, program = cached_files(tmp_path)
    content = program.read_bytes()
    damages = ((program, content[:-1]), (program, b""), (choice, b"x" * 40), (program, content[:-1] + b"!"))
    for file, damaged in damages:
        file.write_bytes(damaged)
        assert "from the cache" not in select_backend(make_model(), use_cache=True).reason
        assert "from the cache" in select_backend(make_model(), use_cache=True).reason
    backend_cache.BackendCache(program.parent, program.name.removesuffix("-program")).put(
        "program", b"of another version"
    )
    assert "from the cache" not in select_backend(make_model(), use_cache=True).reason
    assert len(builds) == 6 and program.read_bytes() == content


def test_without_a_writable_folder_nothing_is_cached(builds: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert (
        select_backend(make_model(), use_cache=True).name
        == select_backend(make_model(), use_cache=True).name
        == "quick"
    )
    assert builds == ["fp32"] * 2


def test_the_cache_is_limited_and_cleaned(builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = backend_cache.BackendCache(tmp_path, "key")
    monkeypatch.setattr(backend_cache, "MAX_BYTES", 350)
    for i, name in enumerate("abc"):
        cache.put(name, bytes(84))  # with its digest a hundred bytes
        os.utime(tmp_path / f"key-{name}", (1000 + i, 1000 + i))
    assert cache.get("a") == bytes(84)  # marks it as used
    (tmp_path / ".key-x.1.tmp").write_bytes(b"left by kill -9, long ago")
    os.utime(tmp_path / ".key-x.1.tmp", (1, 1))
    (tmp_path / ".key-y.1.tmp").write_bytes(b"")
    os.utime(tmp_path / ".key-y.1.tmp", (time.time() - 60,) * 2)
    cache.put("d", bytes(84))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key-y.1.tmp", "key-a", "key-c", "key-d"]
    assert cache.get("b") is None


def from_cache(model: TrainedModel) -> bool:
    return "from the cache" in select_backend(model, use_cache=True).reason


def test_entries_that_others_may_have_written_are_not_used(builds: list[str], tmp_path: Path) -> None:
    select_backend(make_model(), use_cache=True)
    choice, program = cached_files(tmp_path)
    for path, mode in ((program, 0o666), (program.parent, 0o777)):
        before = path.stat().st_mode & 0o777
        path.chmod(mode)
        assert not from_cache(make_model())
        path.chmod(before)
        assert from_cache(make_model())
    program.parent.chmod(0o777)
    select_backend(make_model(1), use_cache=True)
    assert cached_files(tmp_path) == [choice, program]  # nor is anything written there
    program.parent.chmod(0o700)
    content = program.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    program.unlink()
    program.symlink_to(tmp_path / "elsewhere")
    assert not from_cache(make_model())
    if os.geteuid() == 0:
        assert from_cache(make_model())
        os.chown(choice, 1, 1)
        assert not from_cache(make_model())


def test_an_entry_of_another_model_is_not_used(builds: list[str], tmp_path: Path) -> None:
    select_backend(make_model(), use_cache=True)
    before = set(cached_files(tmp_path))
    select_backend(make_model(1), use_cache=True)
    for file in before:  # the other model's files under this one's names
        kind = file.name.rpartition("-")[2]
        other = next(f for f in set(cached_files(tmp_path)) - before if f.name.endswith(kind))
        file.write_bytes(other.read_bytes())
    assert not from_cache(make_model())


def test_a_loaded_program_is_compared_with_torch(builds: list[str], tmp_path: Path) -> None:
    select_backend(make_model(), use_cache=True)
    _, program = cached_files(tmp_path)
    cache = backend_cache.BackendCache(program.parent, program.name.removesuffix("-program"))
    for choice in (b"{", b"[]", b'["none", "fp32", "x"]', b'["quick", "fp64", "x"]', b"null", b"\xff"):
        cache.put("choice", choice)  # whoever can write as this user knows the digest
        assert not from_cache(make_model()) and from_cache(make_model())
    quick, format = backends.BACKENDS["quick"]
    wrong = replace(quick, start=lambda *_: lambda pixels: torch.full((len(pixels), 3), 1 / 3))
    reasons = []
    for backend in (quick, quick, wrong):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(backends.BACKENDS, "quick", (backend, format))  # type: ignore[misc]
            reasons.append(select_backend(make_model(), "quick", "fp32", use_cache=True).reason)
    assert ["from the cache" in reason for reason in reasons] == [False, True, False]


@pytest.mark.slow
def test_concurrent_and_killed_processes_leave_complete_entries(tmp_path: Path) -> None:
    """Three commands write the same entry at once; others are killed at ever later times; the next start is correct."""
    model, images = tmp_path / "model.safetensors", tmp_path / "images"
    make_model().save(model)
    images.mkdir()
    for i in range(65):  # a backend is selected for more than 64 images
        Image.new("L", (8, 8), 3 * i).save(images / f"{i}.png")

    def command(cache: Path) -> subprocess.Popen[str]:
        line = [
            sys.executable,
            "-m",
            "resnetlab",
            "predict",
            str(model),
            str(images),
            "--backend=onnxruntime",
            "--json",
        ]
        env = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(process: subprocess.Popen[str]) -> tuple[Any, bool]:
        out, err = process.communicate()
        assert process.returncode == 0, err
        return json.loads(out)["predictions"], "loaded from the cache" in err + out

    start = time.monotonic()
    expected, _ = finish(command(tmp_path / "single"))
    duration = time.monotonic() - start
    for predictions, _ in [finish(p) for p in [command(tmp_path / "shared") for _ in range(3)]]:
        assert predictions == expected
    for k in range(1, 9):  # the last one is killed after its output
        victim = command(tmp_path / "killed")
        time.sleep(duration * k / 8)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    for cache in ("shared", "killed"):
        finish(command(tmp_path / cache))
        assert finish(command(tmp_path / cache)) == (expected, True)
