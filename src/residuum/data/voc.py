"""Pascal VOC's form: Annotations/*.xml, JPEGImages/*, and in ImageSets/Main the names of each split (train.txt, val.txt, …).

    <annotation><size><width>640</width><height>480</height></size>
      <object><name>WBC</name><difficult>0</difficult><bndbox><xmin>260</xmin>…</bndbox></object></annotation>

Without lists, all annotated pictures stand together. A picture without an <object> is background.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from residuum.data.annotated import Annotated, checked
from residuum.data.decode import SUFFIXES
from residuum.data.parts import Checker
from residuum.errors import DataError

LISTS = ("train", "trainval", "val", "test")
Found = tuple[tuple[float, float, float, float], str, bool]  # box, class, difficult


def read(root: Path, checker: Checker) -> tuple[tuple[str, ...], dict[str, list[Annotated]]]:
    """Classes, in the order of their names, and the pictures of each split."""
    pictures = picture_files(root / "JPEGImages")
    annotations = {file.stem: file for file in sorted((root / "Annotations").glob("*.xml"))}
    lists = split_lists(root / "ImageSets" / "Main") or {"": sorted(set(pictures) | set(annotations))}
    parsed = {}
    for stem in dict.fromkeys(stem for names in lists.values() for stem in names):
        if stem not in pictures:
            what = annotations.get(stem, root / "Annotations" / f"{stem}.xml")
            checker.bad(str(what), f"its picture {stem} is not in {root / 'JPEGImages'}")
        elif stem not in annotations:
            checker.bad(str(pictures[stem]), f"it has no annotation {root / 'Annotations' / f'{stem}.xml'}")
        else:
            parsed[stem] = parse(annotations[stem])
    learnt = lists.get("train") or lists.get("trainval") or next(iter(lists.values()))
    classes = tuple(sorted({name for stem in learnt if stem in parsed for _, name, _ in parsed[stem][1]}))
    if not classes:
        raise DataError(f"{root} has no box to train on; each <object> needs a <name> and a <bndbox>.")
    parts = {
        split: [_picture(pictures[s], annotations[s], *parsed[s], classes, checker) for s in names if s in parsed]
        for split, names in lists.items()
    }
    return classes, parts


def _picture(
    file: Path, source: Path, size: tuple[int, int], found: list[Found], classes: tuple[str, ...], checker: Checker
) -> Annotated:
    known = []
    for i, (box, name, difficult) in enumerate(found):
        if name in classes:
            known.append((box, classes.index(name), difficult))
        else:
            where = f"{source}, box {i + 1} of {file.name}"
            checker.bad(where, f"its class {name!r} is none of those trained on ({', '.join(classes)})")
    return checked(checker, f"JPEGImages/{file.name}", file, str(source), size, known)


def picture_files(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by their names without suffix. Raises DataError where two have one name, or none is there."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            if file.stem in found:
                raise DataError(
                    f"{found[file.stem]} and {file.name} have one name for two pictures; rename one of them."
                )
            found[file.stem] = file
    if not found:
        raise DataError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}).")
    return found


def split_lists(folder: Path) -> dict[str, list[str]]:
    """The names in each list of a folder such as ImageSets/Main; a name stands first on its line.

    Raises DataError where one list names a picture twice, or train and a part to judge by share one.
    """
    lists: dict[str, list[str]] = {}
    for split in LISTS:
        file = folder / f"{split}.txt"
        if file.is_file():
            lists[split] = [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
            if twice := sorted({name for name in lists[split] if lists[split].count(name) > 1}):
                raise DataError(f"{file} names {twice[0]} twice; leave one out.")
    if "train" in lists:
        lists.pop("trainval", None)
    for split in ("val", "test"):
        if shared := sorted(set(lists.get("train", [])) & set(lists.get(split, []))):
            raise DataError(
                f"{folder / 'train.txt'} and {split}.txt both name {shared[0]}; a picture that is trained on judges nothing."
            )
    return lists


def parse(file: Path) -> tuple[tuple[int, int], list[Found]]:
    """(height, width), (0, 0) where it is not said, and the boxes of one annotation. Raises DataError where it is broken."""
    try:
        tree = ElementTree.parse(file).getroot()
        size = tree.find("size")
        height, width = (int(_text(size, key)) for key in ("height", "width")) if size is not None else (0, 0)
        found = []
        for item in tree.findall("object"):
            x1, y1, x2, y2 = (float(_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            found.append(((x1, y1, x2, y2), _text(item, "name"), (item.findtext("difficult") or "0").strip() == "1"))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is broken XML ({error}); write it again.") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{file} is no Pascal VOC annotation: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    return (height, width), found


def _text(element: ElementTree.Element | None, path: str) -> str:
    """The words of an element below; raises ValueError where there are none."""
    words = (element.findtext(path) or "").strip() if element is not None else ""
    if not words:
        raise ValueError(f"<{path.replace('/', '><')}> is missing or empty")
    return words
