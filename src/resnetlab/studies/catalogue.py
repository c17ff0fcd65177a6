"""The studies of this package, and what each costs."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from resnetlab import studies
from resnetlab.data import sources
from resnetlab.errors import unknown_name_error
from resnetlab.studies.cost_estimate import CostEstimate
from resnetlab.studies.setting import BUDGETS, SEEDS, Setting
from resnetlab.studies.study import RUNS, Study, estimate_reading, locate_runs
from resnetlab.studies.workers import worker_devices


def find_studies() -> dict[str, Study]:
    """The studies in the modules of this package by name, in the order of their places in the papers, ImageNet's last."""
    names = (each.name for each in iter_modules(studies.__path__))
    modules = [import_module(f"{studies.__name__}.{name}") for name in names if name != "catalogue"]
    classes = {each for module in modules for each in vars(module).values() if isinstance(each, type)}
    found = [
        each() for each in classes if issubclass(each, Study) and hasattr(each, "name")
    ]  # base classes have no name
    return {study.name: study for study in sorted(found, key=lambda study: (study.on_imagenet, study.place))}


STUDIES = find_studies()


def select_studies(name: str) -> list[Study]:
    """The study of a name, or all of CIFAR's for "all"; raises UsageError, naming the nearest, for an unknown one."""
    if name == "all":
        return [study for study in STUDIES.values() if not study.on_imagenet]
    if name not in STUDIES:
        raise unknown_name_error("study", name, [*STUDIES, "all"])
    return [STUDIES[name]]


def estimate_costs(setting: Setting) -> list[dict[str, Any]]:
    """Every study with its question, its place in the papers, and the seconds that each budget takes on this machine.

    One kind of network is timed for all of them, and finished runs cost nothing. Where a study does not run on the data, the
    seconds are None.
    """
    estimate = CostEstimate(setting, every_kind=False)
    rows = []
    for study in STUDIES.values():
        seconds: dict[str, int | None] = dict.fromkeys(BUDGETS)
        for budget in BUDGETS if not (study.on_imagenet and setting.data in sources.BUILTIN) else ():
            own = study.adapt(replace(setting, budget=budget, seeds=SEEDS[budget]))
            trials = study.plan(own)
            missing = [run for run in locate_runs(trials, own, RUNS) if not run.finished]
            estimate.reading = estimate_reading(study, trials, own, estimate)
            image_size = max((run.recipe.image_size for run in missing), default=0)
            processes = len(worker_devices(setting.device, len(missing), image_size))
            seconds[budget] = round(estimate.remaining(missing, processes)) if missing else 0
        rows.append({"study": study.name, "question": study.question, "place": study.place, "seconds": seconds})
    return rows
