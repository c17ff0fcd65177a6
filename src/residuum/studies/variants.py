"""What studies of several networks side by side share: the runs of a network, its rows, a picture of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from residuum.studies import drawing
from residuum.studies.drawing import Picture
from residuum.studies.paper import Printed
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study
from residuum.studies.verdicts import RULE, beside_paper, compare, tally

DEEP = 110  # from here on a residual net needs a warm-up (2015 §4.2)
FIGURES = {"training error": "trains", "test error": "tests"}
WORSE, BETTER = "worse than", "better than"
TRAINING_ERROR = (
    "Training error is the mean over the last tenth of the steps, on augmented batches and with BN's statistics of the batch, "
    "as the papers' thin curves; test error is of the last iterate, once."
)


@dataclass(frozen=True)
class Variant:
    """One of the networks that a study compares.

    Attributes:
        label: what the study calls it.
        net: its name, and `values`, changes to what that stands for.
        printed: the paper's test error for its own network of this kind.
        changes: other values of the recipe.
    """

    label: str
    net: str
    values: Mapping[str, Any] = field(default_factory=dict)
    printed: Printed | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def network(setting: Setting, name: str, depth: int) -> list[Trial]:
    """The runs of one network of the 6n+2 family, by its name, with the warm-up that 2015 gives its deep ones."""
    return setting.trials(name, name, warmup="train-error" if depth >= DEEP else setting.base.warmup)


def error_rows(
    setting: Setting,
    outcomes: Outcomes,
    label: str,
    reference: str,
    printed: Printed | None = None,
    paper: str = "cifar10",
) -> list[Row]:
    """Training and test error of one network, beside another's, seed by seed.

    Args:
        printed: the paper's test error, shown where the data are the paper's.
        paper: the data that the paper's figure is of.
    """
    rows = []
    for figure, verb in FIGURES.items():
        key = figure.replace(" ", "_")
        ours, base = outcomes.by_seed(label, key), outcomes.by_seed(reference, key)
        words = "what the others are compared with"
        if label != reference:
            words = tally(compare(ours, base), label, reference, larger=f"{verb} {WORSE}", smaller=f"{verb} {BETTER}")
        beside = printed if figure == "test error" else None
        if beside and setting.data == paper:
            words += "; beside the paper: " + beside_paper(list(ours.values()), beside.value, setting.share)
        diverged = len(outcomes.of(label)) - len(outcomes.trained(label))
        rows.append(Row(label, figure, tuple(ours.values()), words, beside, setting.share, diverged=diverged))
    return rows


def side_by_side(
    *,
    name: str,
    question: str,
    place: str,
    variants: Callable[[Setting], Sequence[Variant]],
    answer: Callable[[Setting, Outcomes, Sequence[Variant]], tuple[str, str]],
    caption: str,
    extra: Callable[[Setting, Variant], Sequence[Row]] = lambda setting, variant: (),
    remarks: Sequence[str] = (),
) -> Study:
    """A study of several networks, each beside the first.

    Args:
        answer: the verdict, and more of it.
        extra: rows that need no run, such as counts.
    """

    def plan(setting: Setting) -> list[Trial]:
        return [t for v in variants(setting) for t in setting.trials(v.label, v.net, v.values, **v.changes)]

    def read(setting: Setting, outcomes: Outcomes, _: Callable[[int, int], None]) -> Reading:
        chosen = variants(setting)
        first, more = answer(setting, outcomes, chosen)
        rows: list[Row] = []
        for variant in chosen:
            rows += error_rows(setting, outcomes, variant.label, chosen[0].label, variant.printed)
            rows += extra(setting, variant)
        drawn = curves_and_ends(name, [v.label for v in chosen], outcomes, caption)
        return Reading(first, rows, [drawn], more=more, remarks=[TRAINING_ERROR, *remarks], rule=RULE)

    return Study(name, question, place, plan, read)


def curves_and_ends(name: str, labels: Sequence[str], outcomes: Outcomes, caption: str) -> Picture:
    """Error by step of every network (left), and where each ends on the test pictures (right)."""
    colours = dict(zip(labels, drawing.SERIES * 3, strict=False))
    ends = {label: list(outcomes.by_seed(label, "test_error").values()) for label in labels}

    def draw(panels: drawing.Panels) -> None:
        left, right = panels
        top = drawing.learning(left, "error by step", {label: outcomes.of(label) for label in labels}, colours)
        drawing.in_per_cent(left, 1.1 * top)
        drawing.dots(right, "test error, every seed, mean ± sd", ends, list(colours.values()))

    return drawing.picture(
        name,
        "While learning, and at the end",
        draw,
        panels=2,
        height=max(300, 60 + 34 * len(labels)),
        legend=[*drawing.colour_keys(labels), *drawing.LEARNING_KEYS],
        caption=caption,
        label=f"Error by training step, and test error at the end, of {', '.join(labels)}.",
    )


def verdict(outcomes: Outcomes, worse: str, better: str, figure: str, claim: str) -> tuple[str, str]:
    """Whether one network has the larger error, in the words of the rule: "Shown: claim. …", with the tally."""
    key, verb = figure.replace(" ", "_"), FIGURES[figure]
    c = compare(outcomes.by_seed(worse, key), outcomes.by_seed(better, key))
    seen = tally(c, worse, better, larger=f"{verb} {WORSE}", smaller=f"{verb} {BETTER}")
    opening = {
        "shown": "Shown",
        "points to": "These runs point to it, no more",
        "not shown": "Not shown at this budget",
    }
    words = "The contrary is shown, against the claim" if c.reversed.strength == "shown" else opening[c.strength]
    return f"{words}: {claim}.", f"{seen[0].upper()}{seen[1:]}."
