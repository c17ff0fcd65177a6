"""A study: a plan of runs and a way to read them. Plan -> runs -> rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residuum.errors import UsageError
from residuum.studies import verdicts, workers
from residuum.studies.drawing import Picture
from residuum.studies.pace import Pace
from residuum.studies.paper import Printed
from residuum.studies.runs import Outcome, Outcomes, Place
from residuum.studies.setting import Setting, Trial

RUNS = Path("runs/studies")
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Row:
    """One figure of one network.

    Attributes:
        what: the network, as the study calls it.
        figure: what was measured, such as "test error".
        values: one a seed (or the one that needs no seed); errors are fractions.
        verdict: in words, by the study's rule.
        budget: the runs' length as a share of the paper's; None where nothing was trained.
        unit: "error" (a fraction), "count" or "number".
        diverged: runs without a figure, because their loss was no longer finite.
    """

    what: str
    figure: str
    values: tuple[float, ...]
    verdict: str
    paper: Printed | None = None
    budget: float | None = None
    unit: str = "error"
    diverged: int = 0

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
        }


@dataclass(frozen=True)
class Reading:
    """What a study says: the answer in one sentence, more of it, the rule behind it, rows, pictures and remarks."""

    answer: str
    rows: Sequence[Row]
    pictures: Sequence[Picture] = ()
    more: str = ""
    rule: str = verdicts.RULE
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """An experiment of the papers.

    Attributes:
        name: what people type.
        question: what it answers.
        place: where the papers have it.
        plan: the runs that it needs.
        read: what they say; called with a function that is told (done, total) of slow measurements.
        settle: makes its own setting of the one that was asked for.
    """

    name: str
    question: str
    place: str
    plan: Callable[[Setting], list[Trial]]
    read: Callable[[Setting, Outcomes, Callable[[int, int], None]], Reading]
    settle: Callable[[Setting], Setting] = lambda asked: asked


@dataclass(frozen=True)
class Told:
    """Who is told what while a study goes on."""

    say: Callable[[str], None] = lambda _: None
    runs: Callable[[int, int, str], None] = lambda done, total, words: None  # per mille of the plan's work
    reading: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class Done:
    """A study that was carried out."""

    study: Study
    setting: Setting
    reading: Reading
    outcomes: Sequence[Outcome] = field(default_factory=tuple)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, each with the study's name and data."""
        return [{"study": self.study.name, "data": self.setting.data} | row.to_json() for row in self.reading.rows]


def places(trials: Sequence[Trial], setting: Setting, root: Path) -> list[Place]:
    """Where the runs of a plan lie; raises UsageError for a network that cannot be built."""
    for trial in trials:
        setting.spec(trial.recipe)
    fingerprint = setting.source.fingerprint if trials else ""
    return [Place(root, trial.recipe, fingerprint) for trial in trials]


def carry_out(
    studies: Sequence[Study], setting: Setting, *, root: Path = RUNS, yes: bool = False, told: Told | None = None
) -> list[Done]:
    """Makes all runs that the studies need and that are not there yet, then reads them.

    Raises:
        UsageError: more than a day of work without `yes`.
        Stopped, ResiduumError: as training does; what was done stays.
    """
    told = told or Told()
    own = {study.name: study.settle(setting) for study in studies}
    plans = {study.name: study.plan(own[study.name]) for study in studies}
    where = {name: places(trials, own[name], root) for name, trials in plans.items()}
    make(list({place.folder: place for plan in where.values() for place in plan}.values()), setting, yes, told)
    done = []
    for study in studies:
        pairs = zip(plans[study.name], where[study.name], strict=True)
        outcomes = tuple(Outcome(trial, place.folder) for trial, place in pairs)
        told.say(f"reading {study.name}")
        settled = own[study.name]
        done.append(Done(study, settled, study.read(settled, Outcomes(outcomes), told.reading), outcomes))
    return done


def make(wanted: Sequence[Place], setting: Setting, yes: bool, told: Told) -> None:
    """Makes the runs that are missing, spread over the machine's processes."""
    if not wanted:
        return
    if others := sum(bool(place.others) and not place.finished for place in wanted):
        told.say(f"runs that another version of the code made, left alone and not mixed in: {others:,}.")
    missing = [place for place in wanted if not place.finished]
    if not missing:
        told.say(f"all {len(wanted):,} runs are there already.")
        return
    devices = workers.seats(setting.device, len(missing))
    pace = Pace(setting)
    seconds = pace.left(missing, len(devices))
    lengths = sorted({place.recipe.steps for place in wanted})
    steps = f"{lengths[0]:,} steps" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,} steps"
    together = f"{len(devices)} at once" if len(devices) > 1 else "one after the other"
    told.say(
        f"{len(wanted):,} runs of {steps}, {len(wanted) - len(missing):,} of them there already; "
        f"{len(missing):,} to make, {together}: about {span(seconds)} on this machine."
    )
    if seconds > DAY and not yes:
        raise UsageError(
            f"this would take about {span(seconds)}; add --yes to start it all the same (it can be stopped and gone on with "
            "at any time), or take a smaller --budget, fewer --seeds or --depths."
        )
    _follow(missing, setting, devices, pace, told)


def _follow(missing: Sequence[Place], setting: Setting, devices: Sequence[str], pace: Pace, told: Told) -> None:
    """Makes the runs, seed by seed and the longest first, and tells how much of the work is done."""
    order = sorted(missing, key=lambda place: (place.recipe.seed, -pace.run(place.recipe)))
    cost = [pace.run(place.recipe) for place in order]
    before = [place.steps_done / place.recipe.steps for place in order]
    share, began = list(before), time.monotonic()

    def progress(job: int, step: int) -> None:
        share[job] = step / order[job].recipe.steps
        work = sum(c * (now - then) for c, now, then in zip(cost, share, before, strict=True))
        rest = sum(c * (1 - now) for c, now in zip(cost, share, strict=True))
        speed = work / (time.monotonic() - began) or len(devices)
        finished = sum(now >= 1 for now in share)
        words = f"{finished} of {len(order)} runs  {span(rest / speed)} left"
        told.runs(round(1000 * (1 - rest / sum(cost))), 1000, words)

    workers.carry_out(order, setting.data_dir, devices, progress)


def span(seconds: float) -> str:
    """A length of time in the words of a plan: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"
