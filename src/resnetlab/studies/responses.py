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
from resnetlab.studies.verdicts import RULE, compare_by_seed, mean_sd, tally

IMAGES = 512

Layers = dict[int, list[float]]  # seed -> a deviation for each layer


class Responses(Degradation):
    """The nets of the study of degradation, measured after training."""

    name = "responses"
    question = "Do residual nets change their signal less than plain ones, layer by layer?"
    place = "2015 Fig. 7"

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
            text = tally(difference, plain, residual, **verbs)
            for net in (plain, residual):
                values = tuple(value for _, value in sorted(means.get(net, {}).items()))
                rows.append(Row(net, "mean response over layers", values, text, None, setting.share, "number"))
        shallow, deep = f"resnet{depths[0]}", f"resnet{depths[-1]}"
        deeper = compare_by_seed(means.get(shallow, {}), means.get(deep, {}))
        count = strengths.count("shown")
        return StudyResult(
            answer=f"Residual nets are shown to respond less strongly than plain ones at {count} of {len(depths)} depths.",
            details=f"With depth: {tally(deeper, shallow, deep, **verbs)}.",
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
        deviations.setdefault(outcome.trial.label, {})[outcome.seed] = list(measure_responses(model.net, x).values())
        on_progress(done, len(trained))
    return deviations


def draw_responses(deviations: Mapping[str, Layers], depths: Sequence[int]) -> figures.StudyFigure:
    """Original order above, sorted below (2015 Fig. 7); plain dashed, residual solid, means over seeds."""
    nets = [f"{kind}{depth}" for kind in KINDS for depth in depths if f"{kind}{depth}" in deviations]
    colours = dict(zip(nets, figures.SERIES * 3, strict=False))

    def draw(panels: figures.Panels) -> None:
        orders: Sequence[tuple[str, Callable[[list[float]], list[float]]]] = (
            ("layers in their order", list),
            ("layers sorted, the strongest first", partial(sorted, reverse=True)),
        )
        for axes, (title, order) in zip(panels, orders, strict=True):
            for net in nets:
                layers = order([mean_sd(list(values))[0] for values in zip(*deviations[net].values(), strict=True)])
                style = "--" if net.startswith("plain") else "-"
                axes.plot(range(1, len(layers) + 1), layers, style, color=colours[net], marker=".", linewidth=1.4)
            axes.set_ylim(bottom=0)
            figures.set_titles(axes, title, "layer")

    return figures.draw_study_figure(
        "responses",
        draw,
        figures.FigureText(
            "Standard deviation of layer responses",
            "As 2015 Fig. 7: BN's output, before nonlinearity and addition; a point is a 3x3 layer. Plain nets are dashed.",
            "Standard deviation of each layer's response, in original order and sorted.",
        ),
        figures.PanelLayout(panels=2, rows=2, height=260),
        legend=figures.colour_keys(nets),
    )
