"""Degradation: do deeper plain networks train worse, and deeper residual ones not? (2015 §4.1 and §4.2.)"""

from __future__ import annotations

from collections.abc import Callable

from residuum.studies import drawing, paper
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Study
from residuum.studies.variants import BETTER, TRAINING_ERROR, WORSE, error_rows, network
from residuum.studies.verdicts import RULE, compare, tally

KINDS = ("plain", "resnet")


def depths(setting: Setting) -> tuple[int, ...]:
    """The depths compared, shallow to deep."""
    return setting.chosen(smoke=(8, 14), quick=(8, 20, 56), paper=(20, 32, 44, 56))


def plan(setting: Setting) -> list[Trial]:
    """Plain and residual nets of every depth."""
    return [t for depth in depths(setting) for kind in KINDS for t in network(setting, f"{kind}{depth}", depth)]


def read(setting: Setting, outcomes: Outcomes, _: Callable[[int, int], None]) -> Reading:
    """Each net beside the shallowest of its kind, seed by seed."""
    chosen = depths(setting)
    rows = [
        row
        for kind in KINDS
        for depth in chosen
        for row in error_rows(
            setting, outcomes, f"{kind}{depth}", f"{kind}{chosen[0]}", paper.CIFAR10.get(f"{kind}{depth}")
        )
    ]
    first, more = answer(outcomes, chosen[0], chosen[-1])
    return Reading(
        answer=first,
        more=more,
        rows=rows,
        pictures=[curves(setting, outcomes)],
        rule=RULE
        + " Degradation is shown where the deepest plain net has the larger TRAINING error than the shallowest.",
        remarks=[
            TRAINING_ERROR,
            "The paper prints CIFAR test errors of plain nets only as curves (2015 Fig. 6 left), so plain rows have no number.",
        ],
    )


def answer(outcomes: Outcomes, shallow: int, deep: int) -> tuple[str, str]:
    """The study's verdict, and what residual nets do beside it."""
    if shallow == deep:
        return "One depth alone cannot show degradation; give several with --depths.", ""
    errors = {f"{k}{d}": outcomes.by_seed(f"{k}{d}", "training_error") for k in KINDS for d in (shallow, deep)}
    plain = compare(errors[f"plain{deep}"], errors[f"plain{shallow}"])
    residual = compare(errors[f"resnet{deep}"], errors[f"resnet{shallow}"])
    gain = compare(errors[f"plain{deep}"], errors[f"resnet{deep}"])
    seen = tally(plain, f"plain{deep}", f"plain{shallow}", larger=f"trains {WORSE}", smaller=f"trains {BETTER}")
    opening = {
        "shown": f"Degradation is shown: {seen}",
        "points to": f"This points to degradation: {seen}, but the interval of the difference holds 0",
        "not shown": f"This budget does not show degradation: {seen}",
    }[plain.strength]
    same = tally(residual, f"resnet{deep}", f"resnet{shallow}", larger=f"trains {WORSE}", smaller=f"trains {BETTER}")
    against = tally(gain, f"plain{deep}", f"resnet{deep}", larger=f"trains {WORSE}", smaller=f"trains {BETTER}")
    return f"{opening}.", f"With shortcuts, {same}; {against}."


def curves(setting: Setting, outcomes: Outcomes) -> drawing.Picture:
    """Error by step, plain left and residual right (2015 Fig. 6 left and middle)."""
    chosen = depths(setting)
    colours = dict(zip(chosen, drawing.SERIES * 3, strict=False))

    def draw(panels: drawing.Panels) -> None:
        tops = []
        for axes, kind, title in zip(panels, KINDS, ("plain", "residual"), strict=True):
            nets = {f"{kind}{depth}": outcomes.of(f"{kind}{depth}") for depth in chosen}
            names = {f"{kind}{depth}": colours[depth] for depth in chosen}
            tops.append(drawing.learning(axes, title, nets, names))
        for axes in panels:
            drawing.in_per_cent(axes, 1.1 * max(tops))

    return drawing.picture(
        "degradation",
        "Error by step, plain and residual",
        draw,
        panels=2,
        height=340,
        legend=[*drawing.colour_keys([f"{depth} layers" for depth in chosen]), *drawing.LEARNING_KEYS],
        caption="Laid out as 2015 Fig. 6 (left, middle), Fig. 1 and 4. Means over seeds; bands from the lowest to the highest.",
        label="Error by training step of plain nets (left) and residual nets (right), one colour for each depth.",
    )


STUDY = Study(
    name="degradation",
    question="Do deeper plain networks train worse, and residual ones not?",
    place="2015 Fig. 1, 4, 6; Table 2",
    plan=plan,
    read=read,
)
