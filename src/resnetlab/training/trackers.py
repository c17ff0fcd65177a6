"""Experiment trackers: adapters that send the lines of metrics.jsonl to TensorBoard, Weights & Biases, MLflow or Trackio.

A run remembers its trackers, and their own identifiers of it, in trackers.json: a resumed run continues the same run there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resnetlab.errors import RunError, UsageError, first_line, missing_package, unknown_name_error
from resnetlab.run_folder import RunFolder, writing

PROJECT = "resnetlab"  # where a tracker's own variables (WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, …) name no other


class Tracker(Protocol):
    """What an adapter does; `run_id` identifies the run at the tracker."""

    run_id: str

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Records figures, named as "train/loss", of one step."""

    def close(self) -> None:
        """Sends what is left."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it: folder, step to continue after, recipe, and the tracker's identifier of it, if known."""

    run: RunFolder
    step: int
    config: Mapping[str, Any]
    run_id: str | None

    @property
    def name(self) -> str:
        return self.run.path.resolve().name


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, tracked: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = tracked.run.path / "tensorboard"
        with writing(folder):
            self._writer = SummaryWriter(str(folder), purge_step=tracked.step + 1)
        self.run_id = tracked.name

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _LoggedRun:
    """A run of Weights & Biases, or of Trackio, which has the same functions."""

    _run: Any

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases(_LoggedRun):
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables apply."""

    def __init__(self, tracked: TrackedRun) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(
            project=project,
            name=tracked.name,
            id=tracked.run_id,
            resume="allow",
            config=dict(tracked.config),
            dir=tracked.run.path,
        )
        self.run_id = self._run.id


class MLflow:
    """A run at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, tracked: TrackedRun) -> None:
        from mlflow import MlflowClient, is_tracking_uri_set
        from mlflow.entities import Metric, Param

        uri = None
        if importlib.util.find_spec("sqlalchemy") is None:  # mlflow-skinny alone: files are its only store here
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = None if is_tracking_uri_set() else Path("mlruns").absolute().as_uri()
        self._client, self._metric = MlflowClient(uri), Metric
        if tracked.run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            self.run_id: str = self._client.create_run(experiment, run_name=tracked.name).info.run_id
            self._client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in tracked.config.items()])
        else:
            self.run_id = tracked.run_id
            self._client.update_run(self.run_id, status="RUNNING")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._client.log_batch(self.run_id, metrics=[self._metric(k, v, 0, step) for k, v in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class Trackio(_LoggedRun):
    """A run in Trackio's local database; TRACKIO_PROJECT names the project."""

    def __init__(self, tracked: TrackedRun) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run_id = tracked.run_id or tracked.name
        config = dict(tracked.config)
        self._run = trackio.init(project, name=self.run_id, config=config, resume="allow", embed=False)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def add_trackers(run: RunFolder, names: Sequence[str]) -> None:
    """Adds trackers to those that a run remembers; TensorBoard is one wherever it is installed."""
    known: dict[str, str | None] = run.read_json("trackers.json") or {}
    if new := [
        name for name in (*names, *(["tensorboard"] if is_installed("tensorboard") else [])) if name not in known
    ]:
        run.write_json("trackers.json", known | dict.fromkeys(new))


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name_error("tracker", name, TRACKERS)
        if not is_installed(name) and name == "trackio":  # its bound on Pillow is below ours, so no extra can bring it
            raise UsageError("--tracker trackio needs the package trackio, which no extra installs; add it yourself.")
        if not is_installed(name):
            raise missing_package(f"--tracker {name}", name, name)


def is_installed(name: str) -> bool:
    """Whether a tracker's package can be imported."""
    return importlib.util.find_spec(name) is not None


class Trackers:
    """All trackers of a run. One that fails is reported and left out: it must not stop the training."""

    def __init__(self, run: RunFolder, step: int, config: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self._report = report
        self._open: dict[str, Tracker] = {}
        ids: dict[str, str | None] = run.read_json("trackers.json") or {}
        for name, run_id in ids.items():
            with self._guard(name):
                self._open[name] = TRACKERS[name](TrackedRun(run, step, config, run_id))
        if self._open:
            run.write_json("trackers.json", ids | {name: tracker.run_id for name, tracker in self._open.items()})

    def write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        """Sends the figures of a line of metrics.jsonl."""
        named = {f"{kind}/{key}": value for key, value in figures.items()}
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.write(step, named)

    def close(self) -> None:
        """Closes all trackers."""
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.close()

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Leaves a tracker out that fails; what it prints goes to standard error, since results go to standard output."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except RunError:  # a full disk under the run's folder
            raise
        except Exception as error:
            self._open.pop(name, None)
            reason = first_line(error)
            self._report(f"the tracker {name} failed and is left out; metrics.jsonl has all figures: {reason}")
