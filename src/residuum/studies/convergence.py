"""Convergence: who is ahead early on, the residual net or its plain twin? (2015 §4.1, Fig. 4: ResNet-18 and plain-18.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from residuum.data import sources
from residuum.studies import drawing, paper
from residuum.studies.runs import Outcome, Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study
from residuum.studies.variants import BETTER, WORSE, error_rows, network
from residuum.studies.verdicts import RULE, compare, tally

PARTS = {"first tenth": (0.0, 0.1), "first quarter": (0.0, 0.25), "last tenth": (0.9, 1.0)}  # of the steps


def settle(asked: Setting) -> Setting:
    """The paper's own pair, of 18 layers and for photographs, on a person's folder; its twins of 6n+2 layers elsewhere."""
    return replace(asked, photographs=asked.data not in sources.NAMES and not asked.depths)


def depth(setting: Setting) -> int:
    """18 layers, or the shallowest chosen depth of the 6n+2."""
    if setting.photographs:
        return 18
    return setting.chosen(smoke=(8,), quick=(20,), paper=(20,))[0]


def plan(setting: Setting) -> list[Trial]:
    """The plain net and its residual twin; those of 6n+2 layers as the study of degradation has them."""
    layers = depth(setting)
    return [t for kind in ("plain", "resnet") for t in network(setting, f"{kind}{layers}", layers)]


def part_error(outcome: Outcome, part: tuple[float, float]) -> float | None:
    """Mean training error over a part of the steps; None where nothing was recorded there."""
    steps = outcome.trial.recipe.steps
    low, high = (share * steps for share in part)
    found = [line["error"] for line in outcome.metrics if line["kind"] == "train" and low < line["step"] <= high]
    return sum(found) / len(found) if found else None


def read(setting: Setting, outcomes: Outcomes, _: Callable[[int, int], None]) -> Reading:
    """Training error over the first tenth, the first quarter and the last tenth, seed by seed."""
    plain, residual = (f"{kind}{depth(setting)}" for kind in ("plain", "resnet"))
    rows: list[Row] = []
    seen = {}
    for part, borders in PARTS.items():
        errors = {
            net: {o.trial.recipe.seed: e for o in outcomes.trained(net) if (e := part_error(o, borders)) is not None}
            for net in (plain, residual)
        }
        c = compare(errors[plain], errors[residual])
        words = tally(c, plain, residual, larger=f"is {WORSE}", smaller=f"is {BETTER}")
        seen[part] = c, words
        figure = f"training error, {part}"
        rows += [Row(net, figure, tuple(each.values()), words, None, setting.share) for net, each in errors.items()]
    for net, printed in ((plain, "plain18"), (residual, "resnet18")):
        rows += error_rows(setting, outcomes, net, plain, paper.IMAGENET_TOP1[printed], "imagenet")[1:]
    early, words = seen["first quarter"]
    opening = {
        "shown": f"{residual} is ahead early on",
        "points to": f"These runs point to {residual} being ahead early on, no more",
        "not shown": f"That {residual} is ahead early on is not shown at this budget",
    }[early.strength]
    return Reading(
        answer=f"{opening}: over the first quarter of the steps, {words}.",
        more=f"Over the last tenth, {seen['last tenth'][1]}.",
        rows=rows,
        pictures=[picture(plain, residual, outcomes)],
        rule=RULE + " Ahead means the smaller mean training error over the first quarter of the steps.",
        remarks=["The paper's figures are of 18 layers on ImageNet: nearly equal at the end, the residual net faster."],
    )


def picture(plain: str, residual: str, outcomes: Outcomes) -> drawing.Picture:
    """Both nets in one panel (2015 Fig. 4: thin training, bold held-out)."""
    colours = dict(zip((plain, residual), drawing.SERIES, strict=False))

    def draw(panels: drawing.Panels) -> None:
        top = drawing.learning(panels[0], "error by step", {net: outcomes.of(net) for net in colours}, colours)
        drawing.in_per_cent(panels[0], 1.25 * top)

    return drawing.picture(
        "convergence",
        "Who is ahead",
        draw,
        height=320,
        legend=[*drawing.colour_keys(list(colours)), *drawing.LEARNING_KEYS],
        caption="As 2015 Fig. 4, plain and residual in one panel.",
        label=f"Error by training step of {plain} and {residual}.",
    )


STUDY = Study("convergence", "Who is ahead early on, plain or residual?", "2015 §4.1, Fig. 4", plan, read, settle)
