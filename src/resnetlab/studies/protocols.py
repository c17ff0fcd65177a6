"""Protocols: one crop, ten crops, several scales and ensembles of the same models (2015 §3.4, Tables 3 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resnetlab.evaluation.evaluate import evaluate
from resnetlab.studies import figures
from resnetlab.studies.runs import RunOutcome, RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.variants import beside_paper, describe_errors, network_trials
from resnetlab.studies.verdicts import compare_by_seed

Errors = dict[str, dict[str, dict[int, float]]]  # model -> protocol -> seed -> top-1 error
ENSEMBLE = "ensemble of depths"


class Protocols(Study):
    """Residual nets of several depths, evaluated by every protocol and as an ensemble."""

    name = "protocols"
    question = "What do more crops, more scales and more models bring?"
    place = "2015 Tables 3 to 5"

    def depths(self, setting: Setting) -> tuple[int, ...]:
        """The depths whose models are evaluated and form the ensemble."""
        return setting.pick_depths(smoke=(8, 14), quick=(8, 20), paper=(20, 32, 44, 56))

    def plan(self, setting: Setting) -> list[Trial]:
        """The residual nets, as the study of degradation has them."""
        return [t for depth in self.depths(setting) for t in network_trials(setting, f"resnet{depth}", depth)]

    def protocols(self, setting: Setting) -> dict[str, str]:
        """label -> protocol; without mirrored views where training never mirrors."""
        size, step = setting.base.image_size, max(1, setting.base.image_size // 8)
        sides = ",".join(str(size + i * step) for i in (0, 1, 2))
        if not setting.base.flip:
            return {"1crop": "1crop", "multiscale": f"multiscale:{sides}+noflip"}
        return {
            "1crop": "1crop",
            "flip": "flip",
            "10crop": f"10crop:{size + step}",
            "multiscale": f"multiscale:{sides}",
        }

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Every model by every protocol, each seed's depths as an ensemble."""
        errors, protocols = self._measure(setting, outcomes, on_progress), self.protocols(setting)
        rows = []
        for model, by_protocol in errors.items():
            for protocol, by_seed in by_protocol.items():
                text, compared = "what the other protocols are compared with", None
                if protocol != "1crop":
                    difference = compare_by_seed(by_seed, by_protocol["1crop"])
                    text, compared = describe_errors(difference, protocol, "1crop", "tests"), ("1crop", difference)
                figure = f"test error, {protocols[protocol]}"
                row = Row(model, figure, tuple(by_seed.values()), text, None, setting.share, compared=compared)
                rows += beside_paper(row, setting, outcomes.of(model), protocols[protocol])
        answer, details = answer_protocols(errors, setting)
        return StudyResult(
            answer=answer,
            details=details,
            rows=rows,
            figures=[draw_protocols(errors)],
            remarks=[
                "The paper's figures are of ImageNet, whose images are larger than the crop.",
                "An ensemble's score is the mean of its members'. The paper's six models: 3.57 % top-5, test (Table 5).",
            ],
        )

    def _measure(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> Errors:
        """Evaluates the models seed by seed, all depths of a seed at once."""
        labels, protocols = [f"resnet{depth}" for depth in self.depths(setting)], self.protocols(setting)
        by_seed: dict[int, list[RunOutcome]] = {}
        for outcome in (o for label in labels for o in outcomes.trained(label)):
            by_seed.setdefault(outcome.seed, []).append(outcome)
        jobs = [(seed, runs, *protocol) for seed, runs in by_seed.items() for protocol in protocols.items()]
        errors: Errors = {model: {label: {} for label in protocols} for model in [*labels, ENSEMBLE]}
        for done, (seed, runs, label, protocol) in enumerate(jobs, 1):
            evaluation = evaluate(
                [run.load_model() for run in runs],
                setting.data,
                protocol=protocol,
                data_dir=setting.data_dir,
                precision=setting.base.precision,
                device=setting.device,
            )
            members = [member.top1_error for member in evaluation.members] or [evaluation.top1_error]
            for run, error in zip(runs, members, strict=True):
                errors[run.trial.label][label][seed] = error
            if len(runs) == len(labels) > 1:
                errors[ENSEMBLE][label][seed] = evaluation.top1_error
            on_progress(done, len(jobs))
        return {model: by_protocol for model, by_protocol in errors.items() if any(by_protocol.values())}


def answer_protocols(errors: Errors, setting: Setting) -> tuple[str, str]:
    """The ensemble compared with the best of its members, and the protocols with one crop."""
    models = [model for model in errors if model != ENSEMBLE]
    tallies = []
    for protocol in [p for p in errors[models[-1]] if p != "1crop"] if models else []:
        difference = compare_by_seed(errors[models[-1]][protocol], errors[models[-1]]["1crop"])
        tallies.append(describe_errors(difference, protocol, "1crop", "tests"))
    details = f"Of {models[-1]}: {'; '.join(tallies)}." if tallies else ""
    if ENSEMBLE not in errors:
        return "One depth alone makes no ensemble of depths; give several with --depths.", details
    best = min(models, key=lambda m: sum(errors[m]["1crop"].values()) / len(errors[m]["1crop"]))
    difference = compare_by_seed(errors[best]["1crop"], errors[ENSEMBLE]["1crop"])
    text = describe_errors(difference, best, f"the ensemble of {len(models)} depths", "tests")
    opening = {
        "shown": "An ensemble is shown to beat its best member",
        "points to": "The runs point to an ensemble beating its best member, no more,",
        "not shown": "That an ensemble beats its best member is not shown",
    }[difference.strength]
    return f"{opening}{setting.condition}: {text}.", details


def draw_protocols(errors: Errors) -> figures.StudyFigure:
    """One panel for each protocol, a line for each model."""
    labels: Sequence[str] = list(next(iter(errors.values()), {}))

    def draw(panels: figures.Panels) -> None:
        for axes, label in zip(panels, labels, strict=True):
            groups = {model: list(by_protocol[label].values()) for model, by_protocol in errors.items()}
            figures.plot_dots(axes, label, groups)

    return figures.draw_study_figure(
        "protocols",
        draw,
        figures.FigureText(
            "The same models by every protocol",
            "Test error, every seed, mean ± sd.",
            "Test error of each model by each protocol.",
        ),
        figures.PanelLayout(panels=len(labels), rows=-(-len(labels) // 2), height=90 + 30 * len(errors)),
    )
