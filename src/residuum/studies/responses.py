"""Responses: how strongly each layer answers, in plain and residual nets (2015 §4.2, Fig. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from residuum.models.probing import responses
from residuum.studies import drawing, sample
from residuum.studies.degradation import KINDS, depths, plan
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.study import Reading, Row, Study
from residuum.studies.verdicts import RULE, compare, mean_sd, tally

PICTURES = 512

Layers = dict[int, list[float]]  # seed -> a deviation for each layer


def measured(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> dict[str, Layers]:
    """network -> seed -> the deviation of each layer's response, in the order of the forward pass."""
    shown = sample.pictures(setting, PICTURES)
    found: dict[str, Layers] = {}
    every = [o for o in outcomes.all if not o.diverged]
    for done, outcome in enumerate(every, 1):
        bundle = outcome.bundle()
        x, _ = sample.inputs(bundle, shown)
        found.setdefault(outcome.trial.label, {})[outcome.trial.recipe.seed] = list(responses(bundle.net, x).values())
        tell(done, len(every))
    return found


def read(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> Reading:
    """The mean over layers, residual beside plain of equal depth, and deep beside shallow."""
    found = measured(setting, outcomes, tell)
    means = {net: {seed: sum(layers) / len(layers) for seed, layers in each.items()} for net, each in found.items()}
    chosen = depths(setting)
    rows, shown = [], []
    words = {"larger": "responds more strongly than", "smaller": "responds less strongly than"}
    for depth in chosen:
        plain, residual = (f"{kind}{depth}" for kind in KINDS)
        c = compare(means.get(plain, {}), means.get(residual, {}))
        shown.append(c.strength)
        for net in (plain, residual):
            seen = tally(c, plain, residual, **words)
            rows.append(Row(net, "mean response over layers", values(means, net), seen, None, setting.share, "number"))
    shallow, deep = f"resnet{chosen[0]}", f"resnet{chosen[-1]}"
    deeper = compare(means.get(shallow, {}), means.get(deep, {}))
    count = sum(strength == "shown" for strength in shown)
    return Reading(
        answer=f"Residual nets are shown to respond less strongly than plain ones at {count} of {len(chosen)} depths.",
        more=f"With depth: {tally(deeper, shallow, deep, **words)}.",
        rows=rows,
        pictures=[picture(found, chosen)],
        rule=RULE + " The figure compared is a net's mean over its layers of the deviation of a layer's response.",
        remarks=[
            f"Deviations are taken over all elements of BN's output in eval mode, on {PICTURES} test pictures at most.",
            "The paper does not say over what it took them, and prints no numbers, only the figure.",
        ],
    )


def values(means: dict[str, dict[int, float]], net: str) -> tuple[float, ...]:
    """A net's figures in the order of seeds."""
    return tuple(value for _, value in sorted(means.get(net, {}).items()))


def picture(found: dict[str, Layers], chosen: Sequence[int]) -> drawing.Picture:
    """Original order above, sorted below (2015 Fig. 7); plain dashed, residual solid, means over seeds."""
    nets = [f"{kind}{depth}" for kind in KINDS for depth in chosen if f"{kind}{depth}" in found]
    colours = dict(zip(nets, drawing.SERIES * 3, strict=False))

    def draw(panels: drawing.Panels) -> None:
        arrange: Sequence[tuple[str, Callable[[list[float]], list[float]]]] = (
            ("layers in their order", list),
            ("layers sorted, the strongest first", partial(sorted, reverse=True)),
        )
        for axes, (title, order) in zip(panels, arrange, strict=True):
            for net in nets:
                layers = order([mean_sd(list(values))[0] for values in zip(*found[net].values(), strict=True)])
                axes.plot(
                    range(1, len(layers) + 1),
                    layers,
                    "--" if net.startswith("plain") else "-",
                    color=colours[net],
                    marker=".",
                    linewidth=1.4,
                )
            axes.set_ylim(bottom=0)
            drawing.head(axes, title, "layer")

    return drawing.picture(
        "responses",
        "Standard deviation of layer responses",
        draw,
        panels=2,
        rows=2,
        height=260,
        legend=drawing.colour_keys(nets),
        caption="As 2015 Fig. 7: BN's output, before nonlinearity and addition; a point is a 3x3 layer. Plain nets are dashed.",
        label="Standard deviation of each layer's response, in original order and sorted.",
    )


STUDY = Study(
    name="responses",
    question="Do residual nets change their signal less than plain ones, layer by layer?",
    place="2015 Fig. 7",
    plan=plan,
    read=read,
)
