"""Responses: how strongly each layer responds, in plain and residual nets (2015 §4.2, Fig. 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from resnetlab.models.probes import measure_responses
from resnetlab.studies import figures
from resnetlab.studies.degradation import KINDS, Degradation
from resnetlab.studies.probe_images import load_probe_batch, select_probe_images
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import Row, StudyResult
from resnetlab.studies.verdicts import RULE, compare_by_seed, describe, mean_sd

IMAGES = 512

Layers = dict[int, list[float]]  # seed -> a deviation for each layer


class Responses(Degradation):
    """The nets of the study of degradation, measured after training."""

    name = "responses"
    question = "Do residual nets change their signal less than plain ones, layer by layer?"
    place = "2015 Fig. 7"

    def depths(self, setting: Setting) -> tuple[int, ...]:
        """Those of the paper's figure."""
        return setting.pick_depths(smoke=(8, 14), quick=(8, 20, 56), paper=(20, 56, 110))

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """The mean over layers: residual compared with plain of equal depth, and deep with shallow."""
        deviations = measure_all_responses(setting, outcomes, on_progress)
        means = {
            net: {seed: sum(layers) / len(layers) for seed, layers in by_seed.items()}
            for net, by_seed in deviations.items()
        }
        depths = self.depths(setting)
        rows, strengths = [], []
        verbs = {"larger": "responds more strongly than", "smaller": "responds less strongly than"}
        for depth in depths:
            plain, residual = (f"{kind}{depth}" for kind in KINDS)
            difference = compare_by_seed(means.get(plain, {}), means.get(residual, {}))
            strengths.append(difference.strength)
            text = describe(difference, plain, residual, **verbs, unit="number")
            for net in (plain, residual):
                values = tuple(value for _, value in sorted(means.get(net, {}).items()))
                compared = (residual, difference) if net == plain else None
                row = Row(
                    net, "mean response over layers", values, text, None, setting.share, "number", compared=compared
                )
                rows.append(row)
        shallow, deep = f"resnet{depths[0]}", f"resnet{depths[-1]}"
        deeper = compare_by_seed(means.get(shallow, {}), means.get(deep, {}))
        count = strengths.count("shown")
        return StudyResult(
            answer=f"Residual nets are shown to respond less strongly than plain ones at {count} of {len(depths)} depths"
            f"{setting.condition}.",
            details=f"With depth: {describe(deeper, shallow, deep, **verbs, unit='number')}.",
            rows=rows,
            figures=[draw_responses(deviations, depths)],
            rule=RULE + " The figure compared is a net's mean over its layers of the deviation of a layer's response.",
            remarks=[
                f"Deviations are taken over all elements of BN's output in eval mode, on {IMAGES} test images at most.",
                "The paper does not say over what it took them, and prints no numbers, only the figure.",
            ],
        )


def measure_all_responses(
    setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]
) -> dict[str, Layers]:
    """network -> seed -> the deviation of each layer's response, in the order of the forward pass."""
    images = select_probe_images(setting, IMAGES)
    deviations: dict[str, Layers] = {}
    trained = [o for o in outcomes.all if not o.diverged]
    for done, outcome in enumerate(trained, 1):
        model = outcome.load_model()
        x, _ = load_probe_batch(model, images)
        deviations.setdefault(outcome.trial.label, {})[outcome.seed] = list(measure_responses(model.resnet, x).values())
        on_progress(done, len(trained))
    return deviations


def draw_responses(deviations: Mapping[str, Layers], depths: Sequence[int]) -> figures.StudyFigure:
    """Original order above, sorted below (2015 Fig. 7), plain left, residual right; means over seeds."""
    shown = depths if len(depths) <= figures.CURVES else [*depths[: figures.CURVES - 1], depths[-1]]
    colours = dict(zip(shown, figures.SERIES, strict=False))
    orders: Sequence[tuple[str, Callable[[list[float]], list[float]]]] = (
        ("layers in their order", list),
        ("sorted, the strongest first", partial(sorted, reverse=True)),
    )

    def draw(panels: figures.Panels) -> None:
        cells = [(title, order, kind) for title, order in orders for kind in KINDS]
        tops = []
        named = []
        for axes, (title, order, kind) in zip(panels, cells, strict=True):
            ends = {}
            for depth in (d for d in shown if f"{kind}{d}" in deviations):
                by_seed = deviations[f"{kind}{depth}"].values()
                layers = order([mean_sd(list(values))[0] for values in zip(*by_seed, strict=True)])
                axes.plot(range(1, len(layers) + 1), layers, color=colours[depth], marker=".", linewidth=1.4)
                ends[f"{kind}{depth}"] = layers[-1], colours[depth]
                tops.append(max(layers))
            figures.set_titles(axes, f"{kind.replace('resnet', 'residual')}, {title}", "layer")
            named.append(ends)
        for axes, ends in zip(panels, named, strict=True):
            axes.set_ylim(0, 1.05 * max(tops, default=1.0))
            figures.label_curves(axes, ends)

    return figures.draw_study_figure(
        "responses",
        draw,
        figures.FigureText(
            "Standard deviation of layer responses",
            "As 2015 Fig. 7, plain and residual nets apart: BN's output, before nonlinearity and addition; a point is a "
            "3x3 layer.",
            "Standard deviation of each layer's response, in original order and sorted, plain and residual nets.",
        ),
        figures.PanelLayout(4, 2, 260, figures.LABEL),
    )
