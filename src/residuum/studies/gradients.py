"""Gradients: degradation is not vanishing (2015 §4.1), and what identity shortcuts do to signals (2016 §2, eq. 4 and 5)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from residuum.models.probing import Identity, Signal, identities, signals
from residuum.models.resnet import assemble
from residuum.runtime import seed_for
from residuum.studies import drawing, sample
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study
from residuum.studies.variants import network
from residuum.studies.verdicts import SEEDS, of_seeds

PICTURES = 128  # in the batch that is sent through
LEAST_VARIANCE = 0.01  # of a healthy layer's BN output, which has variance 1 at the start
SPREAD = 100  # times the median: how far a healthy layer's gradient may lie from it, either way
EXACT = 1e-12  # of the largest value: rounding of float64 over some dozen additions

HEALTHY = (
    f"A layer is healthy where the variance of its BN output is at least {LEAST_VARIANCE} and the norm of the gradient there "
    f"lies within a factor of {SPREAD} of the median layer's. The identity holds where x_L - x_l and the sum of F differ by "
    f"less than {EXACT:g} of the largest value, in float64. Either is said of a net where it is so in every layer, or unit, of "
    "every seed."
)


@dataclass(frozen=True)
class Flow:
    """The signals of one run, at its start and when trained."""

    before: list[Signal]
    after: list[Signal]


def depth(setting: Setting) -> int:
    """The deepest of the chosen depths."""
    return setting.chosen(smoke=(8,), quick=(56,), paper=(56,))[-1]


def plan(setting: Setting) -> list[Trial]:
    """A deep plain net, its residual twin, and the same with full pre-activation."""
    layers = depth(setting)
    return [t for kind in ("plain", "resnet", "preresnet") for t in network(setting, f"{kind}{layers}", layers)]


def read(setting: Setting, outcomes: Outcomes, tell: Callable[[int, int], None]) -> Reading:
    """Health of every layer, at the start and trained; the identity in the residual nets."""
    shown = sample.pictures(setting, PICTURES)
    layers = depth(setting)
    plain, residual, preact = (f"{kind}{layers}" for kind in ("plain", "resnet", "preresnet"))
    every = [o for net in (plain, residual, preact) for o in outcomes.trained(net)]
    flows: dict[str, list[Flow]] = {plain: [], residual: [], preact: []}
    units: dict[str, list[list[Identity]]] = {residual: [], preact: []}
    for done, outcome in enumerate(every, 1):
        bundle = outcome.bundle()
        x, labels = sample.inputs(bundle, shown)
        fresh = assemble(bundle.spec, init=outcome.trial.recipe.init, seed=seed_for(outcome.trial.recipe.seed, "init"))
        flow = Flow(signals(fresh, x, labels), signals(bundle.net, x, labels))
        flows[outcome.trial.label].append(flow)
        if outcome.trial.label in units:
            units[outcome.trial.label].append(identities(bundle.net, x[:32], labels[:32]))
        tell(done, len(every))
    return Reading(
        answer=f"{health(flows[plain], plain)} {identity(units[preact], preact)}",
        more="So degradation of the plain net, where there is any, does not come from vanishing signals."
        if sick(flows[plain]) == 0 and len(flows[plain]) >= SEEDS
        else "",
        rows=[*signal_rows(setting, flows), *identity_rows(setting, units)],
        pictures=[signal_picture(flows), identity_picture(units)],
        rule=HEALTHY,
        remarks=[
            f"One batch of {PICTURES} test pictures (at most), BN with the statistics of that batch, fp32.",
            "Gradient norms are those of the loss of one picture at each BN's output, averaged over pictures.",
            "The identity is measured in float64 with 32 pictures.",
        ],
    )


def healthy(flow: Sequence[Signal]) -> list[bool]:
    """Layer by layer, by the stated rule."""
    middle = statistics.median(s.gradient for s in flow)
    return [
        s.variance >= LEAST_VARIANCE and middle / SPREAD <= s.gradient <= middle * SPREAD and s.gradient > 0
        for s in flow
    ]


def sick(flows: Sequence[Flow]) -> int:
    """Layers that are not healthy, over all seeds, at the start and trained."""
    return sum(not good for flow in flows for part in (flow.before, flow.after) for good in healthy(part))


def health(flows: Sequence[Flow], net: str) -> str:
    """The verdict on a net's signals."""
    if not flows:
        return f"No run of {net} ended with weights to look into."
    layers = sum(len(flow.before) + len(flow.after) for flow in flows)
    ill = sick(flows)
    if not ill:
        return f"All layers of {net} are healthy, at the start and trained, in {of_seeds(len(flows), len(flows))}."
    return f"{ill:,} of {layers:,} layers of {net} are not healthy (start and end of {len(flows)} seeds)."


def identity(units: Sequence[Sequence[Identity]], net: str) -> str:
    """The verdict on x_L = x_l + sum of F."""
    deviations = [unit.deviation for each in units for unit in each]
    if not deviations:
        return f"No run of {net} ended with weights to look into."
    exact = sum(d < EXACT for d in deviations)
    words = "holds exactly" if exact == len(deviations) else "does NOT hold exactly"
    most = f"largest difference {max(deviations):.0e} of x_L"
    return f"x_L = x_l + ΣF {words} in {net}: {exact} of {len(deviations)} units, {most}."


def signal_rows(setting: Setting, flows: dict[str, list[Flow]]) -> list[Row]:
    """Smallest variance, and span of gradient norms, of every net."""
    rows = []
    for net, each in flows.items():
        for when, parts in (("at the start", [f.before for f in each]), ("trained", [f.after for f in each])):
            smallest = tuple(min(s.variance for s in part) for part in parts)
            span = tuple(max(s.gradient for s in part) / max(min(s.gradient for s in part), 1e-300) for part in parts)
            ill = sum(not good for part in parts for good in healthy(part))
            words = f"{ill} of {sum(map(len, parts))} layers not healthy" if ill else "every layer healthy"
            rows.append(Row(net, f"smallest forward variance, {when}", smallest, words, None, setting.share, "number"))
            rows.append(
                Row(net, f"gradient norms, largest/smallest, {when}", span, words, None, setting.share, "number")
            )
    return rows


def identity_rows(setting: Setting, units: dict[str, list[list[Identity]]]) -> list[Row]:
    """Largest deviation from the identity, and the additive term's mean size, of the residual nets."""
    rows = []
    for net, each in units.items():
        deviations = tuple(max(u.deviation for u in seed) for seed in each)
        additive = tuple(statistics.mean(u.additive for u in seed) for seed in each)
        cosine = tuple(statistics.mean(u.cosine for u in seed) for seed in each)
        kept = (
            "exact in float64"
            if deviations and max(deviations) < EXACT
            else "not exact: something stands after the addition"
        )
        rows += [
            Row(net, "largest |x_L - x_l - ΣF| / |x_L|", deviations, kept, None, setting.share, "number"),
            Row(
                net,
                "additive term of the gradient / |dE/dx_L|",
                additive,
                "a measurement, no claim",
                None,
                setting.share,
                "number",
            ),
            Row(net, "cosine of dE/dx_l and dE/dx_L", cosine, "a measurement, no claim", None, setting.share, "number"),
        ]
    return rows


def signal_picture(flows: dict[str, list[Flow]]) -> drawing.Picture:
    """Forward variances (left) and backward norms (right), at the start (dashed) and trained (solid)."""
    colours = dict(zip(flows, drawing.SERIES, strict=False))

    def draw(panels: drawing.Panels) -> None:
        for axes, field, title in zip(
            panels, ("variance", "gradient"), ("forward variance", "gradient norm"), strict=True
        ):
            for net, each in flows.items():
                for part, style in (("before", "--"), ("after", "-")):
                    curves = [[getattr(s, field) for s in getattr(flow, part)] for flow in each]
                    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                    axes.plot(range(1, len(mean) + 1), mean, style, color=colours[net], linewidth=1.4)
            drawing.in_decades(axes)
            drawing.head(axes, title, "layer")

    return drawing.picture(
        "signals",
        "What flows forwards and backwards",
        draw,
        panels=2,
        legend=[*drawing.colour_keys(list(flows)), drawing.Key("at the start", line="dashed"), drawing.Key("trained")],
        caption="Variance of each BN's output, and norm of the loss's gradient there; means over seeds, logarithmic scales.",
        label="Forward variance and backward gradient norm of each layer.",
    )


def identity_picture(units: dict[str, list[list[Identity]]]) -> drawing.Picture:
    """What the gradient at x_l is made of: the identity's part is 1, the additive term beside it."""
    colours = dict(zip(units, drawing.SERIES[1:], strict=False))

    def draw(panels: drawing.Panels) -> None:
        for axes, field, title in zip(
            panels, ("kept", "additive"), ("|dE/dx_l| / |dE/dx_L|", "additive term / |dE/dx_L|"), strict=True
        ):
            for net, each in units.items():
                curves = torch.tensor([[getattr(u, field) for u in seed] for seed in each])
                if len(curves):
                    axes.plot(range(1, curves.shape[1] + 1), curves.mean(0).tolist(), "o-", color=colours[net])
            axes.set_ylim(bottom=0)
            drawing.head(axes, title, "unit that keeps its shape")

    return drawing.picture(
        "identities",
        "What the gradient is made of",
        draw,
        panels=2,
        legend=[drawing.Key(net, f"--series-{i}") for i, net in enumerate(units, 1)],
        caption="dE/dx_l = dE/dx_L (1 + d/dx_l ΣF) (2016 eq. 5), x_L being its stage's last output. Means over seeds.",
        label="Size of the gradient at each unit, and of its additive term.",
    )


STUDY = Study(
    name="gradients",
    question="Do signals vanish in deep plain nets, and what do identity shortcuts pass on?",
    place="2015 §4.1; 2016 §2",
    plan=plan,
    read=read,
)
