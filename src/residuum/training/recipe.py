"""A recipe: every value that decides a training run's result, in one frozen value."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

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
WARMUPS = ("none", "steps", "train-error")
_SPECIFICATION = tuple(f.name for f in fields(Specification) if f.name not in ("channels", "classes"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Complete and resolved: two runs of equal recipes on equal data and hardware end in the same bits."""

    name: str  # of the recipe this one started from
    data: str  # data set: "digits", "cifar10", "cifar100", or a folder of class folders
    net: str  # network: a name of models.spec
    specification: Mapping[str, Any] = field(default_factory=dict)  # changes to what the network's name stands for
    init: str = "fan_in"  # "fan_in" or "fan_out": n of He's N(0, sqrt(2/n))
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
    batch: int  # pictures in a step
    steps: int  # length of the run
    lr: float  # learning rate after warm-up
    milestones: tuple[int, ...]  # steps at which the learning rate is divided by 10
    warmup: str = (
        "none"  # "steps" (2016: a fixed number) or "train-error" (2015 §4.2: until training error falls below a bound)
    )
    warmup_lr: float = 0.01  # learning rate meanwhile
    warmup_steps: int = 400  # length of the rule "steps"
    warmup_error: float = 0.8  # bound of the rule "train-error"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_all: bool = True  # weight decay on BN and biases too, or on the weights of convolutions and fc alone
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
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if not all(isinstance(m, int) and m > 0 for m in self.milestones):
            raise UsageError(f"milestones must be steps from 1 up, not {list(self.milestones)}.")
        for key, most in (
            ("batch", 2**20),
            ("steps", 10**9),
            ("size", 4096),
            ("record_every", 10**9),
            ("judge_every", 10**9),
        ):
            if not 1 <= getattr(self, key) <= most:
                raise UsageError(f"{key} must be from 1 to {most:,}, not {getattr(self, key)}.")
        if self.batch == 1:
            raise UsageError("batch must be 2 or more: batch normalisation needs more than one picture.")
        if self.pad > self.size or self.threads > 1024:
            raise UsageError(
                f"pad {self.pad} (at most the size, {self.size}) or threads {self.threads} (1,024) is too large."
            )
        object.__setattr__(self, "scale", tuple(self.scale))
        if 0 < self.resize < self.size:
            raise UsageError(f"resize must be 0 or at least size ({self.size}), not {self.resize}.")
        for key in (
            "held_out",
            "resize",
            "pad",
            "warmup_steps",
            "momentum",
            "weight_decay",
            "threads",
            "checkpoint_minutes",
            "seed",
        ):
            if not 0 <= getattr(self, key) < math.inf:
                raise UsageError(f"{key} must be 0 or more, not {getattr(self, key)}.")
        if self.momentum >= 1 or not 0 < self.warmup_error <= 1:
            raise UsageError(f"momentum {self.momentum} must be below 1, warmup_error {self.warmup_error} in (0, 1].")
        for key in ("lr", "warmup_lr"):
            if not 0 < getattr(self, key) < math.inf:
                raise UsageError(f"{key} must be a number above 0, not {getattr(self, key)}.")
        if self.warmup not in WARMUPS:
            raise unknown("warmup", self.warmup, WARMUPS)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UsageError(f"milestones must rise, not {list(self.milestones)}.")

    def with_values(self, pairs: Mapping[str, str]) -> Recipe:
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

    def shrunk(self, steps: int) -> Recipe:
        """The recipe with its whole schedule brought to `steps` in proportion: milestones and a warm-up of fixed length."""
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
        )

    def differences(self, other: Recipe) -> list[str]:
        """What this recipe changes in `other`, as "key = value (not value)"."""
        ours, theirs = self.to_json(), other.to_json()
        return [f"{key} = {value!r} (not {theirs[key]!r})" for key, value in ours.items() if value != theirs[key]]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        changes = {k: list(v) if isinstance(v, tuple) else v for k, v in self.specification.items()}
        return asdict(self) | {
            "milestones": list(self.milestones),
            "scale": list(self.scale),
            "specification": changes,
        }

    def to_toml(self) -> str:
        """The text of recipe.toml."""
        return tomli_w.dumps(self.to_json())

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` or `to_toml` wrote; raises RunError where values are missing or unknown."""
        known = {f.name for f in fields(Recipe)}
        if strange := sorted(set(values) - known):
            raise RunError(f"recipe.toml has unknown keys {strange}; it was written by another version of residuum.")
        try:
            return Recipe(**values)
        except (TypeError, UsageError) as error:
            raise RunError(f"recipe.toml cannot be used: {error}") from error

    @property
    def key(self) -> str:
        """A hash of all values, 16 hex digits: runs of equal keys are the same run."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
