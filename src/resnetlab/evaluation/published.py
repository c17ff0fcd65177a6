"""The errors that the two papers print, each with what a run must equal to be compared with it.

2015 is arXiv 1512.03385, 2016 arXiv 1603.05027. This is the one table of them: `evaluate` shows the error printed for a network
under a test protocol, and the studies compare a run only with one of the same training (`studies.paper`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resnetlab.data import imagenet
from resnetlab.evaluation.protocols import Protocol
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OwnNetwork
from resnetlab.models.spec import Specification, get_specification, parse_changes

CIFAR_STEPS = 64_000  # of a batch of 128
MULTISCALE = "multiscale:224,256,384,480,640"
OPEN = ("zero_pad", "preact_transition", "maxpool", "conv1_bias", "classes", "channels")  # the papers leave them open


@dataclass(frozen=True, kw_only=True)
class PrintedError:
    """An error as a paper prints it.

    Attributes:
        net: a network's name, and `values`, changes to the specification of that name.
        data: "cifar10" or "cifar100" (test images), or "imagenet" (validation images).
        protocol: of the test, as `--protocol` takes it.
        recipe: the training: a recipe's name, and `training`, changes to its values.
        statistic: over the paper's runs: "one run", "mean of 5", "best of 5" or "median of 5".
        top1, top5: fractions; None where the paper prints none.
        above: where the paper prints only that the error is larger than this fraction.
    """

    net: str
    values: Mapping[str, Any] = field(default_factory=dict)
    data: str
    protocol: str = "1crop"
    recipe: str
    training: Mapping[str, Any] = field(default_factory=dict)
    statistic: str = "one run"
    top1: float | None = None
    top5: float | None = None
    above: float | None = None
    source: str

    @property
    def runs(self) -> int:
        """The number of runs behind it."""
        return 5 if self.statistic.endswith("of 5") else 1

    def is_network(self, spec: Specification) -> bool:
        """Whether a specification is this network, but for what the papers leave open."""
        other = get_specification(self.net, **self.values)
        return spec == replace(other, **{key: getattr(spec, key) for key in OPEN})


def _errors(
    errors: Mapping[tuple[str, str] | str, float | tuple[float, float] | str], **common: Any
) -> Iterator[PrintedError]:
    """Errors of one table: a network, or a network and one change to it, -> top-1, or (top-1, top-5), or ">20"; per cent."""
    for key, error in errors.items():
        net, change = key if isinstance(key, tuple) else (key, "")
        values = parse_changes(dict(pair.split("=") for pair in change.split()))
        figures: dict[str, Any] = {}
        if isinstance(error, str):
            figures["above"] = float(error.removeprefix(">")) / 100
        else:
            numbers = error if isinstance(error, tuple) else (error,)
            figures |= {name: round(e / 100, 6) for name, e in zip(("top1", "top5"), numbers, strict=False)}
        yield PrintedError(net=net, values=values, **figures, **common)


# Training of 2015's nets of 110 layers or more, of 2016's CIFAR nets, of its batch-64 net, and on ImageNet.
_WARM = {"recipe": "paper-cifar", "training": {"warmup": "train-error"}}
_LATER = {"recipe": "preact-cifar", "statistic": "median of 5"}
_SMALL_BATCH = {"batch": 64, "bn_batch": 32, "steps": 156_250, "milestones": (63_281, 95_313)}
_LARGE, _LARGE_2016 = ({"data": "imagenet", "recipe": recipe} for recipe in ("paper-imagenet", "preact-imagenet"))
PRINTED: tuple[PrintedError, ...] = (  # the most usual statistic of a network first
    *_errors(
        {"resnet20": 8.75, "resnet32": 7.51, "resnet44": 7.17, "resnet56": 6.97},
        data="cifar10", recipe="paper-cifar", source="2015 Table 6",
    ),
    *_errors({"resnet110": 6.61}, data="cifar10", statistic="mean of 5", source="2015 Table 6", **_WARM),
    *_errors({"resnet110": 6.43}, data="cifar10", statistic="best of 5", source="2015 Table 6", **_WARM),
    *_errors({"resnet1202": 7.93}, data="cifar10", source="2015 Table 6", **_WARM),
    *_errors({"plain110": ">60"}, data="cifar10", source="2015 Fig. 6 (in words)", **_WARM),
    *_errors(
        {
            "resnet110": 6.61,
            ("resnet110", "shortcut=none"): ">20",
            ("resnet110", "shortcut=constant shortcut_scale=0.5 residual_scale=1"): ">20",
            ("resnet110", "shortcut=constant shortcut_scale=0.5 residual_scale=0.5"): 12.35,
            **{("resnet110", f"shortcut=exclusive-gate gate_bias={b}"): ">20" for b in range(0, -6, -1)},
            ("resnet110", "shortcut=exclusive-gate gate_bias=-6"): 8.70,
            ("resnet110", "shortcut=exclusive-gate gate_bias=-7"): 9.81,
            ("resnet110", "shortcut=shortcut-gate gate_bias=0"): 12.86,
            ("resnet110", "shortcut=shortcut-gate gate_bias=-6"): 6.91,
            ("resnet110", "shortcut=conv"): 12.22,
            ("resnet110", "shortcut=dropout shortcut_dropout=0.5"): ">20",
        },
        data="cifar10", source="2016 Table 1", **_LATER,
    ),
    *_errors(
        {
            ("resnet110", "activation_order=bn-after-add"): 8.17,
            ("resnet110", "activation_order=relu-before-add"): 7.84,
            ("resnet110", "activation_order=relu-only-preact"): 6.71,
            "preresnet110": 6.37,
            "resnet164": 5.93,
            ("resnet164", "activation_order=bn-after-add"): 6.50,
            ("resnet164", "activation_order=relu-before-add"): 6.14,
            ("resnet164", "activation_order=relu-only-preact"): 5.91,
        },
        data="cifar10", source="2016 Table 2", **_LATER,
    ),
    *_errors(
        {
            ("resnet110", "layers=1 depths=36,36,36"): 9.90,
            ("preresnet110", "layers=1 depths=36,36,36"): 8.91,
            "resnet1001": 7.61,
        },
        data="cifar10", source="2016 Table 3", **_LATER,
    ),
    *_errors({"preresnet164": 5.46, "preresnet1001": 4.92}, data="cifar10", source="2016 Table 4", **_LATER),
    *_errors(
        {"resnet164": 25.16, "resnet1001": 27.82, "preresnet164": 24.33, "preresnet1001": 22.71},
        data="cifar100", source="2016 Table 4", **_LATER,
    ),
    *_errors({"preresnet1001": 4.62}, data="cifar10", source="2016 Table 4 (batch 64)", training=_SMALL_BATCH, **_LATER),
    *_errors(
        {"preresnet1001": 4.89}, data="cifar10", source="2016 Table 4", **_LATER | {"statistic": "mean of 5"}
    ),
    *_errors(
        {"preresnet1001": 4.69}, data="cifar10", source="2016 Table 4 (batch 64)", training=_SMALL_BATCH,
        **_LATER | {"statistic": "mean of 5"},
    ),
    *_errors(
        {"preresnet1001": 22.68}, data="cifar100", source="2016 Table 4", **_LATER | {"statistic": "mean of 5"}
    ),
    *_errors(
        {"resnet50": (24.7, 7.8), "resnet101": (23.6, 7.1), "resnet152": (23.0, 6.7)},
        protocol="1crop", source="the released models' README", **_LARGE,
    ),
    *_errors(
        {"plain18": 27.94, ("resnet18", "shortcut=A"): 27.88}, protocol="10crop", source="2015 Table 2", **_LARGE
    ),
    *_errors(
        {
            "plain34": (28.54, 10.02), ("resnet34", "shortcut=A"): (25.03, 7.76), "resnet34": (24.52, 7.46),
            ("resnet34", "shortcut=C"): (24.19, 7.40), "resnet50": (22.85, 6.71), "resnet101": (21.75, 6.05),
            "resnet152": (21.43, 5.71),
        },
        protocol="10crop", source="2015 Table 3", **_LARGE,
    ),
    *_errors(
        {
            "resnet34": (21.84, 5.71), ("resnet34", "shortcut=C"): (21.53, 5.60), "resnet50": (20.74, 5.25),
            "resnet101": (19.87, 4.60), "resnet152": (19.38, 4.49),
        },
        protocol=MULTISCALE, source="2015 Table 4", **_LARGE,
    ),
    *_errors({"resnet152": (21.3, 5.5)}, protocol="dense:320", source="2016 Table 5", **_LARGE),
    *_errors(
        {"preresnet152": (21.1, 5.5), "resnet200": (21.8, 6.0), "preresnet200": (20.7, 5.3)},
        protocol="dense:320", source="2016 Table 5", **_LARGE_2016,
    ),
    *_errors(
        {"preresnet200": (20.1, 4.8)}, protocol="dense:320", source="2016 Table 5 (aspect-ratio augmentation)",
        training={"crop": "resized"}, **_LARGE_2016,
    ),
    *_errors(
        {("resnet101", "activation_order=bn-after-add"): (24.6, 7.5)}, source="2016 §4.1", **_LARGE_2016
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PublishedErrors:
    """Errors as fractions, and their source."""

    top1_error: float
    top5_error: float | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return asdict(self)


def find_published(model: TrainedModel, data: str, split: str, protocol: Protocol, n: int) -> PublishedErrors | None:
    """The published errors of a model's network under a protocol, on all `n` images of the split; None where there are none.

    ImageNet's are for a split of its 1,000 classes that is as large as its validation split, is not called train, and is
    resized and cropped as in the published protocol.
    """
    if isinstance(model.net, OwnNetwork):
        return None
    if data in ("cifar10", "cifar100"):
        if split != "test" or n != 10_000:
            return None
        found = find_error(model.spec, data, str(protocol))
        if found is None:
            return None
        statistic = f", {found.statistic}" if found.runs > 1 else ""
        steps, own = found.training.get("steps", CIFAR_STEPS), model.recipe.get("steps")
        other = f"; this model {own:,}" if isinstance(own, int) and own != steps else ""
        return _published(found, f"{statistic}, {steps:,} steps on all 50,000 images{other}")
    if split == "train" or n != 50_000 or set(model.classes) != set(imagenet.imagenet_class_names().values()):
        return None
    own = model.metrics.get("published", {})
    if own.get("protocol") == str(protocol):
        return PublishedErrors(own["top1_error"], own.get("top5_error"), f"{model.recipe.get('source')}, ImageNet val")
    if model.preprocessing.size != (224, 224) or not (
        protocol.dense or protocol.sides_for(model.preprocessing) == (256,)
    ):
        return None
    found = find_error(model.spec, "imagenet", str(protocol))
    return _published(found, ", ImageNet val")


def find_error(spec: Specification, data: str, protocol: str) -> PrintedError | None:
    """The first printed top-1 error of a network under a test protocol, after whatever training."""
    of_test = (e for e in PRINTED if (e.data, e.protocol) == (data, protocol) and e.top1 is not None)
    return next((e for e in of_test if e.is_network(spec)), None)


def _published(found: PrintedError | None, about: str) -> PublishedErrors | None:
    if found is None or found.top1 is None:
        return None
    return PublishedErrors(found.top1, found.top5, found.source + about)
