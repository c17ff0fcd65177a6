"""The runs of a plan: the folder of each, how it is started or resumed, and its result.

A folder is named by network and seed, for people, and by the hashes of recipe, data and source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from resnetlab.errors import DivergedError, ResNetLabError
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.run_folder import RunFolder, get_step, list_checkpoints, read_metrics
from resnetlab.studies.code_version import CodeVersions, source_hash
from resnetlab.studies.setting import Trial
from resnetlab.training.recipe import DECIDED, Recipe
from resnetlab.training.result import Progress
from resnetlab.training.run_options import RunOptions
from resnetlab.training.train import resume, start_run

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class StudyRun:
    """A planned run.

    Attributes:
        others: folders of the same run, made by code that produces other weights.
    """

    recipe: Recipe
    folder: Path
    others: tuple[Path, ...] = ()

    @staticmethod
    def locate(root: Path, recipe: Recipe, fingerprint: str, versions: CodeVersions) -> StudyRun:
        """The run of a recipe on data with a fingerprint, in the folder of an equal version of the code where there is one."""
        name, data = f"{recipe.net}-seed{recipe.seed}", fingerprint[:8]
        own = root / f"{name}-{recipe.key}-{data}-{source_hash()}"
        equal = [own] if own.exists() else []
        others: list[Path] = []
        for folder in sorted(root.glob(f"{name}-*-{data}-*")):
            if folder != own and is_run_of(folder, recipe):
                counts = versions.accepts(folder.name.rpartition("-")[2], StudyRun(recipe, folder).finished)
                (equal if counts else others).append(folder)
        runs = [StudyRun(recipe, folder, tuple(others)) for folder in [*equal, own]]
        return next((run for run in runs if run.finished), runs[0])

    @property
    def finished(self) -> bool:
        return any((self.folder / name).is_file() for name in ("result.json", DIVERGED))

    @property
    def steps_done(self) -> int:
        """The step of its last checkpoint."""
        if self.finished:
            return self.recipe.steps
        saved = list_checkpoints(RunFolder(self.folder))
        return get_step(saved[-1]) if saved else 0

    def make(self, data_dir: Path, device: str, on_progress: Callable[[Progress], None]) -> None:
        """Makes the run, or resumes it from its last checkpoint; does nothing where it is finished.

        A loss that is no longer finite is a result too, and is recorded.

        Raises ResNetLabError, StopSignal: as training does.
        """
        if self.finished:
            return
        try:
            options = RunOptions(data_dir=data_dir, device=device, workers=0, on_progress=on_progress)
            if (self.folder / "recipe.toml").is_file():
                resume(self.folder, options)
            else:
                start_run(self.recipe, self.folder, options)
        except DivergedError as error:
            RunFolder(self.folder).write_json(DIVERGED, {"message": str(error)})


def is_run_of(folder: Path, recipe: Recipe) -> bool:
    """Whether a folder has a run of a recipe, whatever version of the code wrote it; "auto" agrees with every value."""
    try:
        recorded = Recipe.from_values(RunFolder(folder).read_recipe())
    except ResNetLabError:
        return False
    resolved = {key: getattr(recorded, key) for key in DECIDED if getattr(recipe, key) == "auto"}
    return replace(recipe, **resolved).key == recorded.key


@dataclass(frozen=True)
class RunOutcome:
    """A finished run, as a study reads it. Errors are fractions."""

    trial: Trial
    folder: Path

    @property
    def seed(self) -> int:
        return self.trial.recipe.seed

    @cached_property
    def diverged(self) -> str | None:
        """The message of a run whose loss was no longer finite; None for the others."""
        document = RunFolder(self.folder).read_json(DIVERGED)
        return None if document is None else str(document["message"])

    @cached_property
    def result(self) -> dict[str, Any]:
        """The figures that the run ended with; empty where it diverged."""
        return RunFolder(self.folder).read_json("result.json") or {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware."""
        return RunFolder(self.folder).read_json("environment.json") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(RunFolder(self.folder))

    @cached_property
    def training_error(self) -> float | None:
        """Mean over the last tenth of the steps, on augmented batches; None where the run diverged."""
        return None if self.diverged else self.mean_over_steps("error", 0.9, 1.0)

    @cached_property
    def training_loss(self) -> float | None:
        """Likewise, in nats."""
        return None if self.diverged else self.mean_over_steps("loss", 0.9, 1.0)

    def mean_over_steps(self, key: str, start: float, end: float) -> float | None:
        """Mean of "error" or "loss" over a part of the steps, given as shares of them; None where nothing was recorded."""
        low, high = start * self.trial.recipe.steps, end * self.trial.recipe.steps
        values = [line[key] for line in self.metrics if line["kind"] == "train" and low < line["step"] <= high]
        return sum(values) / len(values) if values else None

    @property
    def test_error(self) -> float | None:
        """Of the last iterate; None where the run diverged."""
        return self.result.get("top1_error")

    @cached_property
    def never_warm(self) -> bool:
        """Whether it was trained at the warm-up's rate to the end, since its training error stayed too large."""
        recipe, rates = self.trial.recipe, {line.get("lr") for line in self.metrics if line["kind"] == "train"}
        return recipe.warmup == "train-error" and rates == {recipe.warmup_lr}

    def load_model(self) -> TrainedModel:
        """The trained network and what belongs to it."""
        return load_trained_model(RunFolder(self.folder).model)


@dataclass(frozen=True)
class RunOutcomes:
    """The finished runs of a plan, by the study's labels of their networks; in the order of seeds."""

    all: tuple[RunOutcome, ...]

    def of(self, label: str) -> list[RunOutcome]:
        return sorted((o for o in self.all if o.trial.label == label), key=lambda o: o.seed)

    def trained(self, label: str) -> list[RunOutcome]:
        """Those that did not diverge."""
        return [o for o in self.of(label) if not o.diverged]

    def by_seed(self, label: str, figure: str) -> dict[int, float]:
        """seed -> a figure ("training_error", "training_loss" or "test_error") of the runs that did not diverge."""
        figures = {o.seed: getattr(o, figure) for o in self.trained(label)}
        return {seed: value for seed, value in figures.items() if value is not None}
