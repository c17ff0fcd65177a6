"""Studies that compare several networks side by side: the runs of a network, its rows, a figure of all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from resnetlab.formatting import format_percent
from resnetlab.models.cost import Cost, compute_cost
from resnetlab.models.spec import get_specification
from resnetlab.studies import figures
from resnetlab.studies.figures import StudyFigure
from resnetlab.studies.paper import NO_FIGURE, find_printed, length_share
from resnetlab.studies.runs import RunOutcome, RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import PaperFigure, Row, Study, StudyResult
from resnetlab.studies.twins import are_twins
from resnetlab.studies.verdicts import (
    FAIL,
    PairedDifference,
    compare_by_seed,
    compare_with_paper,
    describe,
    difference_from_printed,
)

DEEP = 110  # a residual net of this depth or more needs a warm-up (2015 §4.2)
WARMUP_2016 = {"warmup": "steps"}  # 2016, appendix: 0.01 for the first 400 steps of all CIFAR runs
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
        changes: other values of the recipe.
    """

    label: str
    net: str
    values: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)


class SideBySide(Study):
    """A study of several networks, each compared with a reference, as a rule the first.

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

    def reference(self, label: str, variants: Sequence[Variant]) -> str:
        """The network that one is compared with: the first."""
        return variants[0].label

    def count_rows(self, setting: Setting, variant: Variant) -> Sequence[Row]:
        """Rows that need no run, such as counts of parameters."""
        return ()

    def drop_twins(self, setting: Setting) -> tuple[list[Variant], list[str]]:
        """The variants that are different functions, and a sentence about each that is left out."""
        variants = self.variants(setting)
        specs = {v.label: setting.spec(setting.trials(v.label, v.net, v.values)[0].recipe) for v in variants}
        changes = {v.label: v.changes for v in variants}
        kept: list[str] = []
        left_out = []
        for variant in sorted(variants, key=lambda v: v.label not in self.claimed):
            twin = next(
                (k for k in kept if changes[k] == variant.changes and are_twins(specs[k], specs[variant.label])), None
            )
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
            rows += error_rows(setting, outcomes, variant.label, self.reference(variant.label, variants))
            rows += self.count_rows(setting, variant)
        references = {v.label: self.reference(v.label, variants) for v in variants}
        figure = draw_curves_and_ends(self.name, references, outcomes, self.caption)
        return StudyResult(answer, rows, [figure], details, remarks=[*left_out, TRAINING_ERROR, *self.remarks])


def warmup_2015(setting: Setting, depth: int) -> dict[str, Any]:
    """The warm-up that 2015 gives its deep nets: at a lower rate until the training error is below 80 %."""
    return {"warmup": "train-error" if depth >= DEEP else setting.base.warmup}


def count_cost(setting: Setting, variant: Variant) -> Cost:
    """Parameters and multiply-adds of a trained net."""
    recipe = setting.trials(variant.label, variant.net, variant.values)[0].recipe
    return compute_cost(setting.spec(recipe), (recipe.image_size, recipe.image_size))


def network_trials(setting: Setting, *names: str) -> list[Trial]:
    """The runs of CIFAR nets, by their names, with the warm-up that 2015 gives its deep ones."""
    return [t for n in names for t in setting.trials(n, n, **warmup_2015(setting, get_specification(n).depth))]


def error_rows(setting: Setting, outcomes: RunOutcomes, label: str, reference: str) -> list[Row]:
    """Training and test error of one network, compared with another's seed by seed and with what the papers print for it."""
    rows, runs = [], outcomes.of(label)
    share = setting.share * (runs[0].trial.recipe.steps / setting.base.steps if runs else 1)
    for figure, verb in FIGURES.items():
        key = figure.replace(" ", "_")
        errors, base = outcomes.by_seed(label, key), outcomes.by_seed(reference, key)
        text, compared = "what the others are compared with", None
        if label != reference:
            difference = compare_by_seed(errors, base)
            text, compared = describe_errors(difference, label, reference, verb), (reference, difference)
        row = Row(label, figure, tuple(errors.values()), text, None, share, compared=compared)
        rows += beside_paper(row, setting, runs) if figure == "test error" else [row]
    return rows


def beside_paper(
    row: Row, setting: Setting, outcomes: Sequence[RunOutcome], protocol: str = "1crop", rank: str = "top1"
) -> list[Row]:
    """A row of test errors for each error that the papers print for exactly this network, data, training and test.

    Where they print none, the one row says so. A second one of a network (the best of five) has a row of its own.

    Args:
        rank: "top1" or "top5".
    """
    rows: list[Row] = []
    diverged = sum(bool(outcome.diverged) for outcome in outcomes)
    for printed in find_printed(setting, outcomes[0].trial.recipe, protocol) if outcomes else []:
        value = getattr(printed, rank)
        if rank == "top5" and value is None:
            continue
        share = length_share(outcomes[0].trial.recipe, printed)
        fail, statistic = printed.above or FAIL, printed.statistic
        text = compare_with_paper(row.values, value, share, fail=fail, statistic=statistic, diverged=diverged)
        away = None
        if value is not None and abs(share - 1) < 0.001 and not diverged:
            away = difference_from_printed(row.values, value, printed.runs, statistic)
        text = f"beside the paper: {text}" + (f" ({away.describe()})" if away else "")
        above = f"above {format_percent(printed.above, 0)}: " if printed.above else ""
        beside = replace(
            row, paper=PaperFigure(value, f"{above}{printed.source}, {statistic}"), budget=share, from_paper=away
        )
        if rows:
            values = (min(row.values),) if row.values and statistic.startswith("best") else row.values
            beside = replace(
                beside, figure=f"{row.figure}, beside the {statistic}", values=values, verdict=text, compared=None
            )
        else:
            beside = replace(beside, verdict=f"{row.verdict}; {text}")
        rows.append(beside)
    return rows or [replace(row, paper=PaperFigure(None, NO_FIGURE))]


def describe_errors(difference: PairedDifference, a: str, b: str, verb: str = "trains") -> str:
    """In how many seeds network `a` has the larger error, and by how much: "plain56 trains worse than plain20 in …"."""
    return describe(difference, a, b, larger=f"{verb} {WORSE}", smaller=f"{verb} {BETTER}")


def draw_curves_and_ends(name: str, references: Mapping[str, str], outcomes: RunOutcomes, caption: str) -> StudyFigure:
    """Error by step, a panel for each network beside its reference (2016 Fig. 3), and a last one of the errors at the end."""
    labels = list(references)
    pairs = [[reference, label] for label, reference in references.items() if label != reference] or [labels]
    ends = {label: list(outcomes.by_seed(label, "test_error").values()) for label in labels}

    def draw(panels: figures.Panels) -> None:
        figures.plot_panels(
            panels[:-1], [pair[-1] for pair in pairs], [{label: outcomes.of(label) for label in pair} for pair in pairs]
        )
        colours = [figures.SERIES[references[label] != label] for label in labels]
        figures.plot_dots(panels[-1], "test error, every seed, mean ± sd", ends, colours)

    return figures.draw_study_figure(
        name,
        draw,
        figures.FigureText(
            "While learning, and at the end",
            caption,
            f"Error by training step, and test error at the end, of {', '.join(labels)}.",
        ),
        figures.PanelLayout(len(pairs) + 1, -(-(len(pairs) + 1) // 2), max(260, 60 + 34 * len(labels)), figures.LABEL),
        legend=figures.LEARNING_KEYS,
    )


def assess_claim(setting: Setting, outcomes: RunOutcomes, worse: str, better: str, claim: str) -> tuple[str, str]:
    """Whether one network has the larger test error, in the words of the rule: "Shown: claim. …", with the tally."""
    difference = compare_by_seed(outcomes.by_seed(worse, "test_error"), outcomes.by_seed(better, "test_error"))
    text = describe_errors(difference, worse, better, "tests")
    return f"{open_claim(difference, setting)}: {claim}.", f"{text[0].upper()}{text[1:]}."


def open_claim(difference: PairedDifference, setting: Setting) -> str:
    """How a sentence about a claim begins, with what the runs' length takes from it: "Shown after 300 steps (…)"."""
    opening = {"shown": "Shown", "points to": "These runs point to it, no more,", "not shown": "Not shown"}[
        difference.strength
    ]
    if difference.reversed.strength == "shown":
        opening = "The contrary of this is shown"
    return opening + setting.condition if setting.condition else opening.removesuffix(",")
