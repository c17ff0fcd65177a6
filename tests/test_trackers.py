"""Trackers: the real packages where they are installed (extras; offline), and what happens when one fails."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

import resnetlab
from resnetlab.errors import UsageError
from resnetlab.training import trackers
from resnetlab.training.train import RunOptions, resume
from runs import figures
from tiny_runs import tiny


class Recording:
    """A tracker that keeps what it gets."""

    opened: ClassVar[list[trackers.TrackedRun]] = []
    figures: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def __init__(self, tracked: trackers.TrackedRun) -> None:
        self.run_id = tracked.run_id or "id-7"
        self.opened.append(tracked)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if step > 8 and "train/loss" in figures:
            raise ConnectionError("no route to host\nsecond line")
        self.figures.append((step, dict(figures)))

    def close(self) -> None:
        pass


def test_one_tracker_is_given_as_a_word_and_progress_as_a_function() -> None:
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        resnetlab.train("digits", trackers="tensorbord", progress=False)
    with pytest.raises(UsageError, match="progress is a function, not 5"):
        resnetlab.train("digits", progress=5)  # type: ignore[arg-type]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setitem(trackers.TRACKERS, "json", Recording)  # a package that is always there
    monkeypatch.setattr(Recording, "opened", [])
    monkeypatch.setattr(Recording, "figures", [])
    return Recording


def test_a_tracker_gets_every_line_and_its_failure_stops_nothing(tmp_path: Path, recording: type[Recording]) -> None:
    said: list[str] = []
    out = tmp_path / "run"
    resnetlab.train(tiny(), out=out, device="cpu", trackers=("json",), report=said.append)
    lines = [line for line in figures(out) if line["kind"] == "train" and line["step"] <= 8]
    got = [(step, values["train/loss"]) for step, values in recording.figures if "train/loss" in values]
    assert lines and got == [(line["step"], line["loss"]) for line in lines]
    assert any("held_out/" in key for _, values in recording.figures for key in values)
    assert recording.opened[0].config["batch"] == tiny().batch and recording.opened[0].name == "run"
    reported = [sentence for sentence in said if "tracker json failed" in sentence]
    assert reported == ["the tracker json failed and is left out; metrics.jsonl has all figures: no route to host"]
    assert (out / "model.safetensors").exists()


def test_a_resumed_run_continues_the_same_run_of_its_trackers(tmp_path: Path, recording: type[Recording]) -> None:
    out = tmp_path / "run"
    resnetlab.train(tiny(), out=out, device="cpu", trackers=("json",))
    assert json.loads((out / "trackers.json").read_text())["json"] == "id-7"
    for name in ("model.safetensors", "result.json", "report.html"):
        (out / name).unlink()
    result = resume(out, RunOptions())
    (sent,) = [(step, values) for step, values in recording.figures if "test/top1_error" in values]
    assert sent[0] == tiny().steps and sent[1]["test/top1_error"] == result.to_json()["top1_error"]
    assert all(key.startswith("test/") and "error" in key for key in sent[1])
    assert [tracked.run_id for tracked in recording.opened] == [None, "id-7"]
    assert recording.opened[1].step == tiny().steps


def test_unknown_and_missing_trackers_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"unknown tracker 'wandbb'; did you mean 'wandb'"):
        resnetlab.train(tiny(), out=tmp_path / "run", trackers=("wandbb",))
    monkeypatch.setattr(trackers, "is_installed", lambda name: False)
    with pytest.raises(UsageError, match=r"^tracker mlflow needs the package mlflow; install it with: .*\[mlflow\]"):
        resnetlab.train(tiny(), out=tmp_path / "run", trackers=("mlflow",))
    assert not (tmp_path / "run").exists()


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    resnetlab.train(tiny(), out=tmp_path / "run", device="cpu", trackers=("wandb",))
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    (written,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert b"train/loss" in written.read_bytes()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    if (
        importlib.util.find_spec("sqlalchemy") is None
    ):  # as the extra installs it: the tracker itself chooses and allows files
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        monkeypatch.chdir(tmp_path)
    resnetlab.train(tiny(), out=tmp_path / "run", device="cpu", trackers=("mlflow",))
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    history = client.get_metric_history(run_id, "train/loss")
    lines = [line for line in figures(tmp_path / "run") if line["kind"] == "train"]
    assert {entry.step: entry.value for entry in history} == {line["step"]: line["loss"] for line in lines}
    run = client.get_run(run_id)
    assert run.data.params["batch"] == str(tiny().batch) and run.info.status == "FINISHED"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip("trackio", reason="the extra trackio")
    resnetlab.train(tiny(), out=tmp_path / "run", device="cpu", trackers=("trackio",))
    assert capsys.readouterr().out == ""  # it prints, and --json must stay one document
    (database,) = (tmp_path / "trackio").glob("resnetlab*.db")
    import sqlite3

    with sqlite3.connect(database) as connection:
        (count,) = connection.execute("select count(*) from metrics where run_name = 'run'").fetchone()
    assert count >= len([line for line in figures(tmp_path / "run") if line["kind"] == "train"])
