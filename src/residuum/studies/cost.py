"""Cost: parameters and multiply-adds of every network, beside those that others built (2015 Table 1, Table 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from residuum.models.accounting import cost, natural_size, parameters
from residuum.models.spec import CIFAR_BOTTLENECK, CIFAR_PAPER, IMAGENET, specification
from residuum.studies import drawing, paper
from residuum.studies.paper import Printed
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting, Trial
from residuum.studies.study import Reading, Row, Study

NETS = (
    *(f"plain{d}" for d in (18, 34)),
    *(f"resnet{d}" for d in IMAGENET),
    *(f"resnet{d}" for d in CIFAR_PAPER),
    *(f"preresnet{d}" for d in CIFAR_BOTTLENECK),
)
OTHERS = ("alexnet", "vgg16", "vgg19", "googlenet")  # torchvision's
AGREES = "agrees with the paper"
ROUNDING = 0.5  # of the last digit that a paper prints, and its truncation (3.858 is printed as 3.8)

RULE = (
    "A count agrees with a printed one where it rounds or truncates to it. Multiply-adds are those of convolutions and fully "
    "connected layers for one picture of 224 (CIFAR nets 32) pixels; counts are exact, so they have no deviation."
)


def plan(setting: Setting) -> list[Trial]:
    """Nothing is trained."""
    return []


def read(setting: Setting, outcomes: Outcomes, _: Callable[[int, int], None]) -> Reading:
    """Every network of the papers, then AlexNet, VGG and GoogLeNet as torchvision builds them."""
    rows: list[Row] = []
    figures: dict[str, tuple[int, int]] = {}
    for name in NETS:
        counted = cost(specification(name))
        figures[name] = counted.parameters, counted.multiply_adds
        printed = counted.paper_parameters and Printed(counted.paper_parameters, "2015 Table 6")
        rows.append(count_row(name, "parameters", counted.parameters, printed))
        printed = counted.paper_multiply_adds and Printed(counted.paper_multiply_adds, "2015 Table 1")
        rows.append(count_row(name, "multiply-adds", counted.multiply_adds, printed))
    for name in OTHERS:
        figures[name] = foreign(name)
        rows.append(count_row(name, "parameters", figures[name][0], None))
        vgg = paper.VGG_MULTIPLY_ADDS.get(name)
        rows.append(count_row(name, "multiply-adds", figures[name][1], vgg and Printed(vgg, "2015 Table 1, §3.3")))
    compared = [row for row in rows if row.paper]
    agree = sum(row.verdict == AGREES for row in compared)
    share = figures["resnet34"][1] / figures["vgg19"][1]
    return Reading(
        answer=f"{agree} of {len(compared)} counts agree with the printed ones.",
        more=f"ResNet-34 needs {100 * share:.1f} % of VGG-19's multiply-adds (the paper: 18 %), ResNet-152 "
        f"{100 * figures['resnet152'][1] / figures['vgg16'][1]:.0f} % of VGG-16's.",
        rows=rows,
        pictures=[picture(figures)],
        rule=RULE,
        remarks=[
            "AlexNet, VGG and GoogLeNet are torchvision's: AlexNet of one column, GoogLeNet with BN and without side heads.",
            "VGG-16's convolutions alone come to the paper's 15.3e9; its fully connected layers add 0.12e9.",
        ],
    )


def count_row(name: str, figure: str, value: int, printed: Printed | float | None) -> Row:
    """One count, with what the paper prints."""
    beside = printed if isinstance(printed, Printed) else None
    words = "the paper prints none"
    if beside is not None and beside.value is not None:
        words = AGREES if agrees(value, beside.value) else "does NOT agree with the paper"
    return Row(name, figure, (float(value),), words, beside, unit="count")


def agrees(count: float, printed: float) -> bool:
    """Whether a count rounds or truncates to a printed figure of two or three digits, such as 3.8e9 or 0.27e6.

    >>> agrees(3_857_973_248, 3.8e9), agrees(269_722, 0.27e6), agrees(4_089_184_256, 3.8e9)
    (True, True, False)
    """
    unit = 1e9 if printed >= 1e9 else 1e6
    text = f"{printed / unit:.4g}"
    step = unit * 10.0 ** -len(text.partition(".")[2])
    return printed - ROUNDING * step <= count < printed + step


def foreign(name: str) -> tuple[int, int]:
    """Parameters and multiply-adds of one of torchvision's networks, for one picture of 224 pixels."""
    from torchvision import models

    options: dict[str, Any] = {"weights": None} | (
        {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    )
    total = 0

    def note(module: nn.Module, _: Any, y: torch.Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        total += weight.numel() * (y.shape[-2] * y.shape[-1] if isinstance(module, nn.Conv2d) else 1)

    with torch.device("meta"):
        net = models.get_model(name, **options).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(note)
        net(torch.empty(1, 3, 224, 224))
    return parameters(net), total


def picture(figures: dict[str, tuple[int, int]]) -> drawing.Picture:
    """Multiply-adds against parameters, logarithmic scales."""
    ours = {name: v for name, v in figures.items() if name not in OTHERS and natural_size(specification(name)) == 224}
    others = {name: figures[name] for name in OTHERS}

    def draw(panels: drawing.Panels) -> None:
        axes = panels[0]
        for group, colour in ((ours, drawing.SERIES[0]), (others, drawing.SERIES[1])):
            for name, (weights, work) in group.items():
                axes.plot(weights / 1e6, work / 1e9, "o", color=colour, markersize=7)
                if not name.startswith("plain"):  # it lies where its residual twin does
                    left = name == "resnet34"  # ResNet-50 lies close to its right
                    axes.annotate(name, (weights / 1e6, work / 1e9), (-6 if left else 6, -4), textcoords="offset points",
                                  ha="right" if left else "left", fontsize=11)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(5, 300)
        for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100, 200)), (axes.yaxis, (1, 2, 5, 10, 20))):
            axis.set_minor_locator(_none())
            axis.set_ticks(ticks, [str(tick) for tick in ticks])
        drawing.head(axes, "multiply-adds (1e9)", "parameters (millions)")

    return drawing.picture(
        "cost",
        "What the ImageNet nets cost",
        draw,
        height=380,
        legend=[
            drawing.Key("the paper's", "--series-0", "dot"),
            drawing.Key("torchvision's others", "--series-1", "dot"),
        ],
        caption="One picture of 224 pixels; logarithmic scales. Plain-18 and -34 lie where their residual twins do.",
        label="Multiply-adds against parameters of the ImageNet networks, AlexNet, VGG and GoogLeNet.",
    )


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


STUDY = Study(
    name="cost",
    question="What does each network cost, beside AlexNet, VGG and GoogLeNet?",
    place="2015 Table 1, Table 6",
    plan=plan,
    read=read,
)
