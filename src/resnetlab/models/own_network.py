"""A network of the user's own, given in Python: what training, model files and predictions need of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.errors import ModelFileError, UsageError
from resnetlab.formatting import format_count
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import nearest_name

OWN = "own:"  # before the class's name, in the recipe of a run whose network was given in Python
# what others wrap around a network; its parameters have other names then
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True, kw_only=True)
class OwnSpecification:
    """What a model file records of a network whose layers only its class knows."""

    own_class: str
    channels: int
    classes: int

    @property
    def summary(self) -> str:
        """The network in a few words."""
        return "a network of your own"

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary, as in the model file."""
        return asdict(self)


class OwnNetwork(nn.Module):
    """The user's module, which gives logits, (B, classes), or an object with `logits` (transformers, torchvision's Inception).

    Attributes:
        draws: whether it draws random numbers in training.
    """

    def __init__(self, module: nn.Module, channels: int, classes: int, draws: bool = False) -> None:
        super().__init__()
        self.module, self.draws = module, draws
        self.spec = OwnSpecification(own_class=class_name(module), channels=channels, classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        output = self.module(x)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, C, h, w), of a module that has this method, as timm's do; else UsageError."""
        forward = getattr(self.module, "forward_features", None)
        features = forward(x) if forward is not None else None
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise UsageError(
                f"{self.spec.own_class} is a network of your own; features need its method forward_features, (B, C, h, w)."
            )
        return features

    def forward_class_maps(self, x: Tensor, window: tuple[int, int] = (1, 1)) -> Tensor:
        """Raises UsageError: dense protocols need the last layers."""
        raise own_network_error(self)


Network = ResNet | OwnNetwork


def own_network_error(net: OwnNetwork) -> UsageError:
    """The error for what needs the layers of a residual network."""
    return UsageError(
        f"this needs the layers of one of ResNetLab's networks; {net.spec.own_class} is a network of your own."
    )


def class_name(module: nn.Module) -> str:
    """The name by which recipes and model files record a module: its class's, or the nearest name of a ResNet."""
    return nearest_name(module.spec)[0] if isinstance(module, ResNet) else type(module).__qualname__.rpartition(".")[2]


def check_module(module: nn.Module) -> None:
    """Raises UsageError for a module that cannot be trained as it is."""
    if (name := type(module).__name__) in _WRAPPERS:
        inside = "_orig_mod" if name == "OptimizedModule" else "module"
        raise UsageError(f"net is wrapped in {name}; give the network inside it, net.{inside}.")
    if any(nn.parameter.is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        raise UsageError(
            f"net has parameters without a shape; call {class_name(module)} once on a batch before training."
        )
    if strange := [key for key, value in module.state_dict().items() if not isinstance(value, Tensor)]:
        raise UsageError(
            f"{class_name(module)} keeps other things than tensors in its state_dict, such as {strange[0]}."
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise UsageError(f"{class_name(module)} has no parameter to train.")
    if any(p.is_meta for p in module.parameters()):
        raise UsageError(f"{class_name(module)} is on the device meta, without weights; build it on a CPU or GPU.")


def adopt_network(module: nn.Module, shape: tuple[int, int, int], classes: int) -> Network:
    """The network to train, with the module itself in it, after a trial of a copy on two images in eval and train mode.

    Args:
        shape: (C, h, w) of the images.

    Raises UsageError if the module cannot be copied or takes no such images, or gives other than (2, classes) logits.
    """
    check_module(module)
    name = class_name(module)
    try:
        trial = OwnNetwork(copy.deepcopy(module), shape[0], classes)
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{name} cannot be copied, as evaluation needs: {error!r}.") from error
    device = next(module.parameters()).device
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    for mode in (False, True):
        before = torch.get_rng_state()
        try:
            with torch.no_grad():
                logits = trial.train(mode)(images)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{name} failed on two images of {' x '.join(map(str, shape))} (channels, height, width): {reason[:300]}"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"{name} gives {found} for two images, not logits of shape {(2, classes)}: the data have "
                f"{format_count(classes, 'class')}."
            )
    draws = not torch.equal(before, torch.get_rng_state())
    return module if isinstance(module, ResNet) else OwnNetwork(module, shape[0], classes, draws)


def load_own_network(module: nn.Module | None, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> OwnNetwork:
    """Puts a model file's weights into the module that the caller gives.

    Raises ModelFileError if none is given, or another.
    """
    spec = OwnSpecification(**values)
    if module is None:
        raise ModelFileError(
            f"it holds a network of your own; give it again, in Python: resnetlab.load(path, net={spec.own_class}(…))"
        )
    check_module(module)
    if (name := class_name(module)) != spec.own_class:
        raise ModelFileError(f"it holds the weights of {spec.own_class}, not of {name}")
    net = OwnNetwork(module, spec.channels, spec.classes)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in tensors.items()}
    if differing := [k for k in {**shapes, **stored} if shapes.get(k) != stored.get(k)]:
        key = differing[0]
        ours, theirs = (str(each.get(key, "missing")) for each in (shapes, stored))
        raise ModelFileError(
            f"this {spec.own_class} has other layers than the one that was trained: {key.removeprefix('module.')} is {ours}, "
            f"in the file {theirs}"
        )
    net.load_state_dict(tensors)
    return net
