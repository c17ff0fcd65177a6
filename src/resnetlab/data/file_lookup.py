"""Finds the file or folder that a name in an annotation, a list or a convention means: the one place for all readers.

A name means the file of that very name if there is one; otherwise the one file whose name differs only in Unicode form (macOS
stores é as two characters), capitals, backslashes or a leading slash.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from resnetlab.data.decode import SUFFIXES, is_hidden, list_images
from resnetlab.data.folder import guess_split
from resnetlab.errors import DataError

YEAR = re.compile(r"([ _-]?dev)?[ _-]?\d{4}$")  # "train2017", "test-dev2017"
# endings that lists omit
OMITTED = ("", *sorted(SUFFIXES, key=lambda suffix: (suffix not in (".jpg", ".png"), suffix)))
LABEL_AT_END = re.compile(r"\s+-?[01]$")  # VOC's lists of a class: "2008_000008 -1"


def name_key(name: str) -> str:
    """What names have in common that mean the same file."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold().lstrip("./")


class NameIndex:
    """Known names; `find` gives the one that a name means."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            self._by_key[name_key(name)].append(name)

    def find(self, name: str) -> str | None:
        """The known name that `name` means; None if there is none, or several."""
        if name in self._names:
            return name
        found = self._by_key.get(name_key(name), ())
        return found[0] if len(found) == 1 else None

    def find_list_entry(self, line: str) -> str | None:
        """The known stem that a line of a list means: a stem, a file name, a path, with a label or a second path behind it."""
        whole = LABEL_AT_END.sub("", line)
        for entry in (line, whole, *whole.split()[:1]):
            for path in _list_endings(entry):
                for stem in (path, os.path.splitext(path)[0]):
                    if (found := self.find(stem)) is not None:
                        return found
        return None


def _list_endings(path: str) -> list[str]:
    """A path, and what is left without its first folder, its first two, and so on: "a/b.png", "b.png"."""
    parts = re.split(r"[/\\]", path)
    return [path, *("/".join(parts[i:]) for i in range(1, len(parts)))]


class ImageFinder:
    """The images below a folder; `find` gives the file that an annotation's file name means."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = [os.path.relpath(file, root).replace(os.sep, "/") for file in _list_files(root)]
        self._index = NameIndex(self.paths)
        self.folders = sorted({path[: slash.start()] for path in self.paths for slash in re.finditer("/", path)})
        self._by_last: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            self._by_last[name_key(path.rsplit("/", 1)[-1])].append(path)

    def find(self, name: str, folders: Sequence[str]) -> Path | None:
        """The image that `name` means in one of some folders (paths below the root, "" for itself), or else its last part.

        None if there is none, or several files have that last part.
        """
        for path in (name, *_list_endings(name)[1:-1]):  # data/obj_train_data/a.png: data/ was on another machine
            for folder in folders:
                if (found := self._index.find(f"{folder}/{path}" if folder else path)) is not None:
                    return self.root / found
        for folder in folders:  # elsewhere, hidden, or with an unusual suffix
            if os.path.isfile(self.root / folder / name):  # Path.is_file raises for a name that is too long
                return self.root / folder / name
        last = re.split(r"[/\\]", name)[-1]
        for spelled in (last, unquote(last)):
            if len(found_by_last := self._by_last.get(name_key(spelled), [])) == 1:
                return self.root / found_by_last[0]
        return None

    def name_of(self, file: Path) -> str:
        """The path of a file below the root, with slashes; its own name if it is elsewhere."""
        return file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else file.name

    def folder_of(self, file: Path) -> str:
        """The folder that a file is in, a path below the root, "" for itself."""
        return file.parent.relative_to(self.root).as_posix().removeprefix(".")

    def by_stem(self, folder: str) -> dict[str, Path]:
        """The images below one folder (a path below the root) by their paths in it without suffix."""
        start = f"{folder}/" if folder else ""
        inside = [path for path in self.paths if path.startswith(start)]
        return {os.path.splitext(path.removeprefix(start))[0]: self.root / path for path in inside}

    def count_named(self, name: str) -> int:
        """How many images have the last part of a name."""
        return len(self._by_last.get(name_key(re.split(r"[/\\]", name)[-1]), ()))


def _list_files(root: Path) -> list[Path]:
    files = []
    for file in list_images(root):
        if isinstance(file, DataError):
            if "holds no image" in str(file):
                return []
            raise file
        files.append(file)
    return files


def find_spelling(path: str, index_folder: Callable[[str], NameIndex]) -> str | None:
    """The one file or folder that an absolute path means if its parts' names are compared as above, or lacks a suffix of.

    None if there is none, or several that differ in spelling; of several suffixes the first of OMITTED is taken. `index_folder`
    gives the names in a folder, of which a caller keeps what it needs again.
    """
    parent, last = os.path.split(path)
    if not last or (folder := parent if os.path.isdir(parent) else find_spelling(parent, index_folder)) is None:
        return None
    names = (index_folder(folder).find(last + suffix) for suffix in OMITTED)
    return next((os.path.join(folder, name) for name in names if name is not None), None)


def index_folder(folder: str) -> NameIndex:
    """The names in a folder; none if it cannot be listed."""
    try:
        return NameIndex(os.listdir(folder))
    except OSError:
        return NameIndex(())


def find_split(name: str) -> str:
    """The split that a folder or file of this name (without suffix) is for: train, trainval, val or test; "" if none."""
    plain = YEAR.sub("", name.lower().removeprefix("instances_"))
    return plain if plain == "trainval" else guess_split(plain)


def find_first_split(words: Iterable[str]) -> str:
    """The split that the first word which names one is for; "" if none does."""
    return next(filter(None, map(find_split, words)), "")


def list_subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def list_json_files(root: Path) -> list[Path]:
    """The JSON files in a folder and the folders in it, sorted; not hidden ones."""
    files = [file for folder in (root, *list_subfolders(root)) for file in sorted(folder.iterdir())]
    return [f for f in files if f.suffix.lower() == ".json" and not f.name.startswith(".") and f.is_file()]


def find_entry(folder: Path, *names: str) -> Path | None:
    """The file or folder called by one of some names, in any capitals; the first name that is there."""
    try:
        entries = {entry.lower(): entry for entry in sorted(os.listdir(folder), reverse=True)}
    except OSError:
        return None
    for name in names:
        if (folder / name).exists():
            return folder / name
        if name.lower() in entries:
            return folder / entries[name.lower()]
    return None
