"""Studies that compare several networks side by side: the runs of a network, its rows, a figure of all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from resnetlab.studies import figures
from resnetlab.studies.figures import StudyFigure
from resnetlab.studies.paper import PublishedFigure
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.twins import are_twins
from resnetlab.studies.verdicts import PairedDifference, compare_by_seed, compare_with_paper, tally

DEEP = 110  # a residual net of this depth or more needs a warm-up (2015 §4.2)
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
        label: the study's label for it.
        net: its name, and `values`, changes to the specification of that name.
        printed: the paper's test error for its own network of this kind.
        changes: other values of the recipe.
    """

    label: str
    net: str
    values: Mapping[str, Any] = field(default_factory=dict)
    printed: PublishedFigure | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


class SideBySide(Study):
    """A study of several networks, each compared with the first.

    Attributes:
        caption: of the figure.
        remarks: sentences below the table.
        claimed: labels of the networks that the answer compares; they stay where another is the same function.
    """

    caption: ClassVar[str]
    remarks: ClassVar[Sequence[str]] = ()
    claimed: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def variants(self, setting: Setting) -> list[Variant]:
        """The networks; the first is what the others are compared with."""

    @abstractmethod
    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """The verdict in one sentence, and details."""

    def count_rows(self, setting: Setting, variant: Variant) -> Sequence[Row]:
        """Rows that need no run, such as counts of parameters."""
        return ()

    def drop_twins(self, setting: Setting) -> tuple[list[Variant], list[str]]:
        """The variants that are different functions, and a sentence about each that is left out."""
        variants = self.variants(setting)
        specs = {v.label: setting.spec(setting.trials(v.label, v.net, v.values)[0].recipe) for v in variants}
        kept: list[str] = []
        left_out = []
        for variant in sorted(variants, key=lambda v: v.label not in self.claimed):
            twin = next((label for label in kept if are_twins(specs[label], specs[variant.label])), None)
            if twin is None:
                kept.append(variant.label)
            else:
                same = f"in {variant.net} it is the same function as {twin}"
                left_out.append(f"{variant.label} is left out: {same}; deeper nets tell them apart.")
        return [v for v in variants if v.label in kept], left_out

    def plan(self, setting: Setting) -> list[Trial]:
        """The runs of every variant."""
        variants, _ = self.drop_twins(setting)
        return [t for v in variants for t in setting.trials(v.label, v.net, v.values, **v.changes)]

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """The errors of every variant, and where they end."""
        variants, left_out = self.drop_twins(setting)
        answer, details = self.answer(setting, outcomes, variants)
        rows: list[Row] = []
        for variant in variants:
            rows += error_rows(setting, outcomes, variant.label, variants[0].label, variant.printed)
            rows += self.count_rows(setting, variant)
        figure = draw_curves_and_ends(self.name, [v.label for v in variants], outcomes, self.caption)
        return StudyResult(answer, rows, [figure], details, remarks=[*left_out, TRAINING_ERROR, *self.remarks])


def network_trials(setting: Setting, name: str, depth: int) -> list[Trial]:
    """The runs of one CIFAR net, by its name, with the warm-up that 2015 gives its deep ones."""
    return setting.trials(name, name, warmup="train-error" if depth >= DEEP else setting.base.warmup)


def error_rows(
    setting: Setting,
    outcomes: RunOutcomes,
    label: str,
    reference: str,
    printed: PublishedFigure | None = None,
    paper: str = "cifar10",
) -> list[Row]:
    """Training and test error of one network, compared with another's seed by seed.

    Args:
        printed: the paper's test error, shown where the data are the paper's.
        paper: the data of the paper's figure.
    """
    rows = []
    for figure, verb in FIGURES.items():
        key = figure.replace(" ", "_")
        errors, base = outcomes.by_seed(label, key), outcomes.by_seed(reference, key)
        text = "what the others are compared with"
        if label != reference:
            text = tally_errors(compare_by_seed(errors, base), label, reference, verb)
        published = printed if figure == "test error" else None
        if published and setting.data == paper:
            text += "; beside the paper: " + compare_with_paper(list(errors.values()), published.value, setting.share)
        diverged = len(outcomes.of(label)) - len(outcomes.trained(label))
        rows.append(Row(label, figure, tuple(errors.values()), text, published, setting.share, diverged=diverged))
    return rows


def tally_errors(difference: PairedDifference, a: str, b: str, verb: str = "trains") -> str:
    """In how many seeds network `a` has the larger error: "plain56 trains worse than plain20 in 5 of 5 seeds"."""
    return tally(difference, a, b, larger=f"{verb} {WORSE}", smaller=f"{verb} {BETTER}")


def draw_curves_and_ends(name: str, labels: Sequence[str], outcomes: RunOutcomes, caption: str) -> StudyFigure:
    """Error by step of every network (left), and the test errors at the end (right)."""
    colours = dict(zip(labels, figures.SERIES * 3, strict=False))
    ends = {label: list(outcomes.by_seed(label, "test_error").values()) for label in labels}

    def draw(panels: figures.Panels) -> None:
        left, right = panels
        top = figures.plot_learning(left, "error by step", {label: outcomes.of(label) for label in labels}, colours)
        figures.set_error_axis(left, 1.1 * top)
        figures.plot_dots(right, "test error, every seed, mean ± sd", ends, list(colours.values()))

    return figures.draw_study_figure(
        name,
        draw,
        figures.FigureText(
            "While learning, and at the end",
            caption,
            f"Error by training step, and test error at the end, of {', '.join(labels)}.",
        ),
        figures.PanelLayout(panels=2, height=max(300, 60 + 34 * len(labels))),
        legend=[*figures.colour_keys(labels), *figures.LEARNING_KEYS],
    )


def assess_claim(outcomes: RunOutcomes, worse: str, better: str, claim: str) -> tuple[str, str]:
    """Whether one network has the larger test error, in the words of the rule: "Shown: claim. …", with the tally."""
    difference = compare_by_seed(outcomes.by_seed(worse, "test_error"), outcomes.by_seed(better, "test_error"))
    text = tally_errors(difference, worse, better, "tests")
    openings = {
        "shown": "Shown",
        "points to": "These runs point to it, no more",
        "not shown": "Not shown at this budget",
    }
    opening = openings[difference.strength]
    if difference.reversed.strength == "shown":
        opening = "The contrary is shown, against the claim"
    return f"{opening}: {claim}.", f"{text[0].upper()}{text[1:]}."
