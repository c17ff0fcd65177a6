"""Masks in files of their own: the classes of their values or colours.

A mask is a palette or grey image whose values are classes, or an image in colours that a label map translates. 255 is not
evaluated (Pascal VOC's border), unless the data say otherwise: masks that hold only 0 and 255 would have nothing to learn, so
there 255 is the class beside the background.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnetlab.data.decode import turn_upright
from resnetlab.data.file_lookup import find_entry, list_subfolders
from resnetlab.data.text_files import read_bytes, read_lines
from resnetlab.errors import DataError, unknown_name_error
from resnetlab.formatting import format_count

VOID = 255  # a pixel that is neither trained on nor evaluated
MAX_CLASSES = 255  # a mask has 8 bits, one value is VOID
IGNORE = "ignore"  # what `class_255` may be beside a class
CLASS_FILES = ("classes.txt", "labelmap.txt", "label_colors.txt", "class_dict.csv", "codes.txt", "class_names.txt")
BACKGROUND = ("background", "_background_")
MAX_VALUE = 2**16 - 1
VOID_NAMES = ("void", "ignore", "ignored", "__ignore__")  # of label maps: no class
VOID_COLOURS = (0xE0E0C0,)  # of Pascal VOC's coloured masks
COLOUR_LINE = re.compile(  # "name:r,g,b:…" (CVAT), "r g b  name" (CamVid), "name,r,g,b" (class_dict.csv)
    r"([^:]+):(\d+,\d+,\d+):.*|(?P<colour>\d+\s+\d+\s+\d+)\s+(?P<name>.+)|([^,]+),\s*(\d+,\s*\d+,\s*\d+)"
)

Codes = NDArray[np.int64]  # (H, W): a pixel's value, or its colour as 0xRRGGBB


class MaskClasses(NamedTuple):
    """The classes of a folder's masks.

    Attributes:
        names: the background first.
        lookup: the class of each value, or VOID; of each colour (0xRRGGBB) if `colours`.
        note: what was decided by the masks, for a message.
    """

    names: tuple[str, ...]
    lookup: Mapping[int, int]
    colours: bool = False
    note: str = ""


@dataclass(frozen=True, eq=False)
class MaskFile:
    """A mask in a file of its own.

    Attributes:
        lookup: the class of each value or colour; {}: every value is a class, 255 is VOID.
        has_objects: whether it has a class other than the first.
    """

    file: Path
    classes: int
    lookup: Mapping[int, int] = field(default_factory=dict)
    colours: bool = False
    has_objects: bool = True

    def read_mask(self, size: tuple[int, int]) -> Tensor:
        """uint8 (H, W), for an image of that size. Raises DataError, naming the file, if there is no such mask."""
        codes = read_codes(self.file, self.colours)
        if codes.shape != size:
            raise DataError(
                f"{self.file} has {codes.shape[1]}x{codes.shape[0]} pixels, its image {size[1]}x{size[0]}; make them one size."
            )
        lookup = self.lookup or {**{value: value for value in range(self.classes)}, VOID: VOID}
        known = np.array(sorted(lookup))
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        if len(unknown := codes[known[places] != codes]):
            raise DataError(f"{self.file} {self._describe_unknown(int(unknown[0]))}")
        return torch.from_numpy(np.array([lookup[int(code)] for code in known], np.uint8)[places])

    def _describe_unknown(self, code: int) -> str:
        if self.colours:
            colour = ", ".join(str(code >> shift & 255) for shift in (16, 8, 0))
            return f"has the colour {colour}, which the label map does not name."
        hint = "; JPEG changes values, save masks as PNG" if self.file.suffix.lower() in (".jpg", ".jpeg") else ""
        return f"has the value {code}, but there are {format_count(self.classes, 'class')}, 0 the first{hint}."

    def update_hash(self, digest: Any) -> None:
        """Adds what decides the mask to a hash."""
        digest.update(self.file.read_bytes())
        if self.lookup:
            digest.update(repr(sorted(self.lookup.items())).encode())


def read_codes(file: Path, colours: bool) -> Codes:
    """The values of a mask, or its colours, upright; raises DataError if it is unreadable or has colours in place of values."""
    try:
        with Image.open(io.BytesIO(read_bytes(file))) as opened:
            opened.load()
            image = turn_upright(opened)
            mode = image.mode
            if colours or mode not in ("P", "L", "1", "I;16", "I;16B", "I"):
                rgb = np.asarray(image.convert("RGBA")).astype(np.int64)
                rgb = rgb[..., :3] * (rgb[..., 3:] > 0)  # transparent pixels are background
            else:
                codes = np.asarray(image).astype(np.int64)
                if codes.size and not 0 <= codes.min() <= codes.max() <= MAX_VALUE:
                    raise ValueError(f"its values are from {codes.min():,} to {codes.max():,}")
                return codes
    except DataError:
        raise
    except Exception as error:  # the decoders raise errors of many types
        raise DataError(f"{file} cannot be read as a mask ({error or type(error).__name__}).") from error
    if colours:
        return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    if (rgb != rgb[..., :1]).any():
        raise DataError(
            f"{file} has the mode {mode}; a mask is a palette or grey image whose values are classes, "
            "or in colours that a labelmap.txt names."
        )
    return rgb[..., 0]


class LabelMap(NamedTuple):
    """The classes that a file names, in its order, and the colour (0xRRGGBB) of each; None without colours."""

    file: Path
    names: tuple[str, ...]
    colours: tuple[int, ...] | None


def read_label_map(root: Path) -> LabelMap | None:
    """The file that names the classes, one a line, the background first where there are no colours; None without one.

    Raises DataError if it names fewer than two, more than masks can hold, or one twice.
    """
    if (file := find_entry(root, *CLASS_FILES)) is None:
        return _read_numbered_classes(root)
    lines = [line for line in read_lines(file) if not line.startswith("#") and line.lower() != "name,r,g,b"]
    matches = [COLOUR_LINE.fullmatch(line) for line in lines]
    names, colours = tuple(line.split(":")[0].strip() for line in lines), None
    if lines and all(matches):
        pairs = [[m["name"], m["colour"]] if m["name"] else [text for text in m.groups() if text] for m in matches if m]
        names = tuple(name.strip() for name, _ in pairs)
        channels = [[int(n) for n in re.findall(r"\d+", colour)] for _, colour in pairs]
        colours = tuple(r << 16 | g << 8 | b for r, g, b in channels)
    if len(names) < 2 or len(set(names)) != len(names) or len(set(colours or names)) != len(names):
        raise DataError(f"{file} must name two or more different classes, one a line, the background first.")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{file} names {len(names):,} classes; masks hold {MAX_CLASSES} at most, so leave some out.")
    return LabelMap(file, names, colours)


def _read_numbered_classes(root: Path) -> LabelMap | None:
    """The classes of Roboflow's _classes.csv, "Pixel Value, Class" and a line "1, cat" for each; in every split's folder.

    Raises DataError if splits differ, or the values are not 0, 1, 2, ….
    """
    found: LabelMap | None = None
    for folder in (root, *list_subfolders(root)):
        file = folder / "_classes.csv"
        head, *lines = (read_lines(file) if file.is_file() else None) or [""]
        if not re.fullmatch(r"pixel value\s*,\s*class", head.lower()):
            continue
        pairs = [line.partition(",") for line in lines]
        if [value.strip() for value, _, _ in pairs] != [str(i) for i in range(len(pairs))] or len(pairs) < 2:
            raise DataError(
                f"{file} must name two or more classes with the values 0, 1, 2, …, one a line; export it again."
            )
        names = tuple(name.strip() for _, _, name in pairs)
        if found is not None and found.names != names:
            raise DataError(f"{found.file} and {file} name different classes; export both again.")
        found = LabelMap(file, names, None)
    return found


def decide_mask_classes(files: Sequence[Path], label_map: LabelMap | None, class_255: str) -> MaskClasses:
    """What the values or colours of a folder's masks mean.

    Args:
        files: the masks, those of the training images first.
        class_255: the class that 255 means, "ignore", or "" to decide by the masks.

    Raises DataError if there is nothing to learn, UsageError if `class_255` is no class.
    """
    if label_map is not None and label_map.colours is not None and _are_coloured(files, label_map.colours):
        return _translate_colours(label_map, label_map.colours)
    used = sorted({int(code) for file in files for code in _list_values(file)})
    values = [value for value in used if value != VOID]
    numbered = ("background", *(f"class {i}" for i in range(1, max([*values, 0]) + 1)))
    names = numbered if label_map is None else label_map.names
    if len(names) > MAX_CLASSES:
        raise DataError(f"the masks have values up to {len(names) - 1:,}; they hold {MAX_CLASSES} classes at most.")
    if class_255 not in ("", IGNORE, *names):
        if label_map is not None:
            raise unknown_name_error("class_255", class_255, (*names, IGNORE))
        names = (*names, class_255)
    note = ""
    if class_255 == "" and used == [0, VOID] and len(names) <= 2:
        names = names if label_map is not None else ("background", "foreground")
        class_255 = names[-1]
        note = f"the masks hold only 0 and {VOID}: {VOID} is read as {class_255}"
    white = VOID if class_255 in ("", IGNORE) else names.index(class_255)
    if not any(values) and white == VOID:
        raise DataError(
            f"the masks hold no value but 0 and {VOID}, which is not evaluated; there is no class to train on. If "
            f"{VOID} is a class, say which: --set class_255={names[1] if len(names) > 1 else 'NAME'}."
        )
    lookup = {**{value: value for value in range(len(names))}, VOID: white}
    return MaskClasses(names, {} if white == VOID else lookup, note=note)  # {}: the hash of plain masks stays as it was


def _list_values(file: Path) -> NDArray[np.int64]:
    """The values that occur in a mask; none if it cannot be read, which is reported where it is read."""
    try:
        return np.flatnonzero(np.bincount(read_codes(file, colours=False).ravel()))
    except DataError:
        return np.empty(0, np.int64)


def _are_coloured(files: Iterable[Path], colours: tuple[int, ...]) -> bool:
    """Whether the first mask that is not black throughout has the colours of a label map."""
    for file in files:
        try:
            used = set(np.unique(read_codes(file, colours=True)).tolist())
        except DataError:
            continue
        if used != {0}:
            with Image.open(file) as image:  # a colour that is not named is reported where the mask is read
                return image.mode in ("RGB", "RGBA") or used <= {*colours, *VOID_COLOURS}
    return False


def _translate_colours(label_map: LabelMap, colours: tuple[int, ...]) -> MaskClasses:
    """The classes of a label map with colours: the background first, wherever the file has it, and no class for "void"."""
    colour_of = dict(zip(label_map.names, colours, strict=True))
    names = [name for name in label_map.names if name.lower() not in VOID_NAMES]
    names.sort(key=lambda name: name.lower() not in BACKGROUND)
    lookup = dict.fromkeys((*VOID_COLOURS, *(colour_of[name] for name in label_map.names if name not in names)), VOID)
    return MaskClasses(tuple(names), lookup | {colour_of[name]: i for i, name in enumerate(names)}, colours=True)
