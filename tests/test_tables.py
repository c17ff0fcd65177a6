"""Tables and archives of class folders: the same data set as the folder, what is understood, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import unicodedata
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import resnetlab
from images import folder, photo
from resnetlab.cli.main import run_command
from resnetlab.data import sources, tables
from resnetlab.data.dataset import GROUP, Dataset
from resnetlab.data.decode import decode_pixels
from resnetlab.data.disk_split import ReadOptions
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation import metrics
from resnetlab.models.model_file import load_trained_model
from shard_files import jpeg, tar
from tiny_runs import TINY_PHOTOS


def load(data: object, **reading: object) -> Dataset:
    return sources.load_dataset(str(data), Path("data"), ReadOptions(**reading))  # type: ignore[arg-type]


def write(file: Path, rows: Sequence[Sequence[object]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(file, "w", newline="", encoding=encoding) as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    return file


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return folder(tmp_path / "photos", {"": 10})


def rows_of(root: Path) -> list[tuple[str, str]]:
    """(path below the folder above, class) of every image, in an order of its own."""
    files = sorted(root.rglob("*.jpg"), key=lambda file: file.stat().st_size)
    return [(str(file.relative_to(root.parent)), file.parent.name) for file in files]


def test_a_table_of_a_folder_trains_to_the_same_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(*row, f"g{i % 2}", i) for i, row in enumerate(rows_of(photos))]
    table = write(tmp_path / "list.csv", [("file", "class", "garden", "number"), *rows])
    weights = []
    small = TINY_PHOTOS | {"steps": 3}
    for data in (photos, table):
        result = resnetlab.train("photos", data=str(data), out=tmp_path / f"run {len(weights)}", **small)  # type: ignore[arg-type]
        weights.append(load_trained_model(Path(result.model)).net.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    evaluated = [resnetlab.evaluate(str(result.model), str(data), device="cpu").to_json() for data in (photos, table)]
    assert evaluated[0]["top1_error"] == evaluated[1]["top1_error"] == result.top1_error
    gardens = evaluated[1]["by_column"]["garden"]
    assert "by_column" not in evaluated[0] and [g["value"] for g in gardens] == ["g0", "g1"]
    assert sum(g["n"] * g["top1_error"] for g in gardens) == pytest.approx(6 * result.top1_error)
    assert evaluated[1]["notes"] == [] and evaluated[1]["split"] == "held-out" and evaluated[1]["n"] == 6
    monkeypatch.setattr(metrics, "MAX_VALUES", 5)
    (note,) = resnetlab.evaluate(str(result.model), str(table), device="cpu").notes
    assert note == "errors by a column's values are given for up to 5 values; without number (6)"


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
@pytest.mark.parametrize("splits", [{"": 10}, {"training": 3, "val": 2}])
def test_an_archive_is_the_data_set_of_its_folder(
    kind: str, splits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = folder(tmp_path / "photos", splits)
    expected = load(root)
    for inside in ("photos", "."):
        base = tmp_path if inside == "photos" else root
        data = load(shutil.make_archive(str(tmp_path / f"a-{len(inside)}"), kind, base, inside))
        assert (data.classes, data.fingerprint, data.splits.keys()) == (
            expected.classes,
            expected.fingerprint,
            expected.splits.keys(),
        )
        assert data.train.names == expected.train.names
        assert all(torch.equal(data.test.read_image(i), expected.test.read_image(i)) for i in range(len(data.test)))
    assert sources.short_name(data.name) == "a-1"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_has_what_unpacking_it_gives(kind: str, tmp_path: Path) -> None:
    """Of a name that occurs twice the later file; backslashes are folders; an empty file is an image that cannot be read."""
    root, out = folder(tmp_path / "photos", {"": 10}), tmp_path / f"a.{kind}"
    expected = load(root)
    members = [(f"photos\\{name}".replace("/", "\\"), (root / name).read_bytes()) for name in expected.all_images.names]
    members = [(members[0][0], b"an older version"), *members, (f"photos\\{expected.classes[0]}\\empty.jpg", b"")]
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as packed, warnings.catch_warnings(action="ignore"):
            for name, content in members:
                info = zipfile.ZipInfo("x")
                info.filename = name
                packed.writestr(info, content)
            packed.mkdir("photos/a folder.jpg")
    else:
        tar(out, members)
    images = load(str(out)).all_images
    empty = f"{expected.classes[0]}/empty.jpg"
    assert sorted(images.names) == sorted([*expected.all_images.names, empty])
    for i, name in enumerate(images.names):
        if name == empty:
            with pytest.raises(DataError, match="is empty"):
                images.read_image(i)
        else:
            assert torch.equal(images.read_image(i), decode_pixels((root / name).read_bytes(), name))


def test_every_form_of_table_is_read(photos: Path, tmp_path: Path) -> None:
    expected, rows = load(photos), rows_of(photos)
    forms = [
        write(tmp_path / "a.csv", [("Image Path", "Label"), *rows], ";", "utf-8-sig"),
        write(tmp_path / "b.TSV", [("file_name", "category"), *rows], "\t"),
        write(tmp_path / "c.csv", [("path", "class"), *((path.replace("/", "\\"), name) for path, name in rows)]),
        write(
            tmp_path / "d.csv",
            [("path", "class"), *((unicodedata.normalize("NFD", path[:-4]), name) for path, name in rows)],
        ),
        write(photos / "e.csv", [("path", "class"), *((path.removeprefix("photos/"), name) for path, name in rows)]),
    ]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"path": [r[0] for r in rows], "label": [r[1] for r in rows]}), tmp_path / "f.parquet"
    )
    for file in [*forms, tmp_path / "f.parquet"]:
        assert load(file).fingerprint == expected.fingerprint, file
    capitals = write(tmp_path / "caps.csv", [("path", "class"), *((path.upper(), name) for path, name in rows)])
    with pytest.warns(
        UserWarning, match=r"caps\.csv: 30 names taken in other capitals .*, such as photos/.* for PHOTOS/"
    ):
        assert load(capitals).fingerprint == expected.fingerprint
    labels = pyarrow.array([1.0, 2.0, float("nan")])
    parquet.write_table(pyarrow.table({"path": ["a.png", "b.png", "c.png"], "label": labels}), tmp_path / "g.parquet")
    with pytest.raises(DataError, match="row 3: a path and a label are needed, and one is empty"):
        load(tmp_path / "g.parquet")
    assert tables.list_table_images(str(forms[0])) == [tmp_path / path for path, _ in rows]


def test_splits_groups_and_columns_of_other_names(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos)
    splits = ["training", "valid", "Test"]
    table = write(
        tmp_path / "t.csv",
        [
            ("id", "species", "set", "garden"),
            *((path, name, splits[i % 3], f"g{i % 3}") for i, (path, name) in enumerate(rows)),
        ],
    )
    with pytest.raises(
        UsageError, match=r"no column called path or file.*but id, species, set, garden; name the one of"
    ):
        load(table)
    data = load(f"{table}:path=id,label=species,group=garden")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 10, "val": 10, "test": 10}
    assert set(data.train.columns["garden"]) == {"g0"} == set(data.train.columns[GROUP])
    assert data.test.columns["set"].tolist() == ["Test"] * 10
    with pytest.raises(
        UsageError, match=r"'label=kind' after .* is not one of path, label, labels, split, group = one of its"
    ):
        load(f"{table}:path=id,label=kind")


REFUSED = {
    r"row 2: a path and a label are needed, and one is empty": [("a/1.jpg", "x"), ("a/2.jpg", " ")],
    r"row 2: a/1.jpg is in row 1 too as 'x' and here as 'y'; remove one": [("a/1.jpg", "x"), ("a/1.jpg", "y")],
    r"has one class only, x; a classifier needs two": [("a/1.jpg", "x"), ("a/2.jpg", "x")],
    r"none of the 2 images of .* is there, such as 'b/1.jpg'; paths are relative to": [
        ("b/1.jpg", "x"),
        ("b/2.jpg", "y"),
    ],
    r"row 1: https://host/1.jpg is an address; download": [("https://host/1.jpg", "x"), ("a/1.jpg", "y")],
    r"row 2: 3 values, but the header has 2 columns": [("a/1.jpg", "x"), ("a/2.jpg", "x", "y")],
    r"has no rows below its header": [],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for i in (1, 2):
        photo(i).save(tmp_path / "a" / f"{i}.jpg")
    table = write(tmp_path / "t.csv", [("path", "label"), *REFUSED[sentence]])
    with pytest.raises(DataError, match=sentence):
        load(table)
    assert run_command(["train", str(table)]) == 1
    assert capsys.readouterr().err.startswith(f"resnetlab: {table}") or "none of" in sentence


def test_tables_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("path,label\ngrün,x\n".encode("latin-1"))
    (tmp_path / "b.parquet").write_bytes(b"no")
    for name, sentence in (("a.csv", "not valid UTF-8"), ("b.parquet", "as Parquet"), ("c.csv", "is not there")):
        with pytest.raises(DataError, match=sentence):
            load(tmp_path / name)
    (tmp_path / "d.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read as a zip file"):
        load(tmp_path / "d.zip")
    with pytest.raises(UsageError, match="There is no folder nosuchfolder here either"):
        load("nosuchfolder")


def test_folders_of_boxes_and_masks_are_no_class_folders(tmp_path: Path) -> None:
    for name in ("images", "masks"):  # they would be taken for two classes
        (tmp_path / "seg" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "seg" / name / "1.png")
    (tmp_path / "yolo/images").mkdir(parents=True)
    (tmp_path / "yolo/labels").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "yolo/images/1.png")
    (tmp_path / "yolo/labels/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    with pytest.raises(DataError, match=r"data of boxes or masks: resnetlab segment train .*seg"):
        load(tmp_path / "seg")
    with pytest.raises(DataError, match=r"YOLO's .*: resnetlab detect train .*yolo or resnetlab segment train"):
        load(tmp_path / "yolo")


def test_a_damaged_image_in_a_zip_is_named(photos: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path, "photos"))
    content = bytearray(archive.read_bytes())
    content[2000] ^= 255
    archive.write_bytes(content)
    data = load(archive, on_bad="skip").all_images
    assert data is not None
    damaged = dict(data.errors.read_each(range(len(data)), data.read_image, data.name_of))
    assert len(damaged) == 29
    assert "a.zip/" in (reason := "".join(data.errors.skipped.values())) and "cannot be read (Error -3" in reason


def test_commands_take_tables(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "list.csv", [("file", "class"), *rows_of(photos)[:12]])
    assert run_command(["data", "check", str(table), "--no-timing", "--workers", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert run_command(["data", "pack", str(table), str(tmp_path / "shards")]) == 0
    assert load(tmp_path / "shards").train.names == load(table).train.names


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_windows_wrote_are_read_everywhere(photos: Path, tmp_path: Path, encoding: str) -> None:
    """A table, a quarantine list, and the classes beside folders and shards, as Excel, Notepad and PowerShell save them."""
    table = write(tmp_path / "list.csv", [("path", "label"), *rows_of(photos)], encoding=encoding)
    found = load(table)
    assert found.all_images is not None and len(found.all_images) == 30 and found.classes == load(photos).classes
    bad = found.all_images.name_of(3)
    (tmp_path / "bad.txt").write_text(f"{bad}\n", encoding)
    left = load(photos, quarantine=str(tmp_path / "bad.txt")).all_images
    assert left is not None and len(left) == 29 and bad not in left.names
    beside = folder(tmp_path / "named", {"": 3}, ("n01", "n02"))
    (beside / "synset_words.txt").write_text("n01 größe\nn02 crane\n", encoding)
    assert load(beside).classes == ("crane", "größe")
    for split in ("train", "val"):
        content = {
            f"{i}.{kind}": value for i in range(4) for kind, value in (("jpg", jpeg(i)), ("cls", b"%d" % (i % 2)))
        }
        tar(tmp_path / "shards" / f"{split}-0.tar", {f"{split}{name}": value for name, value in content.items()})
    (tmp_path / "shards" / "classes.txt").write_text("größe\ncrane\n", encoding)
    assert load(tmp_path / "shards").classes == ("größe", "crane")
