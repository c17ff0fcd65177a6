"""The runs of a plan: where each lies, what has become of it, and how it is made or continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from residuum.errors import DivergedError
from residuum.models.bundle import Bundle, load_bundle
from residuum.records import Run, read_metrics
from residuum.studies.setting import Trial
from residuum.studies.version import version
from residuum.training import loop
from residuum.training.checkpoint import checkpoints
from residuum.training.recipe import Recipe
from residuum.training.result import Progress

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class Place:
    """Where a run lies: its network and seed for people, the hashes of recipe, data and code for us."""

    root: Path
    recipe: Recipe
    fingerprint: str
    code: str = field(default_factory=version)  # that of the process which planned it, should files change meanwhile

    @property
    def folder(self) -> Path:
        return self.root / f"{self._stem}-{self.code}"

    @property
    def _stem(self) -> str:
        return f"{self.recipe.net}-seed{self.recipe.seed}-{self.recipe.key}-{self.fingerprint[:8]}"

    @property
    def others(self) -> list[Path]:
        """The same run made by other versions of the code."""
        return [path for path in sorted(self.root.glob(f"{self._stem}-*")) if path != self.folder]

    @property
    def finished(self) -> bool:
        return any((self.folder / name).is_file() for name in ("result.json", DIVERGED))

    @property
    def steps_done(self) -> int:
        """Steps that its last checkpoint holds."""
        if self.finished:
            return self.recipe.steps
        saved = checkpoints(Run(self.folder))
        return int(saved[-1].stem.removeprefix("step-")) if saved else 0

    def make(self, data_dir: Path, device: str, progress: Callable[[Progress], None]) -> None:
        """Makes the run, or goes on with it where its last checkpoint stands; nothing where it is finished.

        A loss that is no longer finite is a finding too, and is kept.

        Raises ResiduumError, Stopped: as the loop does.
        """
        if self.finished:
            return
        try:
            if (self.folder / "recipe.toml").is_file():
                loop.resume(self.folder, data_dir=data_dir, device=device, workers=0, progress=progress)
            else:
                loop.start(self.recipe, self.folder, data_dir, device, progress, workers=0)
        except DivergedError as error:
            Run(self.folder).write_json(DIVERGED, {"message": str(error)})


@dataclass(frozen=True)
class Outcome:
    """A finished run, as a study reads it. Errors are fractions."""

    trial: Trial
    folder: Path

    @cached_property
    def diverged(self) -> str | None:
        """What was said where the loss was no longer finite; None where it was to the end."""
        found = Run(self.folder).read_json(DIVERGED)
        return None if found is None else str(found["message"])

    @cached_property
    def result(self) -> dict[str, Any]:
        """The figures that the run ended with; empty where it diverged."""
        return Run(self.folder).read_json("result.json") or {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware."""
        return Run(self.folder).read_json("environment.json") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(Run(self.folder))

    @cached_property
    def training_error(self) -> float | None:
        """Mean over the last tenth of the steps, on augmented batches; None where the run diverged."""
        if self.diverged:
            return None
        last = self.trial.recipe.steps
        end = [line["error"] for line in self.metrics if line["kind"] == "train" and line["step"] > 0.9 * last]
        return sum(end) / len(end) if end else None

    @property
    def test_error(self) -> float | None:
        """Of the last iterate; None where the run diverged."""
        return self.result.get("top1_error")

    def bundle(self) -> Bundle:
        """The trained network and what belongs to it."""
        return load_bundle(Run(self.folder).model)


@dataclass(frozen=True)
class Outcomes:
    """The finished runs of a plan, by what the study calls their networks; in the order of seeds."""

    all: tuple[Outcome, ...]

    def of(self, label: str) -> list[Outcome]:
        return sorted((o for o in self.all if o.trial.label == label), key=lambda o: o.trial.recipe.seed)

    def trained(self, label: str) -> list[Outcome]:
        """Those that did not diverge."""
        return [o for o in self.of(label) if not o.diverged]

    def by_seed(self, label: str, figure: str) -> dict[int, float]:
        """seed -> a figure ("training_error" or "test_error") of the runs that did not diverge."""
        found = {o.trial.recipe.seed: getattr(o, figure) for o in self.trained(label)}
        return {seed: value for seed, value in found.items() if value is not None}
