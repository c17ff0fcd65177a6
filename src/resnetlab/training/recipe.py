"""A recipe: every value that determines the result of a training run, in one frozen dataclass."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import tomli_w

from resnetlab.data.dataset import A_TENTH, DECODE_ON
from resnetlab.data.object_store import refuse_password, strip_password
from resnetlab.errors import RunError, UsageError, unknown_name_error
from resnetlab.models.reference_images import MAX_TRAINING
from resnetlab.models.spec import Specification, parse_changes, parse_value
from resnetlab.peer_words import ANSWERS, translate
from resnetlab.preprocessing import MAX_CHANNELS
from resnetlab.random import MAX_UNDIVIDED, SAMPLING_VERSION

_KINDS: dict[str, tuple[Any, str]] = {  # by the fields' annotations: type, and its name in messages
    "str": (str, "a word"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "tuple": ((list, tuple), "a list of whole numbers"),
    "Mapping": (Mapping, "a table"),
}
_CHOICES = {  # allowed words, by field
    "compile": ("auto", "on", "off", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "winograd": ("auto", "on", "off"),
    "fused_bn": ("auto", "on", "off"),
    "schedule": ("milestones", "cosine", "plateau"),
    "warmup": ("none", "steps", "linear", "train-error"),
    "sampling": ("auto", "shuffle", "balanced", "keyed", "shards"),
    "keep": ("last", "best"),
    "grad_reduce": ("tree", "all_reduce"),
    "grad_compression": ("none", "bf16"),
    "decode_on": DECODE_ON,
}
_SWITCHES = {"true": "on", "false": "off"}  # of a choice with "on" and "off"
_RANGES: dict[str, tuple[float, float, str]] = {  # smallest and largest value, and the range in words
    **dict.fromkeys(("steps", "log_every", "eval_every", "patience", "regions"), (1, 10**9, "from 1 to 1,000,000,000")),
    **dict.fromkeys(
        ("lr", "warmup_lr", "backbone_lr_scale", "eps", "trust_coefficient"),
        (5e-324, sys.float_info.max, "a number above 0"),
    ),
    **dict.fromkeys(
        ("momentum", "beta1", "beta2", "ema_decay", "stochastic_depth", "label_smoothing"),
        (0, 1 - 2**-53, "from 0 to below 1"),
    ),
    **dict.fromkeys(
        ("warmup_steps", "weight_decay", "checkpoint_minutes", "seed"), (0, sys.float_info.max, "0 or more")
    ),
    **dict.fromkeys(("eval_resize", "bn_batch", "clip_norm", "precise_bn"), (0, sys.float_info.max, "0 or more")),
    "val_images": (A_TENTH, sys.float_info.max, f"0 or more, or {A_TENTH} for a tenth of the training images"),
    "shard_groups": (0, 2**16, "from 1 to 65,536, or 0 for one a machine"),
    "sampling_version": (1, SAMPLING_VERSION, f"from 1 to {SAMPLING_VERSION}"),
    "none_share": (0, 0.5, "from 0 to 0.5"),
    "channels": (0, MAX_CHANNELS, f"from 1 to {MAX_CHANNELS:,}, or 0 for those of the images"),
    "early_stop": (0, 10**9, "0 or more"),
    "batch": (1, 2**20, "from 1 to 1,048,576"),
    "lr_base_size": (0, 2**20, "from 1 to 1,048,576, or 0 for the batch"),
    "image_size": (0, 4096, "from 1 to 4,096, or 0 for that of start_from"),
    **dict.fromkeys(("threads", "op_threads"), (0, 1024, "from 0 to 1,024")),
    "keep_images": (0, MAX_TRAINING, f"from 0 to {MAX_TRAINING}"),
    "warmup_error": (5e-324, 1, "above 0 and at most 1"),
}
DECIDED = ("precision", "compile", "winograd", "fused_bn", "sampling")  # "auto" becomes another value when a run starts
RESCALED = ("milestones", "warmup_steps", "eval_every", "log_every", "ema_decay")  # what another length changes
EVAL_RATIO = 8 / 7  # of eval_resize to image_size where a recipe has neither: 256 to 224
# values that version 0.2 adds: left out of files and hashes where they change nothing, so older runs resume
_ADDED = {
    "exact", "keep_images", "groups", "fold", "class_weights", "sampling", "keep", "early_stop", "frozen_stages",
    "flip_vertical", "rotate", "lr_base_size", "trust_coefficient", "grad_reduce", "grad_compression", "none_share",
    "transform", "channels", "decode_on", "shard_groups", "sampling_version",
}  # fmt: skip
_NOT_CHOSEN = ("name", "specification", "sampling_version")  # by a key of their own
_FRACTION = re.compile(r"0?\.[0-9]+")
_SPECIFICATION = tuple(f.name for f in fields(Specification) if f.name not in ("channels", "classes"))


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """The values shared by all tasks: data, network, schedule, optimizer, records. Each task's recipe adds its own.

    Complete and resolved: runs of equal recipes on equal data and hardware are bit-identical.
    """

    task: ClassVar[str]  # the key of the task, written into recipe.toml

    name: str  # of the recipe that this one derives from
    data: str  # data set: a name, a folder, or what else the task reads
    net: str  # network: a name of models.spec
    specification: Mapping[str, Any] = field(default_factory=dict)  # changes to the specification of that name
    init: str = "fan_in"  # "fan_in" or "fan_out": n of He's N(0, sqrt(2/n))
    batch: int  # images in a step, over all processes
    bn_batch: int = 0  # images of the micro-batch that BN sees ("ghost batch"); 0: all of a process's share
    steps: int  # length of the run
    lr: float  # learning rate after warm-up
    schedule: str = "milestones"  # or "cosine", or "plateau": by the held-out error
    milestones: tuple[int, ...] = ()  # "milestones": steps at which the learning rate is divided by 10
    patience: int = 5  # "plateau": evaluations in a row without a new lowest error, after which it is divided by 10
    warmup: str = "none"  # "steps" (2016: a fixed number), "linear" (rising), "train-error" (2015 §4.2: until a bound)
    warmup_lr: float = 0.01  # learning rate during warm-up; start value of "linear"
    warmup_steps: int = 400  # length of "steps" and "linear"
    warmup_error: float = 0.8  # bound of "train-error"
    lr_base_size: int = 0  # the batch that `lr` is for: in a batch of k times it, it is k times `lr`; 0: `batch`
    optimizer: str = "sgd"  # or "adamw", "lars", "lamb": a key of training.optim.OPTIMIZERS
    momentum: float = 0.9  # of "sgd" and "lars"
    trust_coefficient: float = 0.001  # of "lars"
    beta1: float = 0.9  # of "adamw" and "lamb"
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decay_all: bool = True  # weight decay on BN and biases too, or only on the weights of convolutions and fc
    backbone_lr_scale: float = 1.0  # factor of the learning rate for all but the head
    clip_norm: float = 0.0  # largest norm of the gradient; a larger one is scaled down to it; 0 for none
    ema_decay: float = 0.0  # decay per step of the weights' moving average, which is evaluated and saved; 0 for none
    precision: str = "auto"  # "bf16", "fp16", "tf32", "fp32"; "auto": bf16, or else fp16, if the hardware computes it
    threads: int = 0  # CPU threads of all processes; 0: one per core. A run may be resumed with another number
    op_threads: int = 0  # threads inside each operation, which decide the last bits; 0: as many as are left over
    exact: bool = True  # on a GPU kernels that add in a fixed order; False: the fastest, so runs repeat approximately
    # kernels compiled for a CPU: "on", "off", or "auto": in a long run in fp32 where there is a compiler
    winograd: str = "auto"  # on a CPU: 3x3 convolutions by Winograd's algorithm
    fused_bn: str = "auto"  # BN, the addition and ReLU in one function
    grad_reduce: str = "tree"  # sum over processes: bit-identical for any number, or "all_reduce", the library's own
    grad_compression: str = "none"  # what travels between processes: float32, or "bf16" for half the bytes
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 1000  # steps between evaluations of the held-out images
    checkpoint_minutes: float = 1.0  # time between checkpoints; 0 writes one after every step
    seed: int = 0
    sampling_version: int = SAMPLING_VERSION  # of the augmentation's random numbers; not chosen: a run keeps its own

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (kind, words) = getattr(self, f.name), _KINDS[str(f.type).split("[")[0]]
            if "on" in _CHOICES.get(f.name, ()) and str(value).lower() in _SWITCHES:
                value = _SWITCHES[str(value).lower()]
                object.__setattr__(self, f.name, value)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{f.name} must be {words}, not {value!r}.")
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            low, high, words = _RANGES.get(f.name, (-math.inf, math.inf, ""))
            if words and not low <= value <= high:
                raise UsageError(f"{f.name} must be {words}, not {value}.")
            if value not in (known := _CHOICES.get(f.name, (value,))):
                raise unknown_name_error(f.name, value, known)
        refuse_password(self.data)
        if not all(isinstance(m, int) and m > 0 for m in self.milestones):
            raise UsageError(f"milestones must be steps from 1 up, not {list(self.milestones)}.")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UsageError(f"milestones must rise, not {list(self.milestones)}.")
        if self.batch > 1 and self.bn_batch and self.batch % self.bn_batch:
            near = _nearest_divisor(self.batch, self.bn_batch)
            raise UsageError(
                f"bn_batch {self.bn_batch} does not divide the batch of {self.batch}; the nearest that does is {near}."
            )

    @classmethod
    def keys(cls) -> list[str]:
        """The keys that `with_values` takes: values of the recipe and of the network's specification."""
        return [f.name for f in fields(cls) if f.name not in _NOT_CHOSEN] + list(_SPECIFICATION)

    @classmethod
    def find_key(cls, word: str) -> str | None:
        """The key that a word, ours or another program's, stands for; None if there is none."""
        own = [f.name for f in fields(cls) if f.name not in _NOT_CHOSEN]
        return word if word in own or word in _SPECIFICATION else translate(word, own)

    def with_values(self, pairs: Mapping[str, str]) -> Self:
        """The recipe with values given as text, as for `--set`; keys of the network's specification are allowed too.

        Other programs' words for a key, such as batch_size, are understood.

        Raises UsageError for an unknown key (suggesting the nearest) or a value of the wrong type.
        """
        own = {f.name: str(f.type) for f in fields(self) if f.name not in _NOT_CHOSEN}
        given: dict[str, str] = {}  # our key: the word it was given by
        for word in pairs:
            key = self.find_key(word)
            if word in ANSWERS and key != word:
                raise UsageError(f"unknown key {word!r}; {ANSWERS[word]}")
            if key is None:
                raise unknown_name_error("key", word, self.keys())
            if key in given:
                raise UsageError(f"{word} and {given[key]} are the same value; give it once.")
            given[key] = word
        pairs = {key: pairs[word] for key, word in given.items()}
        if _FRACTION.fullmatch(share := pairs.get("val_images", "")):
            raise UsageError(
                f"{given['val_images']} is how many images are held out, not the share {share} of them; its key is val_images: "
                f"--set val_images=500, or --set val_images={A_TENTH} for a tenth."
            )
        changes: dict[str, Any] = {key: parse_value(key, text, own[key]) for key, text in pairs.items() if key in own}
        specification = parse_changes({key: text for key, text in pairs.items() if key not in own})
        specification = {**self.specification, **specification}
        return replace(self, specification=specification, **self.with_implied(changes))

    def with_implied(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Changes of values, with those that follow from them.

        A learning rate that is scaled up with the batch rises to its value in the first eighteenth of the run, as in 5 of 90
        epochs (Goyal et al. 2017, arXiv 1706.02677, §2.2), unless the recipe has a warm-up. An evaluation's resize keeps its
        ratio to the input's size. BN's batch becomes the nearest number that divides the batch.
        """
        batch = changes.get("batch", self.batch)
        if self.bn_batch and batch % self.bn_batch and "bn_batch" not in changes:
            changes = changes | {"bn_batch": _nearest_divisor(batch, self.bn_batch)}
        base = changes.get("lr_base_size", self.lr_base_size)
        if not 0 < base < batch or "warmup" in changes or self.warmup != "none":
            return changes
        steps = max(1, round(changes.get("steps", self.steps) / 18))
        return {"warmup": "linear", "warmup_lr": changes.get("lr", self.lr), "warmup_steps": steps} | changes

    @property
    def scaled_lr(self) -> float:
        """The learning rate after warm-up, in steps of this batch."""
        return self.lr * self.batch / self.lr_base_size if self.lr_base_size else self.lr

    def rescale(self, steps: int) -> Self:
        """The recipe with its schedule rescaled to `steps`: milestones, warm-up, evaluations, the weight average's window."""
        if steps == self.steps:
            return self
        share = steps / self.steps
        return replace(
            self,
            steps=steps,
            milestones=tuple(dict.fromkeys(max(1, round(m * share)) for m in self.milestones)),
            warmup_steps=max(1, round(self.warmup_steps * share)) if self.warmup_steps else 0,
            eval_every=max(1, round(self.eval_every * share)),
            log_every=min(self.log_every, max(1, steps // 20)),
            ema_decay=max(0.0, 1 - (1 - self.ema_decay) / share) if self.ema_decay else 0.0,
        )

    def resolve_like(self, recorded: BaseRecipe) -> Self:
        """The recipe with the values that are left open ("auto", op_threads 0, no network, A_TENTH) from a recorded one."""
        values: dict[str, Any] = {
            key: getattr(recorded, key, "auto") for key in DECIDED if getattr(self, key, "") == "auto"
        }
        if not self.net:
            values |= {"net": recorded.net, "specification": recorded.specification}
        if getattr(self, "val_images", 0) == A_TENTH:
            values["val_images"] = getattr(recorded, "val_images", A_TENTH)
        values |= {"threads": recorded.threads, "sampling_version": recorded.sampling_version}
        return replace(self, op_threads=self.op_threads or recorded.op_threads, **values)

    def with_micro_batch_of(self, recorded: BaseRecipe) -> Self:
        """The recipe with the micro-batch of a recorded one, where that is found by trying."""
        return self

    def skip_bad_images_like(self, requested: BaseRecipe) -> Self:
        """The recipe that skips unreadable images if the requested one does: a run that one stopped may continue so."""
        return self

    def ignoring_bad_images(self) -> Self:
        """The recipe without its choice for unreadable images, which changes nothing in a run that has met none."""
        return self

    def other_values(self, other: BaseRecipe) -> dict[str, Any]:
        """The values of `other` that are not this recipe's, by key."""
        ours, theirs = self._values(), other._values()
        return {key: theirs.get(key) for key, value in ours.items() if value != theirs.get(key)}

    def differences(self, other: BaseRecipe) -> list[str]:
        """The differences of this recipe from `other`, as "key = value (not value)", or "key = value" if `other` has none."""
        ours, theirs = self._values(), self.other_values(other).items()
        return [f"{key} = {ours[key]!r}{'' if value == '' else f' (not {value!r})'}" for key, value in theirs]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, the task first."""
        defaults = {f.name: f.default for f in fields(self)} | {"sampling": "shuffle"}
        if self.batch > MAX_UNDIVIDED:
            defaults["sampling_version"] = 1
        return {k: v for k, v in self._values().items() if k not in _ADDED or v != defaults[k]}

    def _values(self) -> dict[str, Any]:
        values = {"task": self.task} | asdict(self)
        values["specification"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.specification.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_toml(self) -> str:
        """The text of recipe.toml."""
        return tomli_w.dumps(self.to_json())

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json` and `to_toml`, without a password in the address of the data, as earlier versions kept.

        Raises RunError if values are missing or unknown.
        """
        # until this key was recorded, all threads worked inside each operation, on one micro-batch after the other
        # and all kernels were torch's; every order was a table
        values = {"op_threads": values.get("threads", 0), "winograd": "off", "fused_bn": "off"} | dict(values)
        known = {f.name for f in fields(cls)}
        small = values.get("batch") in range(MAX_UNDIVIDED + 1)
        values.setdefault("sampling_version", SAMPLING_VERSION if small else 1)
        if "sampling" in known:
            values.setdefault("sampling", "shuffle")
        if isinstance(values.get("data"), str):
            values["data"] = strip_password(values["data"])
        if strange := sorted(set(values) - known - {"task"}):
            raise RunError(f"recipe.toml has unknown keys {strange}; it was written by another version of resnetlab.")
        try:
            return cls(**{key: value for key, value in values.items() if key != "task"})
        except (TypeError, UsageError) as error:
            raise RunError(f"recipe.toml cannot be used: {error}") from error

    @property
    def key(self) -> str:
        """A hash of all values that decide the result, 16 hex digits: runs with equal keys are the same run."""
        return self.key_with_data(self.data)

    def key_with_data(self, data: str) -> str:
        """The key with another name of the data: an earlier version's, which had a password in it."""
        values = self.to_json() | {"data": data}
        for form in ("fused_bn", "winograd"):
            if values[form] == "off":  # as before there was another form
                del values[form]
        if values.get("sampling") == "auto":  # "shuffle" of as many images as runs had then
            del values["sampling"]
        values["threads"] = values.pop("op_threads") or self.threads  # as it was called when there were no others
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """A classifier's recipe."""

    task: ClassVar[str] = "classify"

    channels: int = 0  # of the images; 0 finds it: 3 of 8 bits, or as the files have them (data.decode)
    image_size: int  # side of the input, in pixels; 0 takes that of start_from, and its eval_resize
    eval_resize: int = 0  # evaluation: the shorter side is resized to this before the centre crop; 0 for `image_size`
    normalise: str = "per-pixel mean"  # or "per-channel mean and std"
    val_images: int = 0  # training images held out for evaluation during training; 0: none, A_TENTH: see data.dataset
    on_bad_image: str = "stop"  # an image that cannot be read: "stop", or "skip" (left out, counted and listed)
    decode_on: str = "cpu"  # what decodes JPEGs and resizes images on disk, or "device": the GPU, with other pixels
    quarantine: str = ""  # a file of image names, one per line, that are left out from the start
    groups: str = ""  # a table's column, or a pattern in names: images of equal values are held out together
    fold: str = ""  # "2/5": hold out the second of five equal parts for the test, as k-fold cross-validation does
    class_weights: str = "none"  # of the loss: "none", "balanced" (training.class_balance), or "cat=2,dog=0.5"
    # "shuffle"; "keyed": another order, which takes no memory; "auto": this one for more than a million images;
    # "balanced": equally many images of every class; or "shards": a few shards at a time (data.shard_order), so that each
    # machine fetches its own alone
    sampling: str = "auto"
    shard_groups: int = 0  # of sampling=shards: a multiple of the number of machines; 0: their number
    keep: str = "last"  # weights of the last step, or "best": those of the lowest error on the held-out images
    early_stop: int = 0  # evaluations in a row without a new lowest held-out error, after which the run ends; 0 never
    none_share: float = 0.0  # share of held-out images that predictions may call "none of these"; 0: none
    crop: str = "centre"  # augmentation: "centre" (none), "scale" (2015 §3.4), "resized" (random area and shape)
    scale: tuple[int, ...] = (256, 480)  # "scale": lengths of the shorter side, uniform between
    area: float = 0.08  # "resized": smallest share of the image
    colour: bool = False  # augmentation: AlexNet's, along the principal components of RGB
    pad: int = 4  # augmentation: pixels added on each side before a random crop; 0 for none
    pad_with: str = "mean"  # "mean" (zeros after the mean is subtracted) or "black" (before)
    flip: bool = True  # augmentation: mirror half of the images
    flip_vertical: bool = False  # augmentation: turn half of the images upside down
    rotate: float = 0.0  # augmentation: largest angle in degrees, either way; corners get the mean
    transform: str = ""  # augmentation: the name of a function of one's own, given in Python (data.own_transform)
    trivial_augment: bool = False  # augmentation: one random change of random strength per image
    erasing: float = 0.0  # augmentation: share of images in which a random rectangle is replaced by the mean
    mixup: float = 0.0  # mixes neighbours in a batch and their targets, with shares from Beta(mixup, mixup); 0 for none
    cutmix: float = 0.0  # pastes a box of the neighbour, with areas from Beta(cutmix, cutmix); 0 for none
    label_smoothing: float = 0.0  # the share of every target that is spread evenly over all classes

    keep_images: int = MAX_TRAINING  # most images that the model file keeps, to check and calibrate backends on
    start_from: str = ""  # a model file to start from; its head is kept if it has the same classes
    frozen_stages: str = ""  # the deepest map that keeps the weights of start_from ("C1" the stem, …); "": none
    frozen_bn: bool = False  # keep BN's statistics, weights and biases of start_from
    zero_init_last_bn: bool = False  # the last BN weight of every F starts at 0, so every block starts as its shortcut
    stochastic_depth: float = 0.0  # share of images for which the last F is dropped; linearly less in earlier blocks
    bn_sync: bool = False  # spread that micro-batch over all processes, with synchronised BN statistics
    precise_bn: int = 0  # training batches that re-estimate BN's statistics at the end; 0 keeps moving averages
    compile: str = "auto"  # torch.compile: "on", "off", or "auto": if the run is long enough for it to pay off
    recompute: bool = False  # keep only every √n-th block's activations, recompute the others: slow, in less memory

    def with_implied(self, changes: dict[str, Any]) -> dict[str, Any]:
        changes = super().with_implied(changes)
        if not changes.get("image_size") or "eval_resize" in changes or (self.image_size and not self.eval_resize):
            return changes
        ratio = self.eval_resize / self.image_size if self.image_size else EVAL_RATIO
        return changes | {"eval_resize": round(ratio * changes["image_size"])}

    def resolve_like(self, recorded: BaseRecipe) -> Self:
        recipe = super().resolve_like(recorded)
        if not isinstance(recorded, Recipe):
            return recipe
        left_open = {
            key: getattr(recorded, key) for key in ("channels", "transform", "shard_groups") if not getattr(self, key)
        }
        recipe = replace(recipe, **left_open)
        if self.image_size:
            return recipe
        return replace(recipe, image_size=recorded.image_size, eval_resize=recorded.eval_resize)

    def with_micro_batch_of(self, recorded: BaseRecipe) -> Self:
        return replace(self, bn_batch=recorded.bn_batch) if isinstance(recorded, Recipe) else self

    def skip_bad_images_like(self, requested: BaseRecipe) -> Self:
        skips = isinstance(requested, Recipe) and requested.on_bad_image == "skip"
        return replace(self, on_bad_image="skip") if skips else self

    def ignoring_bad_images(self) -> Self:
        return replace(self, on_bad_image="stop")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad > self.image_size > 0 or self.pad < 0:
            raise UsageError(f"pad must be from 0 to image_size ({self.image_size}), not {self.pad}.")
        for key in ("batch", "bn_batch"):
            if getattr(self, key) == 1:
                raise UsageError(f"{key} must be 2 or more: batch normalisation needs more than one image.")
        if 0 < self.eval_resize < self.image_size:
            raise UsageError(
                f"eval_resize must be 0 or at least image_size ({self.image_size}), not {self.eval_resize}."
            )
        if self.frozen_stages and not self.start_from:
            raise UsageError("frozen_stages keeps the weights of start_from: set that (--start-from MODEL).")
        if self.frozen_bn and (self.precise_bn or self.bn_sync or not self.start_from):
            raise UsageError(
                "frozen_bn keeps the statistics of start_from: set that, and leave out precise_bn and bn_sync."
            )


def _nearest_divisor(batch: int, wanted: int) -> int:
    """The divisor of a batch, 2 or more, that is nearest to a wanted one; 0 if there is none."""
    divisors = (n for n in range(2, batch + 1) if batch % n == 0)
    return min(divisors, key=lambda n: abs(n - wanted), default=0)


R = TypeVar("R", bound=BaseRecipe)


class Epochs(NamedTuple):
    """The length of a run in epochs; it becomes steps when the images to train on are counted.

    Attributes:
        values: that were given beside it, as text; those that a rescaled schedule would change stay as they are.
    """

    number: float
    values: Mapping[str, str] = {}

    def apply(self, recipe: R, images: int) -> R:
        """The recipe rescaled to so many epochs of `images` images, to whole steps."""
        if not 0 < self.number <= 1e6:
            raise UsageError(f"--epochs must be above 0 and at most 1,000,000, not {self.number:g}.")
        rescaled = recipe.rescale(max(1, round(self.number * images / recipe.batch)))
        return rescaled.with_values({k: v for k, v in self.values.items() if recipe.find_key(k) in RESCALED})


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Values that a command changes in a recipe; None and the empty mapping change nothing.

    Attributes:
        steps: length of the run; the schedule is rescaled to it.
        epochs: the same in epochs, which `length` gives to `RunOptions`: the images are counted when a run starts.
        values: any other values as text, as `--set` takes them.
    """

    data: str | None = None
    net: str | None = None
    steps: int | None = None
    epochs: float | None = None
    seed: int | None = None
    values: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, kinds in (("steps", self.steps, int), ("epochs", self.epochs, int | float)):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise UsageError(f"{name} must be a {'whole ' * (kinds is int)}number, not {value!r}.")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs are both the length of the run; give one of them.")

    @property
    def length(self) -> Epochs | None:
        """The length of the run, if it is given in epochs."""
        return None if self.epochs is None else Epochs(self.epochs, dict(self.values))

    def apply(self, recipe: R) -> R:
        """The recipe with these values. Raises UsageError for an unknown key or a value of the wrong type."""
        given: dict[str, Any] = {"data": self.data, "net": self.net, "seed": self.seed}
        recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
        if self.values.get("start_from") and self.net is None:
            recipe = replace(recipe, net="")  # the weights bring their network
        if self.steps is not None:
            if self.steps < 1:
                raise UsageError(f"--steps must be 1 or more, not {self.steps}.")
            recipe = recipe.rescale(self.steps)
        return recipe.with_values(self.values)
