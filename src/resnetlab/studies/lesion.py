"""Lesion: the error of a trained net without some of its blocks, or with blocks swapped.

Not in the two papers: Veit, Wilber and Belongie 2016 (arXiv 1605.06431) did this with the 2015 paper's CIFAR nets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from resnetlab.device import select_device
from resnetlab.evaluation.metrics import evaluate_errors
from resnetlab.models.lesion import movable_blocks, removable_blocks, remove_blocks, swap_blocks
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import ResNet
from resnetlab.random import make_generator
from resnetlab.studies import figures
from resnetlab.studies.degradation import KINDS
from resnetlab.studies.probe_images import select_probe_images
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.variants import network_trials
from resnetlab.studies.verdicts import RULE, Difference, compare_by_seed, describe, format_seeds

IMAGES = {"smoke": 64, "quick": 1_000, "paper": 10_000}  # test images for each lesion
DRAWS = 3  # random choices of blocks for each number of them
MAX_LESIONS = 6  # blocks left out, or pairs swapped

COLLAPSE = (
    " A net collapses where leaving out one block (the mean over all of them) raises its error more than half of the way to "
    "that of guessing; its error rises smoothly where no single block does so. There is no verdict on a net whose error is "
    "more than half of that of guessing."
)


@dataclass(frozen=True)
class LesionErrors:
    """Errors of one trained net: intact, without each single block, without several, with pairs swapped."""

    intact: float
    single: Mapping[str, float]
    several: Mapping[int, float]  # number of blocks -> mean error over the draws
    swaps: Mapping[int, float]  # number of pairs -> mean error over the draws

    @property
    def rise(self) -> float:
        """Mean error without one block, minus the intact net's."""
        return statistics.fmean(self.single.values()) - self.intact


class Lesion(Study):
    """A plain net and its residual twin, with every lesion."""

    name = "lesion"
    question = "What does a trained net lose with one of its blocks?"
    place = "Veit et al. 2016, of 2015's nets"

    def depth(self, setting: Setting) -> int:
        """The deepest of the depths."""
        return setting.pick_depths(smoke=(14,), quick=(20,), paper=(56,))[-1]

    def plan(self, setting: Setting) -> list[Trial]:
        """Both nets, as the study of degradation has them."""
        return network_trials(setting, *(f"{kind}{self.depth(setting)}" for kind in KINDS))

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Plain compared with residual, seed by seed."""
        plain, residual = (f"{kind}{self.depth(setting)}" for kind in KINDS)
        errors: dict[str, dict[int, LesionErrors]] = {plain: {}, residual: {}}
        trained = [o for net in errors for o in outcomes.trained(net)]
        for done, outcome in enumerate(trained, 1):
            errors[outcome.trial.label][outcome.seed] = measure_lesions(outcome.load_model(), setting, outcome.seed)
            on_progress(done, len(trained))
        guess = 1 - 1 / len(setting.source.classes)
        rises = {net: {seed: each.rise for seed, each in by_seed.items()} for net, by_seed in errors.items()}
        difference = compare_by_seed(rises[plain], rises[residual])
        verbs = {"larger": "loses more by one block than", "smaller": "loses less by one block than"}
        text = describe(difference, plain, residual, **verbs)
        return StudyResult(
            answer=" ".join(
                f"{lesion_verdict(by_seed, net, guess).removesuffix('.')}{setting.condition}."
                for net, by_seed in errors.items()
            ),
            details=f"{text[0].upper()}{text[1:]}.",
            rows=lesion_rows(setting, errors, text, (residual, difference)),
            figures=[draw_lesion_errors(errors)],
            rule=RULE + COLLAPSE,
            remarks=[
                *setting.measuring_remarks,
                f"Each lesion is evaluated on {IMAGES[setting.budget]:,} test images at most; nothing is chosen by it.",
                "A plain net's blocks that change the map's size cannot be left out.",
                "Veit et al. left out units of a 110-layer net.",
            ],
        )


def generate_lesions(net: ResNet, seed: int) -> Iterator[tuple[str, object, ResNet]]:
    """Every lesion: its kind ("single", "several", "swaps"), which or how many, and the net that has it."""
    names = removable_blocks(net)
    for name in names:
        yield "single", name, remove_blocks(net, name)
    for count in range(1, min(MAX_LESIONS, len(names)) + 1):
        for draw in range(DRAWS):
            order = torch.randperm(len(names), generator=make_generator(seed, "lesion", count, draw)).tolist()
            yield "several", count, remove_blocks(net, [names[i] for i in order[:count]])
    pairs = [pair for stage in movable_blocks(net) for pair in combinations(stage, 2)]
    for count in range(1, min(MAX_LESIONS, len(pairs)) + 1):
        for draw in range(DRAWS):
            order = torch.randperm(len(pairs), generator=make_generator(seed, "swap", count, draw)).tolist()
            yield "swaps", count, swap_blocks(net, [pairs[i] for i in order[:count]])


def measure_lesions(model: TrainedModel, setting: Setting, seed: int) -> LesionErrors:
    """Evaluates a net and all its lesions."""
    split = select_probe_images(setting, IMAGES[setting.budget])
    device_config = select_device(setting.measuring_precision, setting.device)

    def error(net: ResNet) -> float:
        return evaluate_errors(net, split, model.preprocessing, device_config)["top1_error"]

    single: dict[str, float] = {}
    repeated: dict[str, dict[int, list[float]]] = {"several": {}, "swaps": {}}
    for kind, which, net in generate_lesions(model.resnet, seed):
        if kind == "single":
            single[str(which)] = error(net)
        else:
            repeated[kind].setdefault(int(str(which)), []).append(error(net))
    several, swaps = ({n: statistics.fmean(e) for n, e in each.items()} for each in repeated.values())
    return LesionErrors(error(model.resnet), single, several, swaps)


def lesion_verdict(errors: Mapping[int, LesionErrors], net: str, guess: float) -> str:
    """The verdict on a net, by the stated rule; `guess` is the error of guessing."""
    n = len(errors)
    if not errors:
        return f"No run of {net} ended with weights."
    if poor := [e for e in errors.values() if e.intact > guess / 2]:
        where = f"its error is above {guess / 2:.0%} in {format_seeds(len(poor), n)}"
        return f"{net} has learnt too little to lose much: {where}."
    collapsed = sum(e.rise > (guess - e.intact) / 2 for e in errors.values())
    smooth = sum(max(e.single.values()) <= e.intact + (guess - e.intact) / 2 for e in errors.values())
    if collapsed == n:
        return f"{net} collapses without one block in {format_seeds(n, n)}."
    if smooth == n:
        return f"{net}'s error rises smoothly in {format_seeds(n, n)}."
    return f"{net} collapses in {collapsed} and rises smoothly in {format_seeds(smooth, n)}."


def lesion_rows(
    setting: Setting, errors: Mapping[str, Mapping[int, LesionErrors]], text: str, compared: tuple[str, Difference]
) -> list[Row]:
    """The intact net, without one block, without several, with pairs swapped."""
    rows = []
    for net, by_seed in errors.items():
        each = list(by_seed.values())
        measured: list[tuple[str, list[float]]] = [
            ("test error, intact", [e.intact for e in each]),
            ("test error without one block, mean", [statistics.fmean(e.single.values()) for e in each]),
            ("test error without one block, worst", [max(e.single.values()) for e in each]),
        ]
        for kind, label in (("several", "test error without {} blocks"), ("swaps", "test error with {} pairs swapped")):
            counts = sorted({n for e in each for n in getattr(e, kind)})
            measured += [(label.format(n), [getattr(e, kind)[n] for e in each]) for n in counts if n in (2, 4, 6)]
        for figure, values in measured:
            verdict = text if "mean" in figure else "a measurement, no claim"
            against = compared if "mean" in figure and net != compared[0] else None
            rows.append(Row(net, figure, tuple(values), verdict, None, setting.share, compared=against))
    return rows


def draw_lesion_errors(errors: Mapping[str, Mapping[int, LesionErrors]]) -> figures.StudyFigure:
    """Error without each single block, without several, and with pairs swapped (Veit et al. Fig. 3 and 5)."""
    colours = dict(zip(errors, (figures.SERIES[1], figures.SERIES[0]), strict=True))

    def draw(panels: figures.Panels) -> None:
        titles = ("one block left out", "several left out", "pairs swapped")
        for axes, kind, title in zip(panels, ("single", "several", "swaps"), titles, strict=True):
            ends = {}
            for net, by_seed in errors.items():
                if by_seed:
                    x, y = _lesion_curve(list(by_seed.values()), kind)
                    axes.plot(x, y, "o-", color=colours[net])
                    ends[net] = y[-1], colours[net]
            figures.set_titles(axes, title, "block" if kind == "single" else "how many")
            figures.set_error_axis(axes, 1.0)
            figures.label_curves(axes, ends)

    return figures.draw_study_figure(
        "lesion",
        draw,
        figures.FigureText(
            "Error after lesions",
            "Means over seeds. Blocks count from the stem; a gap is a block that cannot be left out of a plain net.",
            "Error of a plain and a residual net after lesions.",
        ),
        figures.PanelLayout(panels=3, height=280, right=figures.LABEL),
    )


def _lesion_curve(errors: Sequence[LesionErrors], kind: str) -> tuple[list[float], list[float]]:
    if kind == "single":
        names = list(errors[0].single)
        stages = [sum(n.startswith(f"layer{s}.") for n in names) for s in (1, 2, 3)]
        size = max(stages)  # blocks in a stage; a plain net lacks the first of some
        positions = [(int(n[5]) - 1) * size + int(n.split(".")[1]) + 1 for n in names]
        return [float(p) for p in positions], [statistics.fmean(e.single[n] for e in errors) for n in names]
    counts = sorted(getattr(errors[0], kind))
    means = [statistics.fmean(getattr(e, kind)[n] for e in errors) for n in counts]
    intact = statistics.fmean(e.intact for e in errors)
    return [0.0, *map(float, counts)], [intact, *means]
