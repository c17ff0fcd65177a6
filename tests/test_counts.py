"""Parameters, multiply-adds, convolutions and BNs of the papers' networks, from literal tables.

Multiply-adds tell the paper's bottleneck (stride in the first 1x1) from v1.5 (stride in the 3x3); parameters cannot.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnetlab.models.cost import Cost, compute_cost
from resnetlab.models.spec import get_specification


@cache
def _count(name: str, changes: tuple[tuple[str, Any], ...]) -> Cost:
    return compute_cost(get_specification(name, **dict(changes)))


def count(name: str, **changes: Any) -> Cost:
    """The cost of a network by name, counted once."""
    return _count(name, tuple(sorted(changes.items())))


def batch_norms(counted: Cost) -> list[int]:
    """The width of every BN layer."""
    return [layer.output[0] for layer in counted.layers if layer.kind == "BatchNorm2d"]


class Row(NamedTuple):
    """One network and what it must count: None if no figure is stated."""

    name: str
    shortcut: str | None
    parameters: int
    multiply_adds: int | None
    convolutions: int | None
    batch_norms: int | None


IMAGENET = [  # 1000 classes, 224x224
    Row("plain18", None, 11_515_688, 1_794_805_760, 17, 17),
    Row("resnet18", "A", 11_515_688, 1_794_805_760, 17, 17),
    Row("resnet18", "B", 11_689_512, 1_814_073_344, 20, 20),
    Row("resnet18", "C", 12_043_816, 1_878_298_624, 25, 25),
    Row("plain34", None, 21_623_848, 3_644_493_824, 33, 33),
    Row("resnet34", "A", 21_623_848, 3_644_493_824, 33, 33),
    Row("resnet34", "B", 21_797_672, 3_663_761_408, 36, 36),
    Row("resnet34", "C", 22_716_840, 3_830_747_136, 49, 49),
    Row("resnet50", "A", 22_780_456, 3_498_311_680, 49, 49),
    Row("resnet50", "B", 25_557_032, 3_857_973_248, 53, 53),
    Row("resnet50v1.5", None, 25_557_032, 4_089_184_256, 53, 53),
    Row("resnet50", "C", 40_128_552, 6_324_224_000, 65, 65),
    Row("resnet101", "A", 41_772_584, 7_210_532_864, 100, 100),
    Row("resnet101", None, 44_549_160, 7_570_194_432, 104, 104),
    Row("resnet101v1.5", None, 44_549_160, 7_801_405_440, 104, 104),
    Row("resnet101", "C", 76_981_288, 13_530_300_416, 133, 133),
    Row("resnet152", "A", 57_416_232, 10_922_754_048, 151, 151),
    Row("resnet152", None, 60_192_808, 11_282_415_616, 155, 155),
    Row("resnet152v1.5", None, 60_192_808, 11_513_626_624, 155, 155),
    Row("resnet152", "C", 107_335_720, 20_736_376_832, 201, 201),
    Row("resnet200", None, 64_673_832, 14_776_270_848, 203, 203),
    Row("preresnet18", None, 11_687_720, 1_814_073_344, 20, 17),
    Row("preresnet34", None, 21_795_880, 3_663_761_408, 36, 33),
    Row("preresnet50", None, 25_549_352, 3_857_973_248, 53, 49),
    Row("preresnet101", None, 44_541_480, 7_570_194_432, 104, 100),
    Row("preresnet152", None, 60_185_128, 11_282_415_616, 155, 151),
    Row("preresnet200", None, 64_666_152, 14_776_270_848, 203, 199),
]

CIFAR = [  # 10 classes, 32x32; the bottleneck nets of the 2016 appendix
    Row("resnet164", None, 1_704_154, 244_500_992, 166, 166),
    Row("preresnet164", None, 1_703_258, 244_500_992, 166, 163),
    Row("resnet1001", None, 10_328_602, 1_487_849_984, 1003, 1003),
    Row("preresnet1001", None, 10_327_706, 1_487_849_984, 1003, 1000),
]

# depth: (A = plain = pre-act A, the same with 100 classes, multiply-adds of A, with option B, with option C)
BASIC = {
    20: (269_722, 275_572, 40_551_040, 272_474, 283_962),
    32: (464_154, 470_004, 68_862_592, 466_906, 489_594),
    44: (658_586, 664_436, 97_174_144, 661_338, 695_226),
    56: (853_018, 858_868, 125_485_696, 855_770, 900_858),
    110: (1_727_962, 1_733_812, 252_887_680, 1_730_714, 1_826_202),
    1202: (19_421_274, 19_427_124, 2_829_238_912, 19_424_026, 20_538_714),
}
for depth, (a, _, macs, b, c) in BASIC.items():
    n = (depth - 2) // 6
    CIFAR += [
        Row(f"resnet{depth}", None, a, macs, depth - 1, depth - 1),
        Row(f"plain{depth}", None, a, macs, depth - 1, depth - 1),
        *([Row(f"preresnet{depth}", None, a, macs, depth - 1, depth - 1)] if depth < 1202 else []),  # seconds each
        Row(f"resnet{depth}", "B", b, None, depth + 1, depth + 1),
        Row(f"resnet{depth}", "C", c, None, depth - 1 + 3 * n, depth - 1 + 3 * n),
    ]


@pytest.mark.parametrize("row", IMAGENET + CIFAR, ids=lambda row: f"{row.name}-{row.shortcut or 'own'}")
def test_counts(row: Row) -> None:
    counted = count(row.name, **({"shortcut": row.shortcut} if row.shortcut else {}))
    found = Row(
        row.name,
        row.shortcut,
        counted.parameters,
        counted.multiply_adds if row.multiply_adds is not None else None,
        counted.convolutions,
        len(batch_norms(counted)),
    )
    assert found == row


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(f"resnet{depth}", row[1]) for depth, row in BASIC.items()]
    + [
        ("resnet164", 1_727_284),
        ("preresnet164", 1_726_388),
        ("resnet1001", 10_351_732),
        ("preresnet1001", 10_350_836),
    ],
)
def test_hundred_classes(name: str, parameters: int) -> None:
    ten, hundred = count(name), count(name, classes=100)
    assert hundred.parameters == parameters
    width = 256 if "1001" in name or "164" in name else 64
    assert hundred.multiply_adds - ten.multiply_adds == 90 * width
    assert hundred.convolutions == ten.convolutions


@pytest.mark.parametrize(
    ("name", "entries"),
    [("resnet18", 9_600), ("resnet34", 17_024), ("resnet50", 53_120), ("resnet101", 105_344), ("resnet152", 151_424)],
)
def test_running_statistics(name: str, entries: int) -> None:
    """Running means and variances are no parameters, but the model file holds them."""
    assert 2 * sum(batch_norms(count(name))) == entries


@given(n=st.integers(1, 22), net=st.sampled_from(["resnet20", "plain20", "preresnet20"]))
@settings(max_examples=12, deadline=None)
def test_closed_form_of_6n_plus_2(n: int, net: str) -> None:
    """2015 §4.2; `depths` and not the name, for 50, 152, 164 and 200 are names of other families."""
    counted = count(net, depths=(n, n, n))
    assert counted.depth == 6 * n + 2
    assert counted.parameters == 97_216 * n - 21_926
    assert counted.multiply_adds == 14_155_776 * n - 1_916_288
    assert counted.convolutions == 6 * n + 1


@given(n=st.integers(1, 12))
@settings(max_examples=6, deadline=None)
def test_closed_form_of_9n_plus_2(n: int) -> None:
    """Both ends of the 2016 appendix lie on one line: 164 (n = 18) and 1001 (n = 111)."""
    counted = count("preresnet164", depths=(n, n, n))
    slope, rest = divmod(10_327_706 - 1_703_258, 111 - 18)
    assert rest == 0
    assert (counted.depth, counted.parameters) == (9 * n + 2, 1_703_258 + slope * (n - 18))


@pytest.mark.parametrize(
    ("name", "difference"),
    [("resnet20", 2_752), ("resnet110", 2_752), ("resnet18", 173_824), ("resnet34", 173_824), ("resnet50", 2_776_576)],
)
def test_parameters_of_projections(name: str, difference: int) -> None:
    assert count(name, shortcut="B").parameters - count(name, shortcut="A").parameters == difference


@pytest.mark.parametrize(("name", "extra"), [("resnet18", 5), ("resnet34", 13), ("resnet50", 12)])
def test_projections_of_option_c(name: str, extra: int) -> None:
    """34-C's "thirteen" extra projections (2015 §4.1)."""
    assert count(name, shortcut="C").convolutions - count(name, shortcut="B").convolutions == extra


@pytest.mark.parametrize("gated", ["exclusive-gate", "shortcut-gate"])
def test_parameters_of_gates(gated: str) -> None:
    """A 1x1 convolution with bias on each of the 54 units of ResNet-110 (2016 §3.1)."""
    more = count("resnet110", shortcut=gated).parameters - count("resnet110").parameters
    widths = [(16, 16)] * 18 + [(16, 32)] + [(32, 32)] * 17 + [(32, 64)] + [(64, 64)] * 17
    assert more == sum(a * b + b for a, b in widths)


@pytest.mark.parametrize("shortcut", ["constant", "dropout"])
def test_scaling_and_dropout_have_no_parameters(shortcut: str) -> None:
    assert count("resnet110", shortcut=shortcut).parameters == count("resnet110").parameters


def test_one_layer_skips_have_the_same_layers() -> None:
    """2016 Table 3's "ResNet-110 (1-layer skip)" has the same 109 convolutions, so the same parameters."""
    counted = count("resnet110", layers=1, depths=(36, 36, 36))
    assert (counted.depth, counted.parameters, counted.convolutions) == (110, 1_727_962, 109)
    assert counted.multiply_adds == 252_887_680


@pytest.mark.parametrize(("name", "weights"), [("resnet34", 73_728), ("resnet50", 69_632)])
def test_the_pair_of_figure_5(name: str, weights: int) -> None:
    """The 64-d basic block and the 256-d bottleneck, both on 56x56 maps, cost about the same."""
    layers = [x for x in count(name).layers if x.name.startswith("layer1.1.") and x.kind == "Conv2d"]
    assert sum(layer.parameters for layer in layers) == weights
    assert sum(layer.multiply_adds for layer in layers) == weights * 56 * 56


@pytest.mark.parametrize(("name", "weights"), [("preresnet1001", 10_178_490), ("resnet1202", 19_331_642)])
def test_counts_without_batch_norm(name: str, weights: int) -> None:
    """The 2016 paper's 10.2M leaves BN out, the 2015 paper's 19.4M does not."""
    counted = count(name)
    assert counted.parameters - 2 * sum(batch_norms(counted)) == weights
