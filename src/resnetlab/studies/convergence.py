"""Convergence: is the residual net or its plain twin ahead early on? (2015 §4.1, Fig. 4: ResNet-18 and plain-18.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from resnetlab.data import sources
from resnetlab.studies import figures
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.variants import BETTER, WORSE, error_rows, network_trials, open_claim
from resnetlab.studies.verdicts import RULE, PairedDifference, compare_by_seed, describe

PARTS = {"first tenth": (0.0, 0.1), "first quarter": (0.0, 0.25), "last tenth": (0.9, 1.0)}  # of the steps


class Convergence(Study):
    """A plain net and its residual twin: the paper's own of 18 layers on a folder of photographs, else of 6n+2 layers."""

    name = "convergence"
    question = "Who is ahead early on, plain or residual?"
    place = "2015 §4.1, Fig. 4"

    def adapt(self, setting: Setting) -> Setting:
        """The ImageNet nets on the user's folder, unless depths are given."""
        return replace(setting, recipe="" if setting.data in sources.BUILTIN or setting.depths else "photos")

    def networks(self, setting: Setting) -> tuple[str, str]:
        """The names of the plain net and the residual one."""
        depth = 18 if setting.recipe else setting.pick_depths(smoke=(8,), quick=(20,), paper=(20,))[0]
        return f"plain{depth}", f"resnet{depth}"

    def plan(self, setting: Setting) -> list[Trial]:
        """Both nets; those of 6n+2 layers as the study of degradation has them, 18 layers without projections (Table 2)."""
        plain, residual = self.networks(setting)
        if setting.recipe:
            return setting.trials(plain, plain) + setting.trials(residual, residual, {"shortcut": "A"})
        return network_trials(setting, plain, residual)

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Training error over the first tenth, the first quarter and the last tenth, seed by seed."""
        plain, residual = self.networks(setting)
        rows: list[Row] = []
        differences: dict[str, PairedDifference] = {}
        texts: dict[str, str] = {}
        for part, borders in PARTS.items():
            errors = {
                net: {
                    o.seed: e for o in outcomes.trained(net) if (e := o.mean_over_steps("error", *borders)) is not None
                }
                for net in (plain, residual)
            }
            differences[part] = compare_by_seed(errors[plain], errors[residual])
            texts[part] = describe(differences[part], plain, residual, larger=f"is {WORSE}", smaller=f"is {BETTER}")
            for net, by_seed in errors.items():
                values = tuple(by_seed.values())
                compared = (residual, differences[part]) if net == plain else None
                figure = f"training error, {part}"
                rows.append(Row(net, figure, values, texts[part], None, setting.share, compared=compared))
        for net in (plain, residual):
            rows += error_rows(setting, outcomes, net, plain)[1:]
        claim = f"{residual} is ahead early on, over the first quarter of the steps"
        return StudyResult(
            answer=f"{open_claim(differences['first quarter'], setting)}: {claim}. "
            f"{texts['first quarter'][0].upper()}{texts['first quarter'][1:]}.",
            details=f"Over the last tenth, {texts['last tenth']}.",
            rows=rows,
            figures=[draw_convergence(plain, residual, outcomes)],
            rule=RULE + " Ahead means the smaller mean training error over the first quarter of the steps.",
            remarks=[
                "The paper's figures are of 18 layers on ImageNet: nearly equal at the end, the residual net faster."
            ],
        )


def draw_convergence(plain: str, residual: str, outcomes: RunOutcomes) -> figures.StudyFigure:
    """Both nets in one panel (2015 Fig. 4: thin training, bold held-out)."""

    def draw(panels: figures.Panels) -> None:
        figures.plot_panels(panels, ["error by step"], [{net: outcomes.of(net) for net in (plain, residual)}])

    return figures.draw_study_figure(
        "convergence",
        draw,
        figures.FigureText(
            "Who is ahead",
            "As 2015 Fig. 4, plain and residual in one panel.",
            f"Error by training step of {plain} and {residual}.",
        ),
        figures.PanelLayout(height=320, right=figures.LABEL),
        legend=figures.LEARNING_KEYS,
    )
