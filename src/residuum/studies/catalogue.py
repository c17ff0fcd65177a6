"""The studies: one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from residuum.errors import unknown
from residuum.studies import (
    block_depth,
    bottleneck,
    convergence,
    cost,
    degradation,
    depth,
    gradients,
    lesion,
    orderings,
    protocols,
    responses,
    shortcut_types,
    shortcuts,
)
from residuum.studies.pace import Pace
from residuum.studies.setting import BUDGETS, SEEDS, Setting
from residuum.studies.study import RUNS, Study, places
from residuum.studies.workers import seats

_EXPERIMENTS = (
    cost, degradation, depth, convergence, shortcuts, bottleneck, block_depth, orderings, shortcut_types, responses, gradients,
    lesion, protocols,
)  # fmt: skip
STUDIES: dict[str, Study] = {experiment.STUDY.name: experiment.STUDY for experiment in _EXPERIMENTS}


def chosen(name: str) -> list[Study]:
    """The study of a name, or all of them for "all"; raises UsageError, naming the nearest, where it is not known."""
    if name == "all":
        return list(STUDIES.values())
    if name not in STUDIES:
        raise unknown("study", name, [*STUDIES, "all"])
    return [STUDIES[name]]


def costs(setting: Setting, root: Path = RUNS) -> list[dict[str, Any]]:
    """Every study with its question, its place in the papers, and the seconds that each budget takes on this machine.

    One kind of network is timed for all of them, and runs that are there already cost nothing.
    """
    pace = Pace(setting, every_kind=False)
    rows = []
    for study in STUDIES.values():
        seconds = {}
        for budget in BUDGETS:
            asked = study.settle(replace(setting, budget=budget, seeds=SEEDS[budget]))
            missing = [place for place in places(study.plan(asked), asked, root) if not place.finished]
            seconds[budget] = round(pace.left(missing, len(seats(setting.device, len(missing))))) if missing else 0
        rows.append({"study": study.name, "question": study.question, "place": study.place, "seconds": seconds})
    return rows
