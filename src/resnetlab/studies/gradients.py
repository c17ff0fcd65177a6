"""Gradients: degradation is not a vanishing gradient (2015 §4.1); identity shortcuts and signals (2016 §2, eq. 4 and 5)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from resnetlab.formatting import format_count
from resnetlab.models.probes import IdentityFlow, LayerSignal, measure_identity_flow, measure_signals
from resnetlab.models.resnet import build_from_spec
from resnetlab.random import seed_for
from resnetlab.studies import figures
from resnetlab.studies.probe_images import load_probe_batch, select_probe_images
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.variants import network_trials, warmup_2015
from resnetlab.studies.verdicts import SEEDS, format_seeds

IMAGES = 128  # of the batch
MIN_VARIANCE = 0.01  # of a healthy layer's BN output, which has variance 1 at the start
MAX_SPREAD = 100  # factor between a healthy layer's gradient and the median, either way
SCALE = 0.5  # of the scaled shortcut
EXACT = 1e-12  # of the largest value: rounding of float64 over some dozen additions

# of the rows: text, field of IdentityFlow, and what is taken over a network's units
IDENTITY_FIGURES: tuple[tuple[str, str, Callable[[Iterable[float]], float]], ...] = (
    ("largest |x_L - x_l - ΣF| / |x_L|", "deviation", max),
    ("product of the shortcuts' scales, smallest", "product", min),
    ("gradient that the shortcuts alone pass, smallest share", "passed", min),
    ("additive term of the gradient / |dE/dx_L|", "additive", statistics.mean),
    ("cosine of dE/dx_l and dE/dx_L", "cosine", statistics.mean),
)

HEALTHY = (
    f"A layer is healthy where the variance of its BN output is at least {MIN_VARIANCE} and the norm of the gradient there "
    f"is within a factor of {MAX_SPREAD} of the median layer's. The identity holds where x_L - x_l and the sum of F differ by "
    f"less than {EXACT:g} of the largest value, in float64. A net is healthy, or exact, where every layer, or unit, of every "
    "seed is."
)


@dataclass(frozen=True)
class SignalFlow:
    """The signals of one run, before and after training."""

    before: list[LayerSignal]
    after: list[LayerSignal]


class Gradients(Study):
    """A deep plain net, its residual twin, the same with full pre-activation, and that with its shortcuts scaled by half."""

    name = "gradients"
    question = "Do signals vanish in deep plain nets, and what do identity shortcuts pass on?"
    place = "2015 §4.1; 2016 §2 and eq. 8"

    def networks(self, setting: Setting) -> tuple[str, ...]:
        """Their labels, of the deepest of the depths."""
        depth = setting.pick_depths(smoke=(8,), quick=(56,), paper=(56,))[-1]
        return *(f"{kind}{depth}" for kind in ("plain", "resnet", "preresnet")), f"preresnet{depth}, h(x) = {SCALE}x"

    def plan(self, setting: Setting) -> list[Trial]:
        """The four nets."""
        *nets, scaled = self.networks(setting)
        depth = int(nets[0].removeprefix("plain"))
        values = {"shortcut": "constant", "shortcut_scale": SCALE, "residual_scale": 1.0}
        halved = setting.trials(scaled, nets[-1], values, **warmup_2015(setting, depth))
        return network_trials(setting, *nets) + halved

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Health of every layer before and after training; the identity in the residual nets."""
        images = select_probe_images(setting, IMAGES)
        nets = plain, residual, preact, scaled = self.networks(setting)
        trained = [o for net in nets for o in outcomes.trained(net)]
        flows: dict[str, list[SignalFlow]] = {net: [] for net in nets}
        units: dict[str, list[list[IdentityFlow]]] = {residual: [], preact: [], scaled: []}
        for done, outcome in enumerate(trained, 1):
            model, label = outcome.load_model(), outcome.trial.label
            x, labels = load_probe_batch(model, images)
            fresh = build_from_spec(model.spec, init=outcome.trial.recipe.init, seed=seed_for(outcome.seed, "init"))
            flows[label].append(SignalFlow(measure_signals(fresh, x, labels), measure_signals(model.resnet, x, labels)))
            if label in units:
                units[label].append(measure_identity_flow(model.resnet, x[:32], labels[:32]))
            on_progress(done, len(trained))
        no_vanishing = count_unhealthy(flows[plain]) == 0 and len(flows[plain]) >= SEEDS
        details = (
            f"So degradation of {plain}, where there is any, does not come from vanishing signals{setting.condition}."
        )
        health = f"{health_verdict(flows[plain], plain).removesuffix('.')}{setting.condition}."
        return StudyResult(
            answer=f"{health} {identity_verdict(units[preact], preact)}",
            details=" ".join([details] * no_vanishing + [product_verdict(units[scaled], scaled)]),
            rows=[*signal_rows(setting, flows), *identity_rows(setting, units)],
            figures=[draw_signals(flows), draw_identities(units)],
            rule=HEALTHY,
            remarks=[
                f"One batch of {IMAGES} test images (at most), BN with the statistics of that batch, fp32.",
                "Gradient norms are those of the loss of one image at each BN's output, averaged over images.",
                "The identity is measured in float64 with 32 images.",
            ],
        )


def healthy_layers(flow: Sequence[LayerSignal]) -> list[bool]:
    """Whether each layer is healthy, by the stated rule."""
    median = statistics.median(s.gradient for s in flow)
    low, high = median / MAX_SPREAD, median * MAX_SPREAD
    return [s.variance >= MIN_VARIANCE and low <= s.gradient <= high and s.gradient > 0 for s in flow]


def count_unhealthy(flows: Sequence[SignalFlow]) -> int:
    """Layers that are not healthy, over all seeds, before and after training."""
    return sum(not good for flow in flows for part in (flow.before, flow.after) for good in healthy_layers(part))


def health_verdict(flows: Sequence[SignalFlow], net: str) -> str:
    """The verdict on a net's signals."""
    if not flows:
        return f"No run of {net} ended with weights to look into."
    layers = sum(len(flow.before) + len(flow.after) for flow in flows)
    unhealthy, seeds = count_unhealthy(flows), len(flows)
    if not unhealthy:
        return f"All layers of {net} are healthy, before and after training, in {format_seeds(seeds, seeds)}."
    when = f"before and after training, {format_count(seeds, 'seed')}"
    return f"{unhealthy:,} of {layers:,} layers of {net} are not healthy ({when})."


def identity_verdict(units: Sequence[Sequence[IdentityFlow]], net: str) -> str:
    """The verdict on x_L = x_l + sum of F."""
    deviations = [unit.deviation for each in units for unit in each]
    if not deviations:
        return f"No run of {net} ended with weights to look into."
    exact = sum(d < EXACT for d in deviations)
    verb = "holds exactly" if exact == len(deviations) else "does NOT hold exactly"
    largest = f"largest difference {max(deviations):.0e} of x_L"
    return f"x_L = x_l + ΣF {verb} in {net}: {exact} of {len(deviations)} units, {largest}."


def product_verdict(units: Sequence[Sequence[IdentityFlow]], net: str) -> str:
    """What the product of scaled shortcuts leaves of the gradient (2016 eq. 8), over the longest way."""
    if not units:
        return f"No run of {net} ended with weights to look into."
    longest = min((unit for each in units for unit in each), key=lambda unit: unit.product)
    name = longest.block
    ratio = statistics.fmean(u.gradient_ratio for each in units for u in each if u.block == name)
    return (
        f"In {net} the shortcuts pass Πλ = {longest.product:.2g} of the gradient (measured: {longest.passed:.2g}) from the "
        f"last unit of a stage to {name}, "
        f"where |dE/dx_l| / |dE/dx_L| is {ratio:.2g}."
    )


def signal_rows(setting: Setting, flows: dict[str, list[SignalFlow]]) -> list[Row]:
    """Smallest variance and ratio of gradient norms of every net."""
    rows = []
    for net, each in flows.items():
        for when, parts in (("at the start", [f.before for f in each]), ("trained", [f.after for f in each])):
            smallest = tuple(min(s.variance for s in part) for part in parts)
            ratio = tuple(max(s.gradient for s in part) / max(min(s.gradient for s in part), 1e-300) for part in parts)
            unhealthy = sum(not good for part in parts for good in healthy_layers(part))
            layers = sum(map(len, parts))
            text = f"{unhealthy} of {layers} layers not healthy" if unhealthy else "every layer healthy"
            rows.append(Row(net, f"smallest forward variance, {when}", smallest, text, None, setting.share, "number"))
            figure = f"gradient norms, largest/smallest, {when}"
            rows.append(Row(net, figure, ratio, text, None, setting.share, "number"))
    return rows


def identity_rows(setting: Setting, units: dict[str, list[list[IdentityFlow]]]) -> list[Row]:
    """Largest deviation from the identity, and the terms of the gradient, of the residual nets."""
    rows = []
    for net, each in units.items():
        for text, field, over_units in IDENTITY_FIGURES:
            values = tuple(over_units(getattr(unit, field) for unit in seed) for seed in each)
            verdict = "a measurement, no claim"
            if field == "deviation":
                exact = bool(values) and max(values) < EXACT
                verdict = "exact in float64" if exact else "not exact: an activation follows the addition"
            rows.append(Row(net, text, values, verdict, None, setting.share, "number"))
    return rows


def draw_signals(flows: dict[str, list[SignalFlow]]) -> figures.StudyFigure:
    """Forward variances (above) and backward norms (below), before training (left) and after (right)."""
    colours = dict(zip(flows, figures.SERIES, strict=False))
    fields = (("variance", "forward variance"), ("gradient", "gradient norm"))

    def draw(panels: figures.Panels) -> None:
        cells = [(*field, part) for field in fields for part in ("before", "after")]
        for axes, (field, title, part) in zip(panels, cells, strict=True):
            ends = {}
            for net, each in flows.items():
                curves = [[getattr(s, field) for s in getattr(flow, part)] for flow in each]
                mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                axes.plot(range(1, len(mean) + 1), mean, color=colours[net], linewidth=1.4)
                if mean:
                    ends[net] = mean[-1], colours[net]
            figures.set_log_axis(axes)
            figures.set_titles(axes, f"{title}, {part} training", "layer")
            figures.label_curves(axes, ends)

    return figures.draw_study_figure(
        "signals",
        draw,
        figures.FigureText(
            "Signals forwards and backwards",
            "Variance of each BN's output, and norm of the loss's gradient there; means over seeds, logarithmic scales.",
            "Forward variance and backward gradient norm of each layer, before and after training.",
        ),
        figures.PanelLayout(4, 2, 260, figures.LABEL),
    )


def draw_identities(units: dict[str, list[list[IdentityFlow]]]) -> figures.StudyFigure:
    """The terms of the gradient at x_l: the shortcuts' is their product (1 for identities), the additive term is beside it."""
    colours = dict(zip(units, figures.SERIES[1:], strict=False))

    def draw(panels: figures.Panels) -> None:
        titles = ("|dE/dx_l| / |dE/dx_L|", "additive term / |dE/dx_L|")
        for axes, field, title in zip(panels, ("gradient_ratio", "additive"), titles, strict=True):
            ends = {}
            for net, each in units.items():
                curves = torch.tensor([[getattr(u, field) for u in seed] for seed in each])
                if len(curves):
                    mean = curves.mean(0).tolist()
                    axes.plot(range(1, len(mean) + 1), mean, "o-", color=colours[net])
                    ends[net] = mean[-1], colours[net]
            axes.set_ylim(bottom=0)
            figures.set_titles(axes, title, "unit that keeps its shape")
            figures.label_curves(axes, ends)

    return figures.draw_study_figure(
        "identities",
        draw,
        figures.FigureText(
            "Parts of the gradient",
            "dE/dx_l = dE/dx_L (Πλ + d/dx_l ΣF) (2016 eq. 5 and 8), Πλ = 1 for identities; x_L is its stage's last output. "
            "Means over seeds.",
            "Size of the gradient at each unit, and of its additive term.",
        ),
        figures.PanelLayout(panels=2, right=figures.LABEL),
    )
