"""Degradation: do deeper plain networks train worse, and deeper residual ones not? (2015 §4.1 and §4.2.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resnetlab.formatting import format_count
from resnetlab.models.spec import CIFAR_DEPTHS
from resnetlab.studies import figures
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Study, StudyResult
from resnetlab.studies.variants import TRAINING_ERROR, describe_errors, error_rows, network_trials
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
        return network_trials(setting, *(f"{kind}{depth}" for depth in self.depths(setting) for kind in KINDS))

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Each net compared with the shallowest of its kind, seed by seed."""
        depths = self.depths(setting)
        rows = []
        for kind in KINDS:
            for net in (f"{kind}{depth}" for depth in depths):
                rows += error_rows(setting, outcomes, net, f"{kind}{depths[0]}")
        answer, details = answer_degradation(setting, outcomes, depths[0], depths[-1])
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


def answer_degradation(setting: Setting, outcomes: RunOutcomes, shallow: int, deep: int) -> tuple[str, str]:
    """The verdict, and how residual nets compare."""
    if shallow == deep:
        return "One depth alone cannot show degradation; give several with --depths.", ""
    errors = {f"{k}{d}": outcomes.by_seed(f"{k}{d}", "training_error") for k in KINDS for d in (shallow, deep)}

    def compare(a: str, b: str) -> tuple[str, str]:
        difference = compare_by_seed(errors[a], errors[b])
        return difference.strength, describe_errors(difference, a, b)

    strength, text = compare(f"plain{deep}", f"plain{shallow}")
    opening = {
        "shown": "Degradation is shown",
        "points to": "This points to degradation, no more,",
        "not shown": "Degradation is not shown",
    }[strength]
    strange = [f"{depth} layers" for depth in (shallow, deep) if depth not in CIFAR_DEPTHS]
    notes = [f"nets of {' and '.join(strange)} are not the paper's"] if strange else []
    endless = {net: sum(o.never_warm for o in outcomes.of(net)) for net in (f"plain{deep}", f"plain{shallow}")}
    notes += [
        f"{net} stayed at its warm-up's rate to the end in {count} of {format_count(len(outcomes.of(net)), 'seed')}"
        for net, count in endless.items()
        if count
    ]
    depths = f" ({'; '.join(notes)})" if notes else ""
    _, residual = compare(f"resnet{deep}", f"resnet{shallow}")
    _, gain = compare(f"plain{deep}", f"resnet{deep}")
    return f"{opening}{setting.condition}{depths}: {text}.", f"With shortcuts, {residual}; {gain}."


def draw_degradation(depths: Sequence[int], outcomes: RunOutcomes) -> figures.StudyFigure:
    """Error by step, plain left and residual right (2015 Fig. 6), a row for each depth beside the shallowest."""
    pairs = [[depths[0], deeper] for deeper in depths[1:]] or [[depths[0]]]
    nets = [[f"{kind}{depth}" for depth in pair] for pair in pairs for kind in KINDS]
    titles = [title for _ in pairs for title in ("plain", "residual")]

    def draw(panels: figures.Panels) -> None:
        figures.plot_panels(panels, titles, [{net: outcomes.of(net) for net in pair} for pair in nets])

    return figures.draw_study_figure(
        "degradation",
        draw,
        figures.FigureText(
            "Error by step, plain and residual",
            "2015 Fig. 6 (left, middle), Fig. 1 and 4 as small multiples: the shallowest net beside each deeper one. Means "
            "over seeds; bands from the lowest to the highest.",
            "Error by training step of plain nets (left) and residual nets (right), each beside the shallowest.",
        ),
        figures.PanelLayout(len(nets), len(pairs), 280, figures.LABEL),
        legend=figures.LEARNING_KEYS,
    )
