"""Protocols: one crop, ten crops, several scales and ensembles of the same models (2015 §3.4, Tables 3 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from residuum.evaluation.evaluate import evaluate
from residuum.studies import drawing, paper
from residuum.studies.runs import Outcome, Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study
from residuum.studies.variants import BETTER, WORSE, network
from residuum.studies.verdicts import RULE, compare, tally

Errors = dict[str, dict[str, dict[int, float]]]  # model -> protocol -> seed -> top-1 error
ENSEMBLE = "ensemble of depths"


def depths(setting: Setting) -> tuple[int, ...]:
    """The depths whose models are judged, and that an ensemble has."""
    return setting.chosen(smoke=(8, 14), quick=(8, 20), paper=(20, 32, 44, 56))


def plan(setting: Setting) -> list[Trial]:
    """Residual nets of several depths, as the study of degradation has them."""
    return [t for depth in depths(setting) for t in network(setting, f"resnet{depth}", depth)]


def protocols(setting: Setting) -> dict[str, str]:
    """What each protocol is called, and how it is written; without mirrored views where training never mirrors."""
    size, step = setting.base.size, max(1, setting.base.size // 8)
    sides = ",".join(str(size + i * step) for i in (0, 1, 2))
    if not setting.base.flip:
        return {"1crop": "1crop", "multiscale": f"multiscale:{sides}+noflip"}
    return {"1crop": "1crop", "flip": "flip", "10crop": f"10crop:{size + step}", "multiscale": f"multiscale:{sides}"}


def read(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> Reading:
    """Every model by every protocol, each seed's depths as an ensemble."""
    errors, spellings = judged(setting, outcomes, tell), protocols(setting)
    rows = []
    for model, by_protocol in errors.items():
        for protocol, by_seed in by_protocol.items():
            words = "what the other protocols are compared with"
            if protocol != "1crop":
                c = compare(by_seed, by_protocol["1crop"])
                words = tally(c, protocol, "1crop", larger=f"tests {WORSE}", smaller=f"tests {BETTER}")
            printed = paper.PROTOCOLS.get(protocol) if model != ENSEMBLE else None
            figure = f"test error, {spellings[protocol]}"
            rows.append(Row(model, figure, tuple(by_seed.values()), words, printed, setting.share))
    first, more = answer(errors)
    return Reading(
        answer=first,
        more=more,
        rows=rows,
        pictures=[picture(errors)],
        rule=RULE,
        remarks=[
            "The paper's figures are of ResNet-50 on ImageNet, whose pictures are larger than the crop.",
            "An ensemble's score is the mean of its members'. The paper's six models: 3.57 % top-5, test (Table 5).",
        ],
    )


def judged(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> Errors:
    """Judges the models seed by seed, all depths of a seed at once."""
    labels = [f"resnet{depth}" for depth in depths(setting)]
    by_seed: dict[int, list[Outcome]] = {}
    for label in labels:
        for outcome in outcomes.trained(label):
            by_seed.setdefault(outcome.trial.recipe.seed, []).append(outcome)
    asked = [
        (seed, models, kind, text) for seed, models in by_seed.items() for kind, text in protocols(setting).items()
    ]
    errors: Errors = {label: {kind: {} for kind in protocols(setting)} for label in [*labels, ENSEMBLE]}
    for done, (seed, models, kind, text) in enumerate(asked, 1):
        found = evaluate(
            [o.bundle() for o in models],
            setting.data,
            protocol=text,
            data_dir=setting.data_dir,
            precision=setting.base.precision,
            device=setting.device,
        )
        each = [member.top1_error for member in found.members] or [found.top1_error]
        for outcome, error in zip(models, each, strict=True):
            errors[outcome.trial.label][kind][seed] = error
        if len(models) == len(labels) > 1:
            errors[ENSEMBLE][kind][seed] = found.top1_error
        tell(done, len(asked))
    return {model: found for model, found in errors.items() if any(found.values())}


def answer(errors: Errors) -> tuple[str, str]:
    """The ensemble beside the best of its members, and the protocols beside one crop."""
    models = [model for model in errors if model != ENSEMBLE]
    parts = []
    for protocol in [p for p in errors[models[-1]] if p != "1crop"] if models else []:
        c = compare(errors[models[-1]][protocol], errors[models[-1]]["1crop"])
        parts.append(tally(c, protocol, "1crop", larger=f"tests {WORSE}", smaller=f"tests {BETTER}"))
    more = f"Of {models[-1]}: {'; '.join(parts)}." if parts else ""
    if ENSEMBLE not in errors:
        return "One depth alone makes no ensemble of depths; give several with --depths.", more
    best = min(models, key=lambda m: sum(errors[m]["1crop"].values()) / len(errors[m]["1crop"]))
    c = compare(errors[best]["1crop"], errors[ENSEMBLE]["1crop"])
    seen = tally(c, best, f"the ensemble of {len(models)} depths", larger=f"tests {WORSE}", smaller=f"tests {BETTER}")
    opening = {
        "shown": "An ensemble is shown to beat its best member",
        "points to": "An ensemble may beat its best member",
    }
    return f"{opening.get(c.strength, 'Not shown that an ensemble beats its best member')}: {seen}.", more


def picture(errors: Errors) -> drawing.Picture:
    """One panel a protocol, a line for each model."""
    kinds: Sequence[str] = list(next(iter(errors.values()), {}))

    def draw(panels: drawing.Panels) -> None:
        for axes, kind in zip(panels, kinds, strict=True):
            drawing.dots(axes, kind, {model: list(found[kind].values()) for model, found in errors.items()})

    return drawing.picture(
        "protocols",
        "The same models by every protocol",
        draw,
        panels=len(kinds),
        rows=-(-len(kinds) // 2),
        height=90 + 30 * len(errors),
        caption="Test error, every seed, mean ± sd.",
        label="Test error of each model by each protocol.",
    )


STUDY = Study(
    name="protocols",
    question="What do more crops, more scales and more models bring?",
    place="2015 Tables 3 to 5",
    plan=plan,
    read=read,
)
