"""`predict --parts`: processes share the images, and what was stopped goes on without a gap or a duplicate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import resnetlab
from resnetlab import run_folder
from resnetlab.cli.main import run_command
from resnetlab.data import digits
from tiny_runs import TINY

COUNT = 301


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parts") / "run"
    resnetlab.train("digits", steps=3, out=out, device="cpu", progress=False, **TINY)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(digits.load_digits().train.images[:COUNT, :, :, 0].numpy()):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def predict(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, *words: object) -> int:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))
    return run_command(["predict", *map(str, words), "--device", "cpu", "--backend", "torch", "--precision", "fp32"])


def read_lines(parts: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in sorted(parts.glob("part-*.jsonl")) for line in file.read_text().splitlines()]


def test_processes_share_the_images_and_go_on_after_a_crash(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, parts = (run, images, "--parts", tmp_path / "p"), tmp_path / "p"
    write, written = run_folder.write_atomically, []

    def crash(file: Path, content: bytes) -> None:
        is_part = file.match("p/part-*")
        if is_part and len(written) == 3:
            raise RuntimeError("killed")
        write(file, content)
        if is_part:
            written.append(file)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomically", crash)
        with pytest.raises(RuntimeError, match="killed"):
            predict(patch, 1, 2, *words)
    before = {file: file.read_bytes() for file in written}
    assert len(read_lines(parts)) == 48  # three parts of 16
    (parts / "part-old.jsonl").write_text("")  # a user's own file
    for rank in range(3):  # another number of processes
        assert predict(monkeypatch, rank, 3, *words) == 0
    lines = read_lines(parts)
    names = [str(line["image"]) for line in lines]
    assert len(names) == COUNT and set(names) == {str(file) for file in images.glob("*.png")}
    assert {file: file.read_bytes() for file in written} == before
    capsys.readouterr()
    assert predict(monkeypatch, 0, 1, run, images, "--format", "jsonl") == 0
    assert capsys.readouterr().out.splitlines() == [json.dumps(line) for line in lines]  # in the same order too


def test_parts_of_other_images_or_another_request_are_refused(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i:02}.png").write_bytes((images / f"{i}.png").read_bytes())
    (tmp_path / "in" / "05.png").write_bytes(b"no image")
    words, parts = (run, tmp_path / "in", "--parts", tmp_path / "p"), tmp_path / "p"
    assert predict(monkeypatch, 0, 1, *words) == 1
    assert "1 of 20 images could not be read" in capsys.readouterr().err
    assert Counter("error" in line for line in read_lines(parts)) == {False: 19, True: 1}
    for other, message in (
        (("--top", 2), "holds predictions of another request (top 5, not 2)"),
        (("--out", tmp_path / "x.csv"), "are both for the predictions"),
        (("--format", "csv"), "parts are jsonl or parquet, not csv"),
    ):
        assert predict(monkeypatch, 0, 1, *words, *other) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in" / "19.png").unlink()
    assert predict(monkeypatch, 0, 1, *words) == 2
    assert "is of other images than these" in capsys.readouterr().err
    assert predict(monkeypatch, 0, 1, run, tmp_path / "in", "--parts", images) == 2
    assert "is not empty, and holds no predictions" in capsys.readouterr().err
    assert predict(monkeypatch, 0, 2, run, tmp_path / "in") == 2
    assert "2 processes share the images only with --parts FOLDER" in capsys.readouterr().err


def test_parquet_parts(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for rank in range(2):
        assert predict(
            monkeypatch, rank, 2, run, images, "--parts", tmp_path / "p", "--format", "parquet", "--top", 2
        ) == 0  # fmt: skip
    files = sorted((tmp_path / "p").glob("part-*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert len(rows) == 2 * COUNT and len({(row["image"], row["rank"]) for row in rows}) == 2 * COUNT


@pytest.mark.slow
def test_torchrun_processes_are_killed_and_started_again(run: Path, images: Path, tmp_path: Path) -> None:
    parts = tmp_path / "p"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "resnetlab",
    ]
    command += ["predict", str(run), str(images), "--parts", str(parts), "--device", "cpu"]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(parts.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    early = len(read_lines(parts))
    assert 0 < early <= COUNT
    assert subprocess.run(command, timeout=240, capture_output=True, check=False).returncode == 0
    names = Counter(str(line["image"]) for line in read_lines(parts))
    assert len(names) == COUNT and set(names.values()) == {1}


def code_of(system: str) -> str:
    """The example of docs/scale.md."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text()
    return page.partition(f"**{system}")[2].partition("```python\n")[2].partition("```")[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_data_as_documented(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "photos").mkdir()
    for i in range(20):
        (tmp_path / "photos" / f"{i}.png").write_bytes((images / f"{i}.png").read_bytes())
    (tmp_path / "photos" / "7.png").write_bytes(b"no image")
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(resnetlab.__file__).resolve().parents[1]))  # of the workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        code = code_of("Ray Data").replace('"photos"', repr(str(tmp_path / "photos")))
        code = code.replace('"model.safetensors"', repr(str(tmp_path / "model.safetensors")))
        exec(code.replace('"predictions")', repr(str(tmp_path / "predictions")) + ")"), {"__name__": "__main__"})
    finally:
        ray.shutdown()
    rows = [
        row for file in (tmp_path / "predictions").glob("*.parquet") for row in parquet.read_table(file).to_pylist()
    ]
    assert len(rows) == 20 and sorted(bool(row["error"]) for row in rows) == [False] * 19 + [True]
    model = resnetlab.load(tmp_path / "model.safetensors", device="cpu")
    expected = {str(tmp_path / "photos" / f"{i}.png"): i for i in range(20) if i != 7}
    for row in rows:
        if row["error"] is None:
            assert row["path"] in expected and row["class"] == model.predict(row["path"]).label


def test_dask_as_documented(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dask = pytest.importorskip("dask")
    pytest.importorskip("dask.bag")
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "images.txt").write_text("".join(f"{images / f'{i}.png'}\n" for i in range(9)) + "missing.png\n")
    monkeypatch.chdir(tmp_path)
    with dask.config.set(scheduler="threads"):
        exec(code_of("Dask"), {"__name__": "__main__"})
    lines = [
        line for file in sorted((tmp_path / "predictions").glob("*.txt")) for line in file.read_text().splitlines()
    ]
    assert len(lines) == 10 and sum("error" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # Spark's own
@pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")
def test_spark_as_documented(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyspark")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.png").write_bytes((images / f"{i}.png").read_bytes() if i else b"no image")
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    code = code_of("Spark").replace("/mnt/shared", str(tmp_path))
    (tmp_path / "program.py").write_text(code + "spark.stop()\n")
    monkeypatch.setenv("PYTHONPATH", str(Path(resnetlab.__file__).resolve().parents[1]))  # of the workers
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [
        row for file in (tmp_path / "predictions").glob("*.parquet") for row in parquet.read_table(file).to_pylist()
    ]
    assert sorted((Path(row["path"]).name, bool(row["error"])) for row in rows) == [
        (f"{i}.png", not i) for i in range(6)
    ]
    model = resnetlab.load(tmp_path / "model.safetensors", device="cpu")
    for row in rows:
        if row["error"] is None:
            assert row["class"] == model.predict(images / Path(row["path"]).name).label
