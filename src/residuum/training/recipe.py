"""A recipe: every value that decides a training run's result, in one frozen value."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import tomli_w

from residuum.errors import RunError, UsageError, unknown
from residuum.models.spec import Specification, parse_changes, parse_value

_KINDS: dict[str, tuple[Any, str]] = {  # what the fields' annotations ask for
    "str": (str, "a word"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "tuple": ((list, tuple), "a list of whole numbers"),
    "Mapping": (Mapping, "a table"),
}
_CHOICES = {  # words that a field takes
    "compile": ("auto", "on", "off"),
    "schedule": ("milestones", "cosine", "plateau"),
    "warmup": ("none", "steps", "linear", "train-error"),
}
_RANGES: dict[str, tuple[float, float, str]] = {  # smallest and largest value, and how that is said
    **dict.fromkeys(("steps", "record_every", "judge_every", "patience"), (1, 10**9, "from 1 to 1,000,000,000")),
    **dict.fromkeys(("lr", "warmup_lr", "trunk_lr"), (5e-324, sys.float_info.max, "a number above 0")),
    **dict.fromkeys(("momentum", "ema", "stochastic_depth", "label_smoothing"), (0, 1 - 2**-53, "from 0 to below 1")),
    **dict.fromkeys(
        ("warmup_steps", "weight_decay", "checkpoint_minutes", "seed"), (0, sys.float_info.max, "0 or more")
    ),
    **dict.fromkeys(
        ("held_out", "resize", "bn_batch", "clip_norm", "precise_bn"), (0, sys.float_info.max, "0 or more")
    ),
    "batch": (1, 2**20, "from 1 to 1,048,576"),
    "size": (1, 4096, "from 1 to 4,096"),
    "threads": (0, 1024, "from 0 to 1,024"),
    "warmup_error": (5e-324, 1, "above 0 and at most 1"),
}
_SPECIFICATION = tuple(f.name for f in fields(Specification) if f.name not in ("channels", "classes"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every run has, whatever its task: data, network, schedule, optimizer, records. A task's recipe adds its own values.

    Complete and resolved: two runs of equal recipes on equal data and hardware end in the same bits.
    """

    task: ClassVar[str]  # a name of training.jobs; it stands in recipe.toml

    name: str  # of the recipe this one started from
    data: str  # data set: a name, a folder, or what else the task reads
    net: str  # network: a name of models.spec
    specification: Mapping[str, Any] = field(default_factory=dict)  # changes to what the network's name stands for
    init: str = "fan_in"  # "fan_in" or "fan_out": n of He's N(0, sqrt(2/n))
    batch: int  # pictures in a step, over all processes
    steps: int  # length of the run
    lr: float  # learning rate after warm-up
    schedule: str = "milestones"  # or "cosine", or "plateau": by the held-out error
    milestones: tuple[int, ...] = ()  # "milestones": steps at which the learning rate is divided by 10
    patience: int = 5  # "plateau": judgements in a row without a new lowest error, after which it is divided by 10
    warmup: str = "none"  # "steps" (2016: a fixed number), "linear" (rising), "train-error" (2015 §4.2: until a bound)
    warmup_lr: float = 0.01  # learning rate meanwhile; where "linear" starts
    warmup_steps: int = 400  # length of the rules "steps" and "linear"
    warmup_error: float = 0.8  # bound of the rule "train-error"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_all: bool = True  # weight decay on BN and biases too, or on the weights of convolutions and fc alone
    trunk_lr: float = 1.0  # factor of the learning rate for all but the fully connected layer
    clip_norm: float = 0.0  # largest length of the gradient, to which a longer one is scaled; 0 for none
    ema: float = 0.0  # decay a step of a moving average of the weights, which is what is judged and kept; 0 for none
    precision: str = "auto"  # "bf16", "fp32", or "auto": bf16 where the hardware computes it
    threads: int = (
        0  # CPU threads; 0 takes one for each core. The result's last bits depend on it, so a run keeps its number
    )
    record_every: int = 50  # steps between lines of metrics.jsonl
    judge_every: int = 1000  # steps between judgements of the held-out pictures
    checkpoint_minutes: float = 1.0  # time between checkpoints; 0 writes one after every step
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (kind, words) = getattr(self, f.name), _KINDS[str(f.type).split("[")[0]]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{f.name} must be {words}, not {value!r}.")
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            low, high, words = _RANGES.get(f.name, (-math.inf, math.inf, ""))
            if words and not low <= value <= high:
                raise UsageError(f"{f.name} must be {words}, not {value}.")
            if value not in (known := _CHOICES.get(f.name, (value,))):
                raise unknown(f.name, value, known)
        if not all(isinstance(m, int) and m > 0 for m in self.milestones):
            raise UsageError(f"milestones must be steps from 1 up, not {list(self.milestones)}.")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UsageError(f"milestones must rise, not {list(self.milestones)}.")

    def with_values(self, pairs: Mapping[str, str]) -> Self:
        """The recipe with values given as text, as `--set` takes them; keys of the network's specification count too.

        Raises UsageError for an unknown key (naming the nearest) or a value of the wrong kind.
        """
        own = {f.name: str(f.type) for f in fields(self) if f.name not in ("name", "specification")}
        for key in pairs:
            if key not in own and key not in _SPECIFICATION:
                raise unknown("key", key, [*own, *_SPECIFICATION])
        changes: dict[str, Any] = {key: parse_value(key, text, own[key]) for key, text in pairs.items() if key in own}
        specification = parse_changes({key: text for key, text in pairs.items() if key not in own})
        return replace(self, specification={**self.specification, **specification}, **changes)

    def shrunk(self, steps: int) -> Self:
        """The recipe with its whole schedule brought to `steps` in proportion: milestones, warm-up, the average's window."""
        if steps == self.steps:
            return self
        share = steps / self.steps
        return replace(
            self,
            steps=steps,
            milestones=tuple(dict.fromkeys(max(1, round(m * share)) for m in self.milestones)),
            warmup_steps=max(1, round(self.warmup_steps * share)) if self.warmup_steps else 0,
            judge_every=max(1, round(self.judge_every * share)),
            record_every=min(self.record_every, max(1, steps // 20)),
            ema=max(0.0, 1 - (1 - self.ema) / share) if self.ema else 0.0,
        )

    def strict(self) -> Self:
        """The recipe as it is to a run that has met nothing it cannot read: what becomes of that has decided nothing yet."""
        return self

    def differences(self, other: Training) -> list[str]:
        """What this recipe changes in `other`, as "key = value (not value)"."""
        ours, theirs = self.to_json(), other.to_json()
        return [
            f"{key} = {value!r} (not {theirs.get(key)!r})" for key, value in ours.items() if value != theirs.get(key)
        ]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; the task stands first."""
        values = {"task": self.task} | asdict(self)
        values["specification"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.specification.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_toml(self) -> str:
        """The text of recipe.toml."""
        return tomli_w.dumps(self.to_json())

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` or `to_toml` wrote; raises RunError where values are missing or unknown."""
        known = {f.name for f in fields(cls)}
        if strange := sorted(set(values) - known - {"task"}):
            raise RunError(f"recipe.toml has unknown keys {strange}; it was written by another version of residuum.")
        try:
            return cls(**{key: value for key, value in values.items() if key != "task"})
        except (TypeError, UsageError) as error:
            raise RunError(f"recipe.toml cannot be used: {error}") from error

    @property
    def key(self) -> str:
        """A hash of all values, 16 hex digits: runs of equal keys are the same run."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """A classifier's recipe."""

    task: ClassVar[str] = "classify"

    size: int  # side of the input, in pixels
    resize: int = 0  # evaluation: the shorter side is brought to this before the centre is cut out; 0 for `size`
    normalise: str = "per-pixel mean"  # or "per-channel mean and std"
    held_out: int = 0  # training pictures kept for judging while training; 0 trains on all of them
    on_bad_image: str = "stop"  # a picture that cannot be read: "stop", or "skip" (left out, counted and listed)
    quarantine: str = ""  # a file with one picture's name a line, left out from the start
    crop: str = "centre"  # augmentation: "centre" (none), "scale" (2015 §3.4), "resized" (random area and shape)
    scale: tuple[int, ...] = (256, 480)  # "scale": lengths of the shorter side, uniform between
    area: float = 0.08  # "resized": smallest share of the picture
    colour: bool = False  # augmentation: AlexNet's, along the principal components of RGB
    pad: int = 4  # augmentation: pixels added on each side before a random crop; 0 for none
    pad_with: str = "mean"  # "mean" (zeros after the mean is subtracted) or "black" (before)
    flip: bool = True  # augmentation: mirror half of the pictures
    trivial_augment: bool = False  # augmentation: one random change of random strength a picture
    erasing: float = 0.0  # augmentation: share of pictures in which a random rectangle is replaced by the mean
    mixup: float = 0.0  # mixes neighbours in a batch and their targets, shares from Beta(mixup, mixup); 0 for none
    cutmix: float = 0.0  # puts a box of the neighbour in, areas from Beta(cutmix, cutmix); 0 for none
    label_smoothing: float = 0.0  # this much of every target is spread evenly over all classes

    start_from: str = ""  # a model file to start from; its head is kept where it knows the same classes
    frozen_bn: bool = False  # leave BN's statistics, weights and biases as they are in start_from
    zero_init_last_bn: bool = False  # the last BN of every F starts at 0, so that every block starts as its shortcut
    stochastic_depth: float = 0.0  # share of pictures for which the last F is left out; less before it, linearly
    bn_batch: int = 0  # pictures that go through the network and BN together; 0: all of a process's share
    bn_sync: bool = False  # these pictures are spread over all processes, which exchange BN's statistics
    precise_bn: int = (
        0  # training batches over which BN's statistics are taken anew at the end; 0 keeps moving averages
    )
    compile: str = "auto"  # torch.compile: "on", "off", or "auto": where the run is long enough to pay for it
    recompute: bool = (
        False  # keep the maps of every √n-th block alone, compute the others again: less memory, more time
    )

    def strict(self) -> Self:
        return replace(self, on_bad_image="stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad > self.size or self.pad < 0:
            raise UsageError(f"pad must be from 0 to size ({self.size}), not {self.pad}.")
        if self.batch == 1:
            raise UsageError("batch must be 2 or more: batch normalisation needs more than one picture.")
        if 0 < self.resize < self.size:
            raise UsageError(f"resize must be 0 or at least size ({self.size}), not {self.resize}.")
        if self.frozen_bn and (self.precise_bn or self.bn_sync or not self.start_from):
            raise UsageError(
                "frozen_bn keeps the statistics of start_from: set that, and leave out precise_bn and bn_sync."
            )
        if self.bn_batch and (self.bn_batch < 2 or self.batch % self.bn_batch):
            fitting = [n for n in range(2, self.batch + 1) if self.batch % n == 0]
            near = min(fitting, key=lambda n: abs(n - self.bn_batch))
            raise UsageError(
                f"bn_batch {self.bn_batch} does not divide the batch of {self.batch}; the nearest that does is {near}."
            )
