"""A study: a plan of runs and a way to read them. Plan -> runs -> rows."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from resnetlab.device import standard_torch_state
from resnetlab.distributed import leave_if_imported_again
from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_estimate, format_share
from resnetlab.studies import verdicts, workers
from resnetlab.studies.code_version import CodeVersions, source_hash
from resnetlab.studies.cost_estimate import START_UP, CostEstimate
from resnetlab.studies.figures import StudyFigure
from resnetlab.studies.runs import RunOutcome, RunOutcomes, StudyRun
from resnetlab.studies.setting import Setting, Trial

RUNS = Path("runs/studies")
DAY = 86_400  # seconds


@dataclass(frozen=True)
class PaperFigure:
    """The paper's number (errors are fractions; None where it has words instead), and its table or those words."""

    value: float | None
    source: str


@dataclass(frozen=True)
class Row:
    """One figure of one network.

    Attributes:
        what: the network, by the study's label.
        figure: what was measured, such as "test error".
        values: one for each seed (or a single one that needs no seed); errors are fractions.
        verdict: in words, by the study's rule.
        budget: the length of the runs as a share of the paper's; None where nothing was trained.
        unit: "error" (a fraction), "count" or "number".
        diverged: number of runs without a figure, because their loss was no longer finite.
        compared: what it was compared with (a network or protocol, by its label), and by how much it is larger.
        from_paper: by how much it is larger than the paper's number; None where they are not compared.
    """

    what: str
    figure: str
    values: tuple[float, ...]
    verdict: str
    paper: PaperFigure | None = None
    budget: float | None = None
    unit: str = "error"
    diverged: int = 0
    compared: tuple[str, verdicts.Difference] | None = None
    from_paper: verdicts.Difference | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        mean, sd = verdicts.mean_sd(list(self.values)) if self.values else (None, None)
        return {
            "what": self.what,
            "figure": self.figure,
            "unit": self.unit,
            "mean": mean,
            "sd": sd,
            "n": len(self.values),
            "values": list(self.values),
            "diverged": self.diverged,
            "paper": self.paper and self.paper.value,
            "paper_source": self.paper and self.paper.source,
            "budget": self.budget,
            "verdict": self.verdict,
            "compared_with": self.compared and self.compared[0],
            **_difference_to_json("difference", self.compared and self.compared[1]),
            **_difference_to_json("from_paper", self.from_paper),
        }


def _difference_to_json(key: str, difference: verdicts.Difference | None) -> dict[str, Any]:
    low, high = (difference and difference.interval) or (None, None)
    mean = difference.mean if difference and difference.n else None
    return {key: mean, f"{key}_low": low, f"{key}_high": high, f"{key}_n": difference and difference.n}


@dataclass(frozen=True)
class StudyResult:
    """What the runs of a study show: the answer in one sentence, details, the rule behind it, rows, figures, remarks."""

    answer: str
    rows: Sequence[Row]
    figures: Sequence[StudyFigure] = ()
    details: str = ""
    rule: str = verdicts.RULE
    remarks: Sequence[str] = ()


class Study(ABC):
    """An experiment of the papers.

    Attributes:
        name: the name on the command line.
        question: what it answers.
        place: where the papers have it.
        on_imagenet: it trains the networks of 224 pixels, on a folder only, and is left out of "all".
    """

    name: ClassVar[str]
    question: ClassVar[str]
    place: ClassVar[str]
    on_imagenet: ClassVar[bool] = False

    def adapt(self, setting: Setting) -> Setting:
        """The setting that this study uses where `setting` was requested."""
        return setting

    @abstractmethod
    def plan(self, setting: Setting) -> list[Trial]:
        """The runs that the study needs."""

    def count_views(self, setting: Setting, label: str) -> float:
        """How many images of the network's size `read` evaluates for each test image, by the models of a label."""
        return 0

    @abstractmethod
    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """What the finished runs show; `on_progress(done, total)` is called during slow measurements."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called while studies are carried out.

    Attributes:
        report: gets sentences.
        on_runs: gets the share of the plan's work that is done, 1 as its total, and a text beside it.
        on_reading: gets (done, total) of a study's measurements.
    """

    report: Callable[[str], None] = lambda _: None
    on_runs: Callable[[float, int, str], None] = lambda done, total, text: None
    on_reading: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class StudyOutput:
    """A study that was carried out."""

    study: Study
    setting: Setting
    result: StudyResult
    outcomes: Sequence[RunOutcome] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, each with the study's name and data."""
        return [{"study": self.study.name, "data": self.setting.data} | row.to_json() for row in self.result.rows]


def locate_runs(trials: Sequence[Trial], setting: Setting, root: Path) -> list[StudyRun]:
    """The runs of a plan with their folders; raises UsageError for a network that cannot be built."""
    for trial in trials:
        setting.spec(trial.recipe)
    if not trials:
        return []
    versions = CodeVersions(root, setting.device, any_version=setting.any_version)
    return [StudyRun.locate(root, trial.recipe, setting.source.fingerprint, versions) for trial in trials]


@standard_torch_state()
def run_studies(
    studies: Sequence[Study],
    setting: Setting,
    *,
    root: Path = RUNS,
    yes: bool = False,
    callbacks: Callbacks | None = None,
) -> list[StudyOutput]:
    """Makes all runs that the studies need and that are missing, then reads them.

    Raises:
        UsageError: more than a day of work without `yes`.
        StopSignal, ResNetLabError: as training does; finished work is kept.
    """
    leave_if_imported_again()
    callbacks = callbacks or Callbacks()
    settings = {study.name: study.adapt(setting) for study in studies}
    plans = {study.name: study.plan(settings[study.name]) for study in studies}
    runs = {name: locate_runs(trials, settings[name], root) for name, trials in plans.items()}
    planned = list({run.folder: run for each in runs.values() for run in each}.values())
    if missing := find_missing(planned, callbacks.report):
        devices = workers.worker_devices(setting.device, len(missing), max(run.recipe.image_size for run in missing))
        estimate = CostEstimate(setting)
        estimate.reading = sum(estimate_reading(s, plans[s.name], settings[s.name], estimate) for s in studies)
        check_cost(planned, missing, estimate, len(devices), yes, callbacks.report)
        CodeVersions(root, setting.device).record()
        progress = PlanProgress(missing, estimate, len(devices), callbacks.on_runs)
        workers.make_runs(progress.runs, setting.data_dir, devices, progress.update)
    outputs = []
    for study in studies:
        pairs = zip(plans[study.name], runs[study.name], strict=True)
        outcomes = tuple(RunOutcome(trial, run.folder) for trial, run in pairs)
        callbacks.report(f"reading {study.name}")
        result = study.read(settings[study.name], RunOutcomes(outcomes), callbacks.on_reading)
        remarks = [*result.remarks, *describe_endless_warmups(outcomes), *describe_other_versions(outcomes)]
        result = replace(result, rows=count_diverged(result.rows, outcomes), remarks=remarks)
        outputs.append(StudyOutput(study, settings[study.name], result, outcomes))
    return outputs


def count_diverged(rows: Sequence[Row], outcomes: Sequence[RunOutcome]) -> list[Row]:
    """The rows, those of trained networks with the number of their runs that diverged, whatever was measured of the others."""
    diverged = Counter(outcome.trial.label for outcome in outcomes if outcome.diverged)
    return [replace(row, diverged=0 if row.unit == "count" else diverged[row.what]) for row in rows]


def describe_endless_warmups(outcomes: Sequence[RunOutcome]) -> list[str]:
    """A sentence on each network that never came to the rate that the others were trained at."""
    sentences = []
    for label in dict.fromkeys(outcome.trial.label for outcome in outcomes if outcome.never_warm):
        runs = [outcome for outcome in outcomes if outcome.trial.label == label]
        recipe, count = runs[0].trial.recipe, sum(outcome.never_warm for outcome in runs)
        sentences.append(
            f"{label} stayed at its warm-up's rate of {recipe.warmup_lr:g} to the end in {count} of "
            f"{format_count(len(runs), 'seed')}: its training error never fell below {format_share(recipe.warmup_error)}."
        )
    return sentences


def describe_other_versions(outcomes: Sequence[RunOutcome]) -> list[str]:
    """A sentence if runs were made by another source than this one, all the same or (`any_version`) not known to be."""
    if others := sum(not outcome.folder.name.endswith(source_hash()) for outcome in outcomes):
        return [f"{format_count(others, 'run')} of {len(outcomes)} made by another version of the code."]
    return []


def find_missing(planned: Sequence[StudyRun], report: Callable[[str], None]) -> list[StudyRun]:
    """The planned runs that are not finished."""
    if others := sum(bool(run.others) and not run.finished for run in planned):
        report(
            f"runs made by code that produces other weights are neither changed nor used: {others:,} "
            "(--any-version counts the finished ones)."
        )
    missing = [run for run in planned if not run.finished]
    if planned and not missing:
        report(f"all {len(planned):,} runs are there already.")
    return missing


def estimate_reading(study: Study, trials: Sequence[Trial], setting: Setting, estimate: CostEstimate) -> float:
    """Seconds, with one thread, of the evaluations that a study makes when its runs are finished."""
    images = [study.count_views(setting, trial.label) * len(setting.source.test) for trial in trials]
    return sum(estimate.evaluation(t.recipe, n) for t, n in zip(trials, images, strict=True) if n)


def check_cost(
    planned: Sequence[StudyRun],
    missing: Sequence[StudyRun],
    estimate: CostEstimate,
    processes: int,
    yes: bool,
    report: Callable[[str], None],
) -> None:
    """Reports how long the missing runs will take; raises UsageError for more than a day without `yes`."""
    seconds = estimate.remaining(missing, processes)
    lengths = sorted({run.recipe.steps for run in planned})
    steps = f"{lengths[0]:,} steps" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,} steps"
    together = f"{processes} at once" if processes > 1 else "one after the other"
    report(
        f"{format_count(len(planned), 'run')} of {steps}, {len(planned) - len(missing):,} of them there already; "
        f"{len(missing):,} to make, {together}: about {format_estimate(seconds)} on this machine."
    )
    if seconds > DAY and not yes:
        raise UsageError(
            f"this would take about {format_estimate(seconds)}; add --yes to start it all the same (it can be stopped and "
            "resumed at any time), or take a smaller --budget, fewer --seeds or --depths."
        )


class PlanProgress:
    """How much of a plan's work is done and how long the rest will take; the longest runs of each seed come first."""

    def __init__(
        self,
        missing: Sequence[StudyRun],
        estimate: CostEstimate,
        processes: int,
        on_runs: Callable[[float, int, str], None],
    ) -> None:
        self.runs = sorted(missing, key=lambda run: (run.recipe.seed, -estimate.run(run.recipe)))
        self._costs = [estimate.run(run.recipe) for run in self.runs]  # seconds
        self._before = [run.steps_done / run.recipe.steps for run in self.runs]
        self._shares, self._start = list(self._before), time.monotonic()
        self._processes, self._on_runs = processes, on_runs

    def update(self, index: int, step: int) -> None:
        """Notes that a run has made `step` steps, and reports."""
        self._shares[index] = step / self.runs[index].recipe.steps
        done = sum(c * (now - then) for c, now, then in zip(self._costs, self._shares, self._before, strict=True))
        left = sum(c * (1 - now) for c, now in zip(self._costs, self._shares, strict=True))
        # at first, when processes start, the estimate counts as if it had been true for a while
        doubt = 2 * START_UP + 0.1 * sum(self._costs) / self._processes
        speed = (done + doubt * self._processes) / (time.monotonic() - self._start + doubt)
        finished = sum(now >= 1 for now in self._shares)
        text = f"{finished} of {format_count(len(self.runs), 'run')}  {format_estimate(left / speed)} left"
        self._on_runs(1 - left / sum(self._costs), 1, text)
