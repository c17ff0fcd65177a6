"""Cost: parameters and multiply-adds of every network, compared with those of others (2015 Table 1, Table 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from resnetlab.models.cost import compute_cost, count_parameters, default_image_size
from resnetlab.models.spec import CIFAR_BOTTLENECK, CIFAR_DEPTHS, IMAGENET_DEPTHS, get_specification
from resnetlab.studies import figures
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import PaperFigure, Row, Study, StudyResult

NETS = (
    *(f"plain{d}" for d in (18, 34)),
    *(f"resnet{d}" for d in IMAGENET_DEPTHS),
    *(f"resnet{d}" for d in CIFAR_DEPTHS),
    *(f"preresnet{d}" for d in CIFAR_BOTTLENECK),
)
VGG_MULTIPLY_ADDS = {"vgg16": (15.3e9, "2015 §4.1"), "vgg19": (19.6e9, "2015 §3.3 and Fig. 3")}
OTHERS = ("alexnet", "vgg16", "vgg19", "googlenet")  # torchvision's
AGREES = "agrees with the paper"
DISAGREEMENTS = {
    "preresnet1001": ", whose figure is the count without BN's weights and biases: 10,178,490 here",
    "vgg16": ", whose figure is that of the convolutions alone",
}
ROUNDING = 0.5  # of the last digit that a paper prints, and its truncation (3.858 is printed as 3.8)

RULE = (
    "A count agrees with a printed one where it rounds or truncates to it. Multiply-adds are those of convolutions and fully "
    "connected layers for one image of 224 (CIFAR nets 32) pixels; counts are exact, so they have no deviation."
)


class NetworkCosts(Study):
    """Counts of every network of the papers, then of AlexNet, VGG and GoogLeNet as torchvision builds them."""

    name = "cost"
    question = "What does each network cost, beside AlexNet, VGG and GoogLeNet?"
    place = "2015 Table 1, Table 6"

    def plan(self, setting: Setting) -> list[Trial]:
        """Nothing is trained."""
        return []

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """How many counts agree with the printed ones."""
        rows: list[Row] = []
        counts: dict[str, tuple[int, int]] = {}
        for name in NETS:
            counted = compute_cost(get_specification(name))
            counts[name] = counted.parameters, counted.multiply_adds
            rows.append(count_row(name, "parameters", counted.parameters, counted.paper_parameters, counted.source))
            printed = counted.paper_multiply_adds
            rows.append(count_row(name, "multiply-adds", counted.multiply_adds, printed, counted.source))
        for name in OTHERS:
            counts[name] = count_torchvision(name)
            rows.append(count_row(name, "parameters", counts[name][0]))
            rows.append(count_row(name, "multiply-adds", counts[name][1], *VGG_MULTIPLY_ADDS.get(name, (None, None))))
        compared = [row for row in rows if row.paper]
        agree = sum(row.verdict == AGREES for row in compared)
        shares = [counts[a][1] / counts[b][1] for a, b in (("resnet34", "vgg19"), ("resnet152", "vgg16"))]
        return StudyResult(
            answer=f"{agree} of {len(compared)} counts agree with the printed ones.",
            details=f"ResNet-34 needs {100 * shares[0]:.1f} % of VGG-19's multiply-adds (the paper: 18 %), ResNet-152 "
            f"{100 * shares[1]:.0f} % of VGG-16's.",
            rows=rows,
            figures=[draw_cost(counts)],
            rule=RULE,
            remarks=[
                "AlexNet, VGG and GoogLeNet are torchvision's: AlexNet with one column, GoogLeNet with BN, without side heads.",
                "VGG-16's convolutions alone come to the paper's 15.3e9; its fully connected layers add 0.12e9.",
            ],
        )


def count_row(name: str, figure: str, value: int, printed: float | None = None, source: str | None = None) -> Row:
    """One count, compared with the one that the paper prints."""
    verdict = "the paper prints none"
    if printed:
        verdict = AGREES if agrees(value, printed) else f"does NOT agree with the paper{DISAGREEMENTS.get(name, '')}"
    published = PaperFigure(printed, source or "") if printed else None
    return Row(name, figure, (float(value),), verdict, published, unit="count")


def agrees(count: float, printed: float) -> bool:
    """Whether a count rounds or truncates to a printed figure of two or three digits, such as 3.8e9 or 0.27e6.

    >>> agrees(3_857_973_248, 3.8e9), agrees(269_722, 0.27e6), agrees(4_089_184_256, 3.8e9)
    (True, True, False)
    """
    unit = 1e9 if printed >= 1e9 else 1e6
    text = f"{printed / unit:.4g}"
    step = unit * 10.0 ** -len(text.partition(".")[2])
    return printed - ROUNDING * step <= count < printed + step


def count_torchvision(name: str) -> tuple[int, int]:
    """Parameters and multiply-adds of one of torchvision's networks, for one image of 224 pixels."""
    from torchvision import models

    options: dict[str, Any] = {"weights": None} | (
        {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    )
    total = 0

    def add(module: nn.Module, _: Any, y: torch.Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        total += weight.numel() * (y.shape[-2] * y.shape[-1] if isinstance(module, nn.Conv2d) else 1)

    with torch.device("meta"):
        net = models.get_model(name, **options).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(add)
        net(torch.empty(1, 3, 224, 224))
    return count_parameters(net), total


def draw_cost(counts: dict[str, tuple[int, int]]) -> figures.StudyFigure:
    """Multiply-adds against parameters, logarithmic scales."""
    ours = {
        name: v
        for name, v in counts.items()
        if name not in OTHERS and default_image_size(get_specification(name)) == 224
    }
    others = {name: counts[name] for name in OTHERS}

    def draw(panels: figures.Panels) -> None:
        from matplotlib.ticker import NullLocator

        axes = panels[0]
        for group, colour in ((ours, figures.SERIES[0]), (others, figures.SERIES[1])):
            for name, (weights, work) in group.items():
                axes.plot(weights / 1e6, work / 1e9, "o", color=colour, markersize=7)
                if not name.startswith("plain"):  # its residual twin has the same point
                    left = name == "resnet34"  # ResNet-50 is close to its right
                    axes.annotate(name, (weights / 1e6, work / 1e9), (-6 if left else 6, -4), textcoords="offset points",
                                  ha="right" if left else "left", fontsize=11)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(5, 300)
        for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100, 200)), (axes.yaxis, (1, 2, 5, 10, 20))):
            axis.set_minor_locator(NullLocator())
            axis.set_ticks(ticks, [str(tick) for tick in ticks])
        figures.set_titles(axes, "multiply-adds (1e9)", "parameters (millions)")

    return figures.draw_study_figure(
        "cost",
        draw,
        figures.FigureText(
            "What the ImageNet nets cost",
            "One image of 224 pixels; logarithmic scales. Plain-18 and -34 have the points of their residual twins.",
            "Multiply-adds against parameters of the ImageNet networks, AlexNet, VGG and GoogLeNet.",
        ),
        figures.PanelLayout(height=380),
        legend=[
            figures.LegendKey("the paper's", "--series-0", "dot"),
            figures.LegendKey("torchvision's others", "--series-1", "dot"),
        ],
    )
