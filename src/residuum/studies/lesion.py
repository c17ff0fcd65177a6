"""Lesion: what a trained net loses with some of its blocks, or when blocks change places.

Not in the two papers: Veit, Wilber, Belongie 2016 (arXiv 1605.06431) asked it of the 2015 paper's CIFAR nets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from residuum.evaluation.evaluate import judge
from residuum.models.bundle import Bundle
from residuum.models.lesion import blocks, movable, swapped, without
from residuum.models.resnet import ResNet
from residuum.runtime import generator
from residuum.studies import drawing, sample
from residuum.studies.degradation import KINDS
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study
from residuum.studies.variants import network
from residuum.studies.verdicts import RULE, compare, of_seeds, tally

PICTURES = {"smoke": 64, "quick": 1_000, "paper": 10_000}  # test pictures for each lesion
DRAWS = 3  # random choices of blocks for each number of them
MOST = 6  # blocks left out, or pairs swapped, at most

COLLAPSE = (
    " A net collapses where leaving out one block (the mean over all of them) takes its error more than half of the way to "
    "that of guessing; its error rises smoothly where no single block does so. Neither is said of a net that is wrong on more "
    "than half as many pictures as guessing is."
)


@dataclass(frozen=True)
class Harm:
    """Errors of one trained net: whole, without each single block, without several, with pairs swapped."""

    whole: float
    single: Mapping[str, float]
    several: Mapping[int, float]  # number of blocks -> mean error over the draws
    swaps: Mapping[int, float]  # number of pairs -> the same

    @property
    def rise(self) -> float:
        """Mean error without one block, above the whole net's."""
        return statistics.fmean(self.single.values()) - self.whole


def depth(setting: Setting) -> int:
    """The deepest of the chosen depths."""
    return setting.chosen(smoke=(14,), quick=(20,), paper=(56,))[-1]


def plan(setting: Setting) -> list[Trial]:
    """A plain net and its residual twin, as the study of degradation has them."""
    layers = depth(setting)
    return [t for kind in KINDS for t in network(setting, f"{kind}{layers}", layers)]


def lesions(net: ResNet, seed: int) -> Iterator[tuple[str, object, ResNet]]:
    """Every lesion: its kind ("single", "several", "swaps"), which or how many, and the twin that has it."""
    names = blocks(net)
    for name in names:
        yield "single", name, without(net, name)
    for count in range(1, min(MOST, len(names)) + 1):
        for draw in range(DRAWS):
            order = torch.randperm(len(names), generator=generator(seed, "lesion", count, draw)).tolist()
            yield "several", count, without(net, [names[i] for i in order[:count]])
    pairs = [(a, b) for stage in movable(net) for i, a in enumerate(stage) for b in stage[i + 1 :]]
    for count in range(1, min(MOST, len(pairs)) + 1):
        for draw in range(DRAWS):
            order = torch.randperm(len(pairs), generator=generator(seed, "swap", count, draw)).tolist()
            yield "swaps", count, swapped(net, [pairs[i] for i in order[:count]])


def harm(bundle: Bundle, setting: Setting, seed: int) -> Harm:
    """Judges a net and all its lesions."""
    split = sample.pictures(setting, PICTURES[setting.budget])
    engine = sample.engine(setting)

    def error(net: ResNet) -> float:
        return judge(net, split, bundle.preprocessing, bundle.classes, engine).top1_error

    single: dict[str, float] = {}
    counted: dict[str, dict[int, list[float]]] = {"several": {}, "swaps": {}}
    for kind, which, twin in lesions(bundle.net, seed):
        if kind == "single":
            single[str(which)] = error(twin)
        else:
            counted[kind].setdefault(int(str(which)), []).append(error(twin))
    several, swaps = ({n: statistics.fmean(e) for n, e in each.items()} for each in counted.values())
    return Harm(error(bundle.net), single, several, swaps)


def read(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> Reading:
    """Plain and residual, seed by seed."""
    plain, residual = (f"{kind}{depth(setting)}" for kind in KINDS)
    found: dict[str, dict[int, Harm]] = {plain: {}, residual: {}}
    every = [o for net in found for o in outcomes.trained(net)]
    for done, outcome in enumerate(every, 1):
        seed = outcome.trial.recipe.seed
        found[outcome.trial.label][seed] = harm(outcome.bundle(), setting, seed)
        tell(done, len(every))
    guess = 1 - 1 / len(setting.source.classes)
    rises = {net: {seed: each.rise for seed, each in harms.items()} for net, harms in found.items()}
    c = compare(rises[plain], rises[residual])
    words = tally(c, plain, residual, larger="loses more by one block than", smaller="loses less by one block than")
    return Reading(
        answer=f"{fate(found[plain], plain, guess)} {fate(found[residual], residual, guess)}",
        more=f"{words[0].upper()}{words[1:]}.",
        rows=rows(setting, found, words),
        pictures=[picture(found)],
        rule=RULE + COLLAPSE,
        remarks=[
            f"Each lesion is judged on {PICTURES[setting.budget]:,} test pictures at most; nothing is chosen by it.",
            "A plain net's blocks that change the map's size cannot be left out.",
            "Veit et al. left out units of a 110-layer net.",
        ],
    )


def fate(harms: Mapping[int, Harm], net: str, guess: float) -> str:
    """What becomes of a net, by the stated rule."""
    if not harms:
        return f"No run of {net} ended with weights."
    if poor := [h for h in harms.values() if h.whole > guess / 2]:
        where = f"its error is above {guess / 2:.0%} in {of_seeds(len(poor), len(harms))}"
        return f"{net} has learnt too little to lose much: {where}."
    collapsed = sum(h.rise > (guess - h.whole) / 2 for h in harms.values())
    smooth = sum(max(h.single.values()) <= h.whole + (guess - h.whole) / 2 for h in harms.values())
    n = len(harms)
    if collapsed == n:
        return f"{net} collapses without one block in {of_seeds(n, n)}."
    if smooth == n:
        return f"{net}'s error rises smoothly in {of_seeds(n, n)}."
    return f"{net} collapses in {collapsed} and rises smoothly in {of_seeds(smooth, n)}."


def rows(setting: Setting, found: Mapping[str, Mapping[int, Harm]], words: str) -> list[Row]:
    """The whole net, without one block, without most, with pairs swapped."""
    made = []
    for net, harms in found.items():
        figures: list[tuple[str, list[float]]] = [
            ("test error, whole", [h.whole for h in harms.values()]),
            ("test error without one block, mean", [statistics.fmean(h.single.values()) for h in harms.values()]),
            ("test error without one block, worst", [max(h.single.values()) for h in harms.values()]),
        ]
        for kind, label in (("several", "test error without {} blocks"), ("swaps", "test error with {} pairs swapped")):
            counts = sorted({n for h in harms.values() for n in getattr(h, kind)})
            figures += [
                (label.format(n), [getattr(h, kind)[n] for h in harms.values()]) for n in counts if n in (2, 4, 6)
            ]
        for figure, values in figures:
            verdict = words if "mean" in figure else "a measurement, no claim"
            made.append(Row(net, figure, tuple(values), verdict, None, setting.share))
    return made


def picture(found: Mapping[str, Mapping[int, Harm]]) -> drawing.Picture:
    """Error without each single block, without several, and with pairs swapped (Veit et al. Fig. 3 and 5)."""
    colours = dict(zip(found, (drawing.SERIES[1], drawing.SERIES[0]), strict=True))

    def draw(panels: drawing.Panels) -> None:
        titles = ("one block left out", "several left out", "pairs swapped")
        for axes, kind, title in zip(panels, ("single", "several", "swaps"), titles, strict=True):
            for net, harms in found.items():
                if harms:
                    axes.plot(*_curve(list(harms.values()), kind), "o-", color=colours[net])
            drawing.head(axes, title, "block" if kind == "single" else "how many")
            drawing.in_per_cent(axes, 1.0)

    return drawing.picture(
        "lesion",
        "Error after lesions",
        draw,
        panels=3,
        height=280,
        legend=[drawing.Key(net, f"--series-{i}") for net, i in zip(found, (1, 0), strict=True)],
        caption="Means over seeds. Blocks count from the stem; a gap is a block that a plain net cannot do without.",
        label="Error of a plain and a residual net after lesions.",
    )


def _curve(harms: Sequence[Harm], kind: str) -> tuple[list[float], list[float]]:
    if kind == "single":
        names = list(harms[0].single)
        stages = [sum(n.startswith(f"layer{s}.") for n in names) for s in (1, 2, 3)]
        size = max(stages)  # blocks in a stage; a plain net lacks the first of some
        places = [(int(n[5]) - 1) * size + int(n.split(".")[1]) + 1 for n in names]
        return [float(p) for p in places], [statistics.fmean(h.single[n] for h in harms) for n in names]
    counts = sorted(getattr(harms[0], kind))
    means = [statistics.fmean(getattr(h, kind)[n] for h in harms) for n in counts]
    whole = statistics.fmean(h.whole for h in harms)
    return [0.0, *map(float, counts)], [whole, *means]


STUDY = Study(
    name="lesion",
    question="What does a trained net lose with one of its blocks?",
    place="Veit et al. 2016, of 2015's nets",
    plan=plan,
    read=read,
)
