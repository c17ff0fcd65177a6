"""Class names in the order of a network's logits: of a data set, from a file, or as a list; and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from resnetlab.data import imagenet
from resnetlab.data.text_files import read_lines
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import find_name_problem, format_count

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
DATASETS = ("digits", "cifar10", "cifar100", "imagenet")


def parse_class_names(text: str | Sequence[str], n: int) -> tuple[str, ...]:
    """Reads `n` class names from a data set's name, a folder of class folders, a file with one name per line, a comma-separated
    list, or a sequence.

    Raises UsageError unless they are `n` different names.
    """
    if not isinstance(text, str):
        names, text = tuple(text), "LIST"
    elif text in DATASETS:
        names = dataset_class_names(text)
    elif Path(text).is_file():
        try:
            names = tuple(read_lines(Path(text)))
        except DataError as error:
            raise UsageError(f"--classes: {str(error).rstrip('.')}; it must have one name per line.") from error
    elif Path(text).is_dir():
        from resnetlab.data import sources

        names = sources.load_dataset(text, Path("data")).classes
    elif "," in text or n == 1:
        names = tuple(part.strip() for part in text.split(","))
    else:
        raise UsageError(
            f"--classes {text!r} is neither a data set ({', '.join(DATASETS)}), nor a folder of class folders, nor a file with "
            "one name per line, nor a comma-separated list."
        )
    if len(names) != n:
        raise UsageError(
            f"--classes {text} gives {format_count(len(names), 'name')}, but the network has "
            f"{format_count(n, 'class')}."
        )
    if problem := find_name_problem(names):
        raise UsageError(f"--classes {text!a}: {problem}; every class needs a name of its own.")
    return names


def dataset_class_names(name: str) -> tuple[str, ...]:
    """The class names of a data set for which weights are commonly published, in its order."""
    if name == "digits":
        return tuple("0123456789")
    if name == "imagenet":
        return tuple(imagenet.imagenet_class_names().values())
    return tuple({"cifar10": CIFAR10, "cifar100": CIFAR100}[name].split())


class ClassScore(NamedTuple):
    """A class and its softmax score."""

    label: str
    score: float

    def __str__(self) -> str:
        return f"{self.label} {self.score:.1%}"


def top_classes(classes: Sequence[str], scores: Tensor, top: int) -> tuple[ClassScore, ...]:
    """The `top` classes with the highest scores (classes,), best first; of equal scores the class that comes first."""
    values, indices = (x[:top].tolist() for x in scores.sort(descending=True, stable=True))
    return tuple(ClassScore(classes[i], round(v, 6)) for i, v in zip(indices, values, strict=True))
