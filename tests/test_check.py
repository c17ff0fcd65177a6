"""`resnetlab data check` against folders with known problems."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import annotated_layouts
import resnetlab
from images import folder, photo, png_bomb
from resnetlab.cli.main import run_command
from resnetlab.data import check, digits, sources
from resnetlab.data.check import check_file, check_pixels
from resnetlab.data.disk_split import ReadOptions
from resnetlab.errors import DataError
from resnetlab.models.model_file import TrainedModel
from resnetlab.preprocessing import Preprocessing
from resnetlab.training import recipes


def found(capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> tuple[int, dict[str, object], str]:
    capsys.readouterr()
    code = run_command(["data", "check", str(root), "--json", "--no-timing", "--workers", "0", *more])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, json.loads(out), err


def test_a_folder_without_problems(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = replace(
        recipes.photos(), image_size=32, batch=8, bn_batch=0
    )  # its speed is measured, and half a minute long at 224
    monkeypatch.setattr(recipes, "photos", lambda: smaller)
    root = folder(tmp_path / "my images")
    code, document, _ = found(capsys, root)
    assert code == 0 and document["problems"] == []
    assert set(document) == {
        "data",
        "images",
        "readable",
        "problems",
        "classes",
        "kinds",
        "shorter_sides",
        "loading",
        "layout",
    }
    assert document["images"] == document["readable"] == 33 and document["kinds"] == {"JPEG RGB": 33}
    assert document["classes"]["val"] == {"alpha": 3, "größe ß": 3, "红 花": 3}  # type: ignore[index]
    assert run_command(["data", "check", str(root), "--workers", "2"]) == 0
    assert run_command(["data", "check", str(root), "--workers", "-1"]) == 2
    out = capsys.readouterr().out
    assert "33 images, 33 can be read" in out and "of a ResNet-18 step" in out and "größe ß" in out


def test_every_problem_is_reported_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 6, "val": 3})
    train, val = root / "train", root / "val"
    image = Image.open(train / "alpha" / "bild 0.jpg")
    (train / "alpha" / "cut.jpg").write_bytes((train / "alpha" / "bild 1.jpg").read_bytes()[:-200])
    (train / "alpha" / "bomb.png").write_bytes(png_bomb())
    shutil.copy(train / "alpha" / "bild 2.jpg", train / "alpha" / "copy.jpg")
    image.resize((image.width * 2, image.height * 2)).save(train / "alpha" / "larger.png")
    shutil.copy(train / "alpha" / "bild 3.jpg", train / "红 花" / "other class.jpg")
    shutil.copy(train / "alpha" / "bild 4.jpg", val / "alpha" / "leak.jpg")
    Image.open(train / "alpha" / "bild 5.jpg").save(val / "alpha" / "near leak.jpg", quality=40)
    photo(901).save(train / "alpha" / "called.png", "JPEG")
    photo(902, 400, 20).save(train / "alpha" / "narrow.jpg")
    Image.new("RGB", (1, 1)).save(train / "alpha" / "dot.png")
    Image.new("RGB", (50, 50), "red").save(train / "alpha" / "flat.png")
    Image.new("RGB", (60, 50), "blue").save(train / "alpha" / "flat too.png")  # not a copy of the other
    photo(903).save(train / "loose.jpg")
    code, document, err = found(capsys, root, "--quarantine", str(tmp_path / "bad.txt"))
    problems = [(p["kind"], Path(p["file"]).name, p["detail"]) for p in document["problems"]]  # type: ignore[attr-defined]
    reported = {(kind, name) for kind, name, _ in problems}
    assert reported == {
        ("unreadable", "cut.jpg"), ("unreadable", "bomb.png"), ("duplicate", "copy.jpg"), ("near-duplicate", "larger.png"),
        ("conflict", "other class.jpg"), ("leak", "leak.jpg"), ("leak", "near leak.jpg"), ("suspicious", "called.png"),
        ("suspicious", "narrow.jpg"), ("suspicious", "dot.png"), ("suspicious", "flat.png"), ("suspicious", "flat too.png"),
        ("stray", "loose.jpg"),
    }  # fmt: skip
    details = {name: detail for _, name, detail in problems}
    assert str(train / "alpha" / "bild 2.jpg") in details["copy.jpg"] and details["copy.jpg"].startswith(
        "the same image as"
    )
    assert details["near leak.jpg"].startswith("nearly the same") and details["near leak.jpg"].endswith(
        "which is in train"
    )
    assert "which is of class alpha, not 红 花" in details["other class.jpg"]
    assert "claims more than" in details["bomb.png"] and "it is a JPEG file but is called .png" in details["called.png"]
    assert code == 1 and err.rstrip().endswith(f"found in {root}.")
    listed = [line for line in (tmp_path / "bad.txt").read_text().splitlines() if not line.startswith("#")]
    assert set(listed) == {f"train/alpha/{name}" for name in (
        "cut.jpg", "bomb.png", "copy.jpg", "larger.png", "bild 3.jpg", "bild 4.jpg", "bild 5.jpg")} | {
        "train/红 花/other class.jpg"}  # fmt: skip
    (train / "loose.jpg").unlink()
    data = sources.load_dataset(str(root), Path("data"), ReadOptions(quarantine=str(tmp_path / "bad.txt")))
    assert not set(listed) & set(data.train.names)
    left = {problem.kind for problem in check.check_dataset(data).problems}
    assert left == {"suspicious"}  # nothing is left that training should not see


def test_a_folder_that_is_not_a_data_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    shutil.rmtree(root / "val" / "alpha")
    code, document, _ = found(capsys, root)
    assert code == 1 and [p["kind"] for p in document["problems"]] == ["layout"]  # type: ignore[attr-defined]
    assert "only in train alpha" in document["problems"][0]["detail"]  # type: ignore[index]
    (list_before := tmp_path / "bad.txt").write_text("train/beta/1.png\n")
    assert run_command(["data", "check", str(root), "--quarantine", str(list_before)]) == 1
    assert list_before.read_text() == "train/beta/1.png\n"
    (root / "train" / "alpha" / "scan.jp2").write_text("")
    _, document, err = found(capsys, root)
    assert "only in train alpha" in str(document) and "such as alpha/scan.jp2; save them as JPEG or PNG" in err


def test_all_problems_of_a_layout_are_listed_and_the_images_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = folder(tmp_path / "d")
    for name in ("empty", "alpha"):
        shutil.rmtree(root / "val" / name, ignore_errors=True)
    (root / "train" / "empty").mkdir()
    (root / "val" / "empty too").mkdir()
    (root / "train" / "alpha" / "bild 1.jpg").write_text("<!DOCTYPE html><html>")
    code, document, _ = found(capsys, root)
    problems = [(p["kind"], p["detail"]) for p in document["problems"]]  # type: ignore[attr-defined]
    assert code == 1 and [kind for kind, _ in problems] == ["layout", "layout", "layout", "unreadable"]
    assert "train/empty holds no image" in problems[0][1] and "val/empty too holds no image" in problems[1][1]
    assert "only in train alpha, empty, only in val empty too" in problems[2][1]
    assert "it is a web page" in problems[3][1] and (document["images"], document["readable"]) == (30, 29)
    with pytest.raises(
        DataError, match=r"train/empty holds no image.* There are 2 more; `resnetlab data check .*d` lists"
    ):
        sources.load_dataset(str(root), tmp_path)


def test_all_rows_of_a_table_that_cannot_be_used_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    photo(1).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,label,split\na.png,,train\n,x,train\na.png,x,nowhere\n")
    code, document, _ = found(capsys, tmp_path / "t.csv")
    details = [p["detail"] for p in document["problems"]]  # type: ignore[attr-defined]
    assert code == 1 and [d.split(": ")[0].rpartition(" ")[2] for d in details] == ["3", "1", "2"]
    (tmp_path / "t.csv").write_text("path,label\na.png,x\na.png,y\na.png,y\n")
    assert len(found(capsys, tmp_path / "t.csv")[1]["problems"]) == 2  # type: ignore[arg-type]


def test_few_images_can_be_evaluated_but_not_trained_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "few", {"": 1})
    _, document, _ = found(capsys, root)
    assert "too few to hold some of each out" in document["problems"][0]["detail"]  # type: ignore[index]
    listed = [(str(file), file.parent.name) for file in sorted(root.glob("*/*.jpg"))]
    for data in (str(root), listed):
        with pytest.raises(
            DataError,
            match=r"(few|the data): 3 images of 3 classes are too few to hold some of each out for a test; add",
        ):
            resnetlab.train(data, progress=False, out=tmp_path / "run")
    net = resnetlab.build("resnet8", num_classes=3, seed=0)
    shape = Preprocessing(3, (16, 16), 16, torch.zeros(3), torch.ones(3))
    model = TrainedModel(net=net, classes=tuple(sorted({label for _, label in listed})), preprocessing=shape)
    for data in (str(root), listed):
        result = resnetlab.evaluate(model, data)
        assert (result.n, result.split) == (3, "all")


def test_data_in_memory_are_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = found(capsys, Path("digits"))
    assert code == 0 and document["images"] == 1797 and document["kinds"] == {"pixels L": 1797}, document["problems"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 20, "val": 4})
    shutil.copy(root / "train" / "alpha" / "bild 2.jpg", root / "val" / "alpha" / "x.jpg")
    data = sources.load_dataset(str(root), Path("data"))
    assert check.check_dataset(data, 0) == check.check_dataset(data, 3)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "check", "--help"]) == 0
    assert "Example: resnetlab data check photos" in " ".join(capsys.readouterr().out.split())


def test_near_copies_are_those_of_comparing_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BLOCK", 7)
    draw = random.Random(4)
    shapes = [draw.getrandbits(128) for _ in range(150)]
    thumbs = [draw.randbytes(256) for _ in shapes]
    for _ in range(
        250
    ):  # near, just near enough, not quite, chains of such, and images with the same bits but other thumbnails
        k = draw.randrange(len(shapes))
        like, thumb = shapes[k], thumbs[k]
        for bit in draw.sample(range(128), draw.choice((0, 1, 7, 8, 9, 12))):
            like ^= 1 << bit
        shapes.append(like)
        thumbs.append(draw.choice((thumb, thumb, draw.randbytes(256))))
    expected = [
        min(j for j in range(i + 1) if (a ^ shapes[j]).bit_count() <= check.MAX_DISTANCE and thumbs[i] == thumbs[j])
        for i, a in enumerate(shapes)
    ]
    assert check.find_near_copies(shapes, thumbs).tolist() == expected and expected != list(range(400))
    assert check.find_near_copies([], []).tolist() == []


def test_a_shared_background_makes_no_copies_and_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits on black with a border: their outer rows are equal, so most of their bits carry no information."""
    images = digits.load_digits().train.images[:600]
    infos = []
    for image in images:
        canvas = Image.new("L", (28, 28))
        canvas.paste(Image.fromarray(image[..., 0].numpy()).resize((20, 20), Image.Resampling.BILINEAR), (4, 4))
        infos.append(check_pixels(torch.from_numpy(np.array(canvas))[..., None]))
    shapes, thumbs = [info.gradient_bits or 0 for info in infos], [info.thumbnail for info in infos]
    alike = sum(any((a ^ b).bit_count() <= check.MAX_DISTANCE for b in shapes[:i]) for i, a in enumerate(shapes))
    compared = 0
    pairs = check._near_pairs

    def counted(later: Any, earlier: Any, *rest: Any) -> Any:
        nonlocal compared
        compared += len(later) * len(earlier)
        return pairs(later, earlier, *rest)

    monkeypatch.setattr(check, "_near_pairs", counted)
    copies = int((check.find_near_copies(shapes, thumbs) != np.arange(600)).sum())
    assert alike > 200 and copies <= 3
    assert compared < 600 * 600  # of nine bands that would all hold the same group


def test_near_copies_with_a_plain_border_are_found() -> None:
    """Compressing again leaves noise in a border, which must not count as a gradient."""
    shapes: list[int] = []
    thumbs: list[bytes] = []
    for quality in (None, 75, 40):
        for i in range(40):
            image = Image.new("RGB", (64, 64), "white")
            image.paste(photo(i, 36, 36), (14, 14))
            if quality:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=quality)
                image = Image.open(file).convert("RGB")
            info = check_pixels(torch.from_numpy(np.array(image)))
            shapes.append(info.gradient_bits or 0)
            thumbs.append(info.thumbnail)
    assert check.find_near_copies(shapes, thumbs).tolist() == list(range(40)) * 3


def test_damage_inside_an_image_is_suspicious(tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    photo(5, 200, 150).save(tmp_path / "a.jpg", quality=90)
    photo(5, 200, 150).save(tmp_path / "a.png")
    whole, png = (tmp_path / "a.jpg").read_bytes(), (tmp_path / "a.png").read_bytes()
    assert check_file(whole, "a.jpg").suspicious == check_file(png, "a.png").suspicious == ()
    half = len(whole) // 2
    for name, content in {
        "overwritten.jpg": whole[:half] + b"\x55" * 200 + whole[half + 200 :],
        "zeroed.jpg": whole[:half] + bytes(len(whole) - half - 2) + b"\xff\xd9",
        "cut.jpg": whole[: len(whole) // 3] + b"\xff\xd9",
        "cut.png": png[:-20],
    }.items():
        assert any("damaged, though it can be read" in words for words in check_file(content, name).suspicious), name


@pytest.mark.parametrize("layout", [*annotated_layouts.BOXES, *annotated_layouts.OUTLINES, *annotated_layouts.MASKS])
@pytest.mark.filterwarnings("ignore::UserWarning")  # what a layout leaves out
def test_boxes_and_masks(layout: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every layout is checked as what it is; the scenes have no problem."""
    makers = annotated_layouts.MASKS | annotated_layouts.BOXES | annotated_layouts.OUTLINES
    makers[layout](tmp_path)
    code, document, _ = found(capsys, tmp_path)
    assert code == 0 and document["problems"] == [], document["problems"]
    assert str(document["layout"]).endswith("2 splits, 9 images, 2 classes") or layout in annotated_layouts.MASKS
    assert document["images"] == document["readable"] == 9 and [*document["kinds"].values()] == [9]
    assert set(document["classes"]) == {"train", "val"}  # type: ignore[call-overload]


def test_problems_of_boxes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A box that is outside, an image that is damaged, one in two splits; each by name, and boxes are counted."""
    annotated_layouts.labelme(tmp_path)
    file = tmp_path / "train" / "p0.json"
    content = json.loads(file.read_text())
    first = content["shapes"][0]["label"]
    content["shapes"][0] = {"label": first, "points": [[1, 1], [500, 1], [9, 9]], "shape_type": "polygon"}
    file.write_text(json.dumps(content))
    whole = (tmp_path / "train" / "p1.png").read_bytes()
    (tmp_path / "train" / "p1.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(tmp_path / "train" / "p2.png", tmp_path / "val" / "p7.png")
    code, document, _ = found(capsys, tmp_path)
    assert code == 1
    problems = {(p["kind"], Path(p["file"].split(",")[0]).name): p["detail"] for p in document["problems"]}  # type: ignore[attr-defined]
    assert set(problems) == {("annotation", "p0.json"), ("unreadable", "p1.png"), ("leak", "p7.png")}
    assert "outside the image" in problems["annotation", "p0.json"]
    training = document["classes"]["train"]  # type: ignore[index]
    assert (
        sum(training.values()) == sum(len(json.loads(f.read_text())["shapes"]) for f in file.parent.glob("*.json")) - 1
    )
    assert run_command(["data", "check", str(tmp_path), "--quarantine", str(tmp_path / "q.txt")]) == 2
    assert "--quarantine is for images in classes" in capsys.readouterr().err
