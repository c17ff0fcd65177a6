"""Degradation: do deeper plain networks train worse, and deeper residual ones not? (2015 §4.1 and §4.2.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resnetlab.studies import figures, paper
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Study, StudyResult
from resnetlab.studies.variants import TRAINING_ERROR, error_rows, network_trials, tally_errors
from resnetlab.studies.verdicts import RULE, compare_by_seed

KINDS = ("plain", "resnet")


class Degradation(Study):
    """Plain and residual nets of every depth."""

    name = "degradation"
    question = "Do deeper plain networks train worse, and residual ones not?"
    place = "2015 Fig. 1, 4, 6; Table 2"

    def depths(self, setting: Setting) -> tuple[int, ...]:
        """The depths compared, shallow to deep."""
        return setting.pick_depths(smoke=(8, 14), quick=(8, 20, 56), paper=(20, 32, 44, 56))

    def plan(self, setting: Setting) -> list[Trial]:
        """Every depth and kind."""
        return [
            trial
            for depth in self.depths(setting)
            for kind in KINDS
            for trial in network_trials(setting, f"{kind}{depth}", depth)
        ]

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Each net compared with the shallowest of its kind, seed by seed."""
        depths = self.depths(setting)
        rows = []
        for kind in KINDS:
            for net in (f"{kind}{depth}" for depth in depths):
                rows += error_rows(setting, outcomes, net, f"{kind}{depths[0]}", paper.CIFAR10.get(net))
        answer, details = answer_degradation(outcomes, depths[0], depths[-1])
        rule = " Degradation is shown where the deepest plain net has the larger TRAINING error than the shallowest."
        return StudyResult(
            answer=answer,
            details=details,
            rows=rows,
            figures=[draw_degradation(depths, outcomes)],
            rule=RULE + rule,
            remarks=[
                TRAINING_ERROR,
                "The paper prints CIFAR test errors of plain nets only as curves (2015 Fig. 6 left): plain rows have none.",
            ],
        )


def answer_degradation(outcomes: RunOutcomes, shallow: int, deep: int) -> tuple[str, str]:
    """The verdict, and how residual nets compare."""
    if shallow == deep:
        return "One depth alone cannot show degradation; give several with --depths.", ""
    errors = {f"{k}{d}": outcomes.by_seed(f"{k}{d}", "training_error") for k in KINDS for d in (shallow, deep)}

    def compare(a: str, b: str) -> tuple[str, str]:
        difference = compare_by_seed(errors[a], errors[b])
        return difference.strength, tally_errors(difference, a, b)

    strength, text = compare(f"plain{deep}", f"plain{shallow}")
    opening = {
        "shown": f"Degradation is shown: {text}",
        "points to": f"This points to degradation: {text}, but the interval of the difference includes 0",
        "not shown": f"This budget does not show degradation: {text}",
    }[strength]
    _, residual = compare(f"resnet{deep}", f"resnet{shallow}")
    _, gain = compare(f"plain{deep}", f"resnet{deep}")
    return f"{opening}.", f"With shortcuts, {residual}; {gain}."


def draw_degradation(depths: Sequence[int], outcomes: RunOutcomes) -> figures.StudyFigure:
    """Error by step, plain left and residual right (2015 Fig. 6 left and middle)."""
    colours = dict(zip(depths, figures.SERIES * 3, strict=False))

    def draw(panels: figures.Panels) -> None:
        tops = []
        for axes, kind, title in zip(panels, KINDS, ("plain", "residual"), strict=True):
            nets = {f"{kind}{depth}": outcomes.of(f"{kind}{depth}") for depth in depths}
            net_colours = {f"{kind}{depth}": colours[depth] for depth in depths}
            tops.append(figures.plot_learning(axes, title, nets, net_colours))
        for axes in panels:
            figures.set_error_axis(axes, 1.1 * max(tops))

    return figures.draw_study_figure(
        "degradation",
        draw,
        figures.FigureText(
            "Error by step, plain and residual",
            "Laid out as 2015 Fig. 6 (left, middle), Fig. 1 and 4. Means over seeds; bands from the lowest to the highest.",
            "Error by training step of plain nets (left) and residual nets (right), one colour for each depth.",
        ),
        figures.PanelLayout(panels=2, height=340),
        legend=[*figures.colour_keys([f"{depth} layers" for depth in depths]), *figures.LEARNING_KEYS],
    )
