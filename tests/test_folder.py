"""Folders of class folders: reading, hold-out, refusals, and the same batches for any number of workers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import resnetlab
from images import NAMES, folder, photo
from resnetlab.cli import console
from resnetlab.cli.main import main, run_command
from resnetlab.data import check, sources
from resnetlab.data.augment import PCA_VALUES, PCA_VECTORS, Augmentation
from resnetlab.data.crops import NUM_DRAWS, Crop
from resnetlab.data.dataset import MemorySplit
from resnetlab.data.disk_split import DiskSplit, FileNames, ReadOptions, quarantine_line
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.data.sampler import TrainLoader, step_indices
from resnetlab.data.statistics import compute_statistics
from resnetlab.device import select_device
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import StepDraws
from resnetlab.training.recipes import find_classification_recipe
from resnetlab.training.train import RunOptions, build_task
from tiny_runs import TINY_PHOTOS

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flowers"
SHAPE = Preprocessing(3, (24, 24), 32, torch.zeros(3), torch.ones(3))
ENGINE = select_device("fp32", "cpu")


def load(root: Path, **reading: object) -> sources.Dataset:
    return sources.load_dataset(str(root), Path("data"), ReadOptions(**reading))  # type: ignore[arg-type]


def loader(split: object, crop: Crop, **values: object) -> TrainLoader:
    return TrainLoader(split, SHAPE, Augmentation(flip=True, colour=True, crop=crop), 6, 3, ENGINE, **values)  # type: ignore[arg-type]


def test_splits_classes_and_names(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "my images", {"train": 4, "val": 2, "test": 3}))
    assert data.classes == tuple(sorted(NAMES))
    assert (len(data.train), len(data.test), data.val and len(data.val), data.evaluated_split) == (12, 9, 6, "test")
    assert data.train.names[5] == os.path.join("train", "größe ß", "bild 1.jpg")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train.read_image(0).dtype == torch.uint8 and data.train.read_image(0).shape == (41, 51, 3)
    assert data.fingerprint == load(tmp_path / "my images").fingerprint
    photo(99).save(tmp_path / "my images" / "test" / "alpha" / "one more.jpg")
    assert data.fingerprint != load(tmp_path / "my images").fingerprint


def test_val_is_evaluated_where_there_is_no_test(tmp_path: Path) -> None:
    data = load(folder(tmp_path / "d"))
    assert data.evaluated_split == "val" and data.val is None and set(data.splits) == {"train", "val"}


@pytest.mark.parametrize("split", ["", "train"])
def test_a_hold_out_is_drawn_by_name(tmp_path: Path, split: str) -> None:
    root = folder(tmp_path / "d", {split: 20})
    data = load(root)
    assert data.evaluated_split == "held-out" and set(data.splits) == {"train", "held-out", "all"}
    assert (len(data.train), len(data.test)) == (48, 12)
    assert torch.bincount(data.test.labels).tolist() == [4, 4, 4]
    assert not set(data.train.names) & set(data.test.names)
    photo(99).save(root / split / "alpha" / "a new one.jpg")  # moves the others' positions, and few of the others
    assert len(set(load(root).test.names) & set(data.test.names)) >= 11


def test_class_names_from_a_file_beside(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1}, ("n01", "n02", "n03"))
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca\nn02 crane\nn03 crane\nn04 unused\n")
    data = load(root)
    assert data.classes == ("crane (n02)", "crane (n03)", "tench, Tinca")
    for name, label in zip(data.train.names, data.train.labels.tolist(), strict=True):
        assert {"n01": "tench, Tinca", "n02": "crane (n02)", "n03": "crane (n03)"}[name.split("/")[1]] == data.classes[
            label
        ]
    (root / "LOC_synset_mapping.txt").write_text("n01 tench\nn02 crane\n")
    with pytest.raises(DataError, match="does not name the class folders n03; add a line for each, or remove it"):
        load(root)


def test_the_same_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1}, ("größe", "b"))
    (root / "val" / "größe").rename(root / "val" / unicodedata.normalize("NFD", "größe"))
    assert load(root).classes == ("b", "größe")


REFUSED = {
    "different classes: only in train": lambda d: shutil.rmtree(d / "val" / "alpha"),
    "holds no image; put some there, or remove it": lambda d: [f.unlink() for f in (d / "train" / "alpha").iterdir()],
    "has one class only, alpha; a classifier needs two or more": lambda d: [
        shutil.rmtree(d / s / n) for s in ("train", "val") for n in NAMES[1:]
    ],
    "beside them extra; put class folders inside the splits": lambda d: (d / "extra").mkdir(),
    "only in val ALPHA; give both the same class folders, in the same capitals": lambda d: (d / "val" / "alpha").rename(
        d / "val" / "ALPHA"
    ),
    "holds no class folders with images: it holds 1 image in no class folder": lambda d: (
        shutil.rmtree(d / "train"),
        shutil.rmtree(d / "val"),
        photo(1).save(d / "a.jpg"),
    ),
    "a folder called train is a split here, never a class: rename a class": lambda d: (
        shutil.rmtree(d / "train"),
        (d / "val" / "alpha").rename(d / "train"),
    ),
    "holds no class folders with images: it is empty of images": lambda d: (
        shutil.rmtree(d / "train"),
        shutil.rmtree(d / "val"),
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(tmp_path: Path, sentence: str) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1})
    REFUSED[sentence](root)
    with pytest.raises(DataError, match=sentence):
        load(root)


@pytest.mark.filterwarnings("ignore:1 file in the class folders")
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_empty_split_is_left_out_with_a_note(tmp_path: Path, split: str) -> None:
    """Not one with images that no class has, or of a kind that is not read, and not the images to train on."""
    root = folder(tmp_path / "d", {"train": 10})
    for name in NAMES:
        (root / split / name).mkdir(parents=True)
    (root / split / ".gitkeep").write_text("")
    with pytest.warns(UserWarning, match=f"d/{split} holds no image: left out, as if it were not there"):
        data = load(root)
    assert data.evaluated_split == "held-out" and set(data.splits) == {"train", "held-out", "all"}
    for name in (f"{split}/alpha/a.tga", f"{split}/a.jpg"):
        (root / name).write_bytes(b"x")
        with pytest.raises(DataError, match=f"{split} holds no class folders with images"):
            load(root)
        (root / name).unlink()
    (root / "train").rename(root / "x")
    (root / split).rename(root / "train")
    (root / "x").rename(root / split)
    with pytest.raises(DataError, match="train holds no class folders with images"):
        load(root)


def test_the_difference_of_classes_is_listed(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1})
    (root / "val" / "alpha").rename(root / "val" / "beta")
    with pytest.raises(DataError, match="only in train alpha, only in val beta; give both the same class folders"):
        load(root)


def test_files_beside_class_folders_are_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1})
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "alpha" / "notes.txt").write_text("no image")
    (root / "train" / "alpha" / ".thumbs").mkdir()
    shutil.copy(root / "train" / "alpha" / "bild 0.jpg", root / "train" / "alpha" / ".thumbs")
    assert len(load(root).train) == 6
    photo(1).save(root / "train" / "loose.png")
    with pytest.warns(UserWarning, match=r"1 image beside the class folders of .* left out, of no class.*loose.png"):
        assert len(load(root).train) == 6


def test_folders_without_images_beside_the_splits_are_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1})
    for name in ("__pycache__", "logs", "notes"):
        (root / name).mkdir()
        (root / name / "a.txt").write_text("no image")
    with pytest.warns(UserWarning, match="__pycache__, logs, notes without images left out"):
        assert len(load(root).train) == 6
    photo(1).save(root / "notes" / "scan.jpg")
    with pytest.raises(DataError, match="beside them notes; put class folders inside the splits"):
        load(root)


def test_classes_that_differ_in_capitals_and_splits_that_are_copies_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="two classes 'Cat' and 'cat'"):
        assert load(folder(tmp_path / "d", {"": 4}, ("Cat", "cat", "dog"))).classes == ("Cat", "cat", "dog")
    root = folder(tmp_path / "e", {"train": 3})
    shutil.copytree(root / "train", root / "val")
    with pytest.warns(UserWarning, match="9 images of .*val have the name, class and size of an image of train"):
        load(root)
    for file in (root / "val").rglob("*.jpg"):  # others of the same size, as arrays and uncompressed images are
        file.write_bytes(file.read_bytes()[::-1])
    with warnings.catch_warnings(action="error"):
        load(root)


def test_a_quarantine_list_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 6})
    (tmp_path / "list.txt").write_text("# comment\nphotos/alpha/bild 1.jpg\n")
    with pytest.warns(
        UserWarning, match=r"no line of the quarantine list .* is the name of an image .*alpha/bild 0\.jpg"
    ):
        load(root, quarantine=str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("alpha\\bild 1.jpg\r\nalpha\\gone.jpg\r\n")  # written on Windows
    with pytest.warns(UserWarning, match=r"1 line of the quarantine list .* is the name of no image .*gone\.jpg"):
        everything = load(root, quarantine=str(tmp_path / "list.txt")).all_images
    assert everything is not None and len(everything) == 17 and "alpha/bild 1.jpg" not in everything.names


def test_groups_stay_together(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 20}, ("a", "b"))
    data = load(root, groups=r"bild (\d)")  # 0, 1 and 10 to 19, 2, …
    held_out, rest = ({name.split()[1][0] for name in split.names} for split in (data.test, data.train))
    assert not held_out & rest and data.test.labels.bincount().tolist() == [4, 4]
    with pytest.raises(DataError, match=r"groups=patient is not found in the names of 40 images"):
        load(root, groups="patient")
    with pytest.raises(UsageError, match=r"neither a column .* nor a valid pattern"):
        load(root, groups="(")
    with pytest.raises(DataError, match=r"images of the groups? .*0, 1.* in train and in val"):
        load(folder(tmp_path / "e", {"train": 3, "val": 2}), groups=r"bild (\d)")


def test_links_are_followed_and_rings_end(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    photo(7).save(elsewhere / "x.png")
    (root / "train" / "alpha" / "more").symlink_to(elsewhere)
    (elsewhere / "ring").symlink_to(root / "train" / "alpha")
    (elsewhere / "others").symlink_to(root)  # with the images of other classes and splits
    (root / "train" / "alpha" / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    data = load(root)
    assert sorted(data.train.names) == sorted(
        [f"train/{name}/bild {i}.jpg" for name in NAMES for i in range(2)]
        + ["train/alpha/more/x.png", "train/alpha/nowhere.jpg"]
    )
    place = data.train.names.index("train/alpha/nowhere.jpg")  # counted, and reported when it is read
    with pytest.raises(DataError, match=r"nowhere.jpg is not there"):
        data.train.read_image(place)


def as_nobody(work: Callable[[], object]) -> str:
    """The error of `work` in a child process without root's permission to read everything."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            message = str(work())
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_without_permission() -> None:
    with tempfile.TemporaryDirectory() as place:  # tmp_path is in a folder that others may not enter
        os.chmod(place, 0o755)
        root = folder(Path(place) / "d", {"train": 2, "val": 1})
        data = load(root)
        (root / "train" / "alpha" / "bild 0.jpg").chmod(0)
        message = as_nobody(lambda: data.train.read_image(0))
        assert re.match(r"DataError: .*bild 0.jpg cannot be read: no permission", message), message
        assert as_nobody(lambda: data.train.read_image(1).shape[2]) == "3"
        (root / "val" / "alpha").chmod(0)
        message = as_nobody(lambda: load(root))
        assert re.match(
            r"DataError: .*alpha cannot be read \(Permission denied\); give yourself permission", message
        ), message
        (root / "val" / "alpha").chmod(0o755)
        (root / "list.txt").write_text("")
        (root / "list.txt").chmod(0)
        message = as_nobody(lambda: load(root, quarantine=str(root / "list.txt")))
        assert re.match(r"DataError: the quarantine list .* cannot be read \(Permission denied\)", message), message


@given(st.lists(st.text(st.characters(codec="utf-8")) | st.just("\udcff"), max_size=20))
def test_file_names_round_trip(names: list[str]) -> None:
    kept = FileNames(names)
    assert list(kept) == names and len(kept) == len(names) and kept[:3] == names[:3]


def batches(split: object, crop: Crop, workers: int, first: int, last: int) -> list[torch.Tensor]:
    assert isinstance(split, DiskSplit)
    own = loader(replace(split, workers=workers), crop)
    try:
        return [own.batch(step).images for step in range(first, last)]
    finally:
        own.close()


@pytest.mark.parametrize("kind", ["centre", "scale", "resized"])
def test_any_number_of_workers_and_any_start_are_bit_identical(tmp_path: Path, kind: str) -> None:
    split = load(folder(tmp_path / "d", {"train": 5, "val": 1})).train
    crop = Crop(kind, (26, 40))
    whole = batches(split, crop, 0, 0, 6)
    assert whole[0].shape == (6, 3, 24, 24) and whole[0].is_contiguous(memory_format=torch.channels_last)
    for workers in (1, 4):
        for a, b in zip(whole[3:], batches(split, crop, workers, 3, 6), strict=True):  # as after a resume in mid-epoch
            assert torch.equal(a, b)
    assert not torch.equal(whole[0], whole[5])


def test_images_in_memory_are_cropped_as_those_on_disk(tmp_path: Path) -> None:
    split = load(folder(tmp_path / "d", {"train": 5, "val": 1})).train
    images = torch.stack([image[:40, :50] for image in map(split.read_image, range(15))])
    for i, (name, image) in enumerate(zip(split.names, images, strict=True)):
        Image.fromarray(image.numpy()).save((tmp_path / "d" / name).with_suffix(".png"))
        (tmp_path / "d" / name).unlink()
        assert i < 15
    same = load(tmp_path / "d").train
    crop = Crop("scale", (26, 40))
    a, b = (loader(s, crop).batch(4).images for s in (same, MemorySplit(images, split.labels)))
    assert torch.equal(a, b)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    kind=st.sampled_from(["scale", "resized"]),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS),
)
@settings(max_examples=200, deadline=None)
def test_crop_boxes_are_inside_the_image(height: int, width: int, kind: str, draws: list[float]) -> None:
    top, left, h, w = Crop(kind).compute_box(height, width, 224, draws)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0
    if kind == "scale":
        assert h == w and abs(h - 224 * min(height, width) / np.clip(min(height, width) * 224 / h, 256, 480)) <= 1
    elif width * 3 // 4 <= height <= width * 4 // 3 and min(height, width) > 30:
        assert 0.06 <= h * w / (height * width) <= 1


def test_a_crop_equals_resizing_the_image_first() -> None:
    """2015's form: resize the shorter side, then crop; only the box is resized here, its borders on whole pixels."""
    image = photo(3, 500, 375)
    pixels = torch.from_numpy(np.asarray(image).copy())
    draws = [0.25, 0.5, 0.4] + [0.5] * (NUM_DRAWS - 3)
    shown = Crop("scale")(pixels, 224, draws)
    shorter = 256 + int(0.4 * 225)
    top, left, side, _ = Crop("scale").compute_box(375, 500, 224, draws)
    whole = image.resize((round(500 * shorter / 375), shorter), Image.Resampling.BILINEAR)
    y, x = round(top * shorter / 375), round(left * shorter / 375)
    expected = np.asarray(whole.crop((x, y, x + 224, y + 224))).astype(int)
    assert np.abs(shown.numpy().astype(int) - expected).mean() < 1.5
    assert side == round(224 * 375 / shorter)


def test_colour_moves_along_the_principal_components() -> None:
    pixels = torch.full((4000, 1, 1, 3), 128, dtype=torch.uint8)
    plain = replace(SHAPE, size=(1, 1))
    draws = StepDraws(0, 0, len(pixels))
    moved = Augmentation(colour=True)(pixels, plain, draws) - Augmentation()(pixels, plain, draws)
    vectors = torch.tensor(PCA_VECTORS)
    along = moved.flatten(1) @ vectors / (0.1 * torch.tensor(PCA_VALUES))
    assert along.std(0).tolist() == pytest.approx([1, 1, 1], abs=0.05)
    assert (vectors.T @ vectors - torch.eye(3)).abs().max() < 1e-3
    grey = Preprocessing(1, (1, 1), 1, torch.zeros(1), torch.ones(1))
    with pytest.raises(UsageError, match="colour=true needs images of three channels"):
        Augmentation(colour=True)(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), grey, StepDraws(0, 0, 1))


def test_the_mean_is_that_of_the_images_as_the_network_sees_them(tmp_path: Path) -> None:
    split = load(folder(tmp_path / "d", {"train": 5, "val": 1})).train
    pixels = torch.cat([p for p, _ in PreprocessedSplit(split, SHAPE).batches(4)]).double() / 255
    measured = compute_statistics(split, SHAPE, per_pixel=False)
    torch.testing.assert_close(measured.mean.double(), pixels.mean((0, 1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(measured.std.double(), pixels.std((0, 1, 2), unbiased=False), rtol=0, atol=1e-6)
    assert compute_statistics(split, SHAPE, per_pixel=True).mean.shape == (24, 24, 3)


def cut(root: Path, name: str) -> Path:
    file = root / name
    file.write_bytes(file.read_bytes()[:-200])
    return file


def test_a_bad_image_stops_or_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 5, "val": 3})
    cut(root, "train/alpha/bild 2.jpg")
    split = load(root).train
    own = loader(split, Crop("scale", (26, 40)))
    with pytest.raises(
        DataError, match=r"bild 2.jpg is damaged: .*; fix or remove it, or go on without it: --on-bad-image skip"
    ):
        [own.batch(step) for step in range(3)]
    for workers in (0, 2):
        skipping = load(root, on_bad="skip", workers=workers).train
        assert isinstance(skipping, DiskSplit)
        own = loader(skipping, Crop("scale", (26, 40)))
        shown = [own.batch(step) for step in range(5)]  # 15 images, two epochs
        sizes = [len(batch.labels) for batch in shown]
        own.close()
        assert sum(sizes) == 28 and list(skipping.errors.skipped) == ["train/alpha/bild 2.jpg"]
    bad = next(step for step in range(5) if sizes[step] < 6)  # the others are shown as if nothing were amiss
    where = step_indices(3, 15, 6, bad)
    position = [i for i, p in enumerate(where.tolist()) if split.names[p] == "train/alpha/bild 2.jpg"]
    photo(50).save(root / "train" / "alpha" / "bild 2.jpg")
    fixed = loader(load(root).train, Crop("scale", (26, 40))).batch(bad).images
    kept = [i for i in range(6) if i not in position]
    assert torch.equal(fixed[kept], shown[bad].images)


def test_the_first_process_of_a_machine_opens_what_will_be_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "d", {"train": 6, "val": 4})
    cut(root, "val/alpha/bild 1.jpg")
    recipe = replace(find_classification_recipe("photos"), data=str(root), net="resnet8", image_size=16, eval_resize=20)
    with pytest.raises(DataError, match=r"bild 1.jpg is damaged"):
        build_task(recipe, RunOptions(device="cpu"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert len(build_task(recipe, RunOptions(device="cpu")).test) == 12


def test_a_run_that_a_image_stopped_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "d", {"train": 6, "val": 4})
    cut(root, "val/alpha/bild 1.jpg")
    values = TINY_PHOTOS | {"data": str(root), "steps": 1}
    with monkeypatch.context() as patch:  # damage that the look before training does not see is met at the end
        patch.setattr(DiskSplit, "require_readable", lambda self: None)
        with pytest.raises(DataError, match=r"bild 1.jpg is damaged.*on_bad_image='skip'"):
            resnetlab.train("photos", out=tmp_path / "run", **values)  # type: ignore[arg-type]
    whole = resnetlab.train("photos", out=tmp_path / "whole", on_bad_image="skip", **values)  # type: ignore[arg-type]
    assert run_command(["train", "--resume", str(tmp_path / "run"), "--seed", "5", "--on-bad-image", "skip"]) == 1
    assert 'on_bad_image = "stop"' in (tmp_path / "run" / "recipe.toml").read_text()
    assert run_command(["train", "--resume", str(tmp_path / "run"), "--on-bad-image", "skip"]) == 0
    for name in ("model.safetensors", "recipe.toml", "skipped.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.n == 11


def test_training_reports_what_it_skips(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 6, "val": 4})
    cut(root, "train/alpha/bild 2.jpg")
    cut(root, "val/alpha/bild 1.jpg")
    values = TINY_PHOTOS | {"data": str(root)}
    with pytest.raises(DataError, match=r"val/alpha/bild 1.jpg is damaged"):  # before training
        resnetlab.train("photos", out=tmp_path / "stop", **values)  # type: ignore[arg-type]
    assert not (tmp_path / "stop").exists()
    message: list[str] = []
    result = resnetlab.train("photos", out=tmp_path / "run", on_bad_image="skip", report=message.append, **values)  # type: ignore[arg-type]
    assert result.n == 11 and result.split == "val"
    assert set(json.loads((tmp_path / "run" / "skipped.json").read_text())) == {
        "train/alpha/bild 2.jpg", "val/alpha/bild 1.jpg"}  # fmt: skip
    assert any("2 images could not be read and were left out" in sentence for sentence in message)
    evaluated = resnetlab.evaluate(result.model, str(root), on_bad_image="skip", device="cpu", precision="fp32")
    assert (evaluated.n, list(evaluated.metrics.skipped), evaluated.split) == (11, ["val/alpha/bild 1.jpg"], "val")
    assert evaluated.top1_error == result.top1_error
    with pytest.raises(DataError, match=r"bild 1.jpg is damaged"):
        resnetlab.evaluate(result.model, str(root), device="cpu")


def test_quarantined_images_are_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 6, "val": 4})
    (tmp_path / "list.txt").write_text("# unreadable\ntrain/alpha/bild 2.jpg\n")
    data = load(root, quarantine=str(tmp_path / "list.txt"))
    assert len(data.train) == 17 and "train/alpha/bild 2.jpg" not in data.train.names
    assert data.fingerprint != load(root).fingerprint
    with pytest.raises(DataError, match=r"the quarantine list .* cannot be read"):
        load(root, quarantine=str(tmp_path / "none.txt"))
    (tmp_path / "list.txt").write_text("".join(f"val/alpha/bild {i}.jpg\n" for i in range(4)))
    with pytest.raises(DataError, match="leaves no image of class alpha"):
        load(root, quarantine=str(tmp_path / "list.txt"))


def test_a_run_on_a_folder_is_resumed_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "d", {"": 10})
    values = TINY_PHOTOS | {"data": "d", "log_every": 2, "checkpoint_minutes": 0, "val_images": 6}
    result = resnetlab.train("photos", out="run", workers=2, **values)  # type: ignore[arg-type]
    drawn = json.loads((tmp_path / "run" / "holdout.json").read_text())
    assert len(drawn["held-out"]) == 6 and len(drawn["evaluated while training"]) == 6 and result.split == "held-out"
    shutil.copytree("run", "again")
    for gone in ("model.safetensors", "result.json", "checkpoints/step-00000008.safetensors"):
        (tmp_path / "again" / gone).unlink()
    monkeypatch.chdir(tmp_path / "d")  # paths in the recipe start where the run was started
    from resnetlab.training.train import RunOptions, resume

    resume(tmp_path / "again", RunOptions(device="cpu"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model.safetensors"
    ).read_bytes()
    photo(200).save(tmp_path / "d" / "alpha" / "new.jpg")
    (tmp_path / "again" / "result.json").unlink()
    with pytest.raises(RunError, match="was made with another recipe or other data"):
        resume(tmp_path / "again", RunOptions(device="cpu"))


def test_a_folder_the_model_did_not_learn_from_is_evaluated_whole(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", {"": 10}), folder(tmp_path / "other", {"": 4})
    for i, file in enumerate(other.rglob("*.jpg")):
        photo(300 + i, 70, 50).save(file)  # the names are the same, the images are not
    result = resnetlab.train("photos", data=own, out=tmp_path / "run", **TINY_PHOTOS)  # type: ignore[arg-type]
    assert resnetlab.evaluate(result.model, own, device="cpu").split == "held-out"
    evaluated = resnetlab.evaluate(result.model, str(other), device="cpu")
    assert (evaluated.split, evaluated.n) == ("all", 12)
    shutil.move(other, tmp_path / "third" / "val")
    evaluated = resnetlab.evaluate(result.model, str(tmp_path / "third"), device="cpu")
    assert (evaluated.split, evaluated.n) == ("val", 12)
    with pytest.raises(UsageError, match="unknown split 'train'; known: test, val"):
        resnetlab.evaluate(result.model, str(tmp_path / "third"), split="train", device="cpu")
    with pytest.raises(DataError, match="has no train folder"):
        resnetlab.train("photos", data=str(tmp_path / "third"), **TINY_PHOTOS)  # type: ignore[arg-type]


def test_flowers(tmp_path: Path) -> None:
    if not FLOWERS.is_dir():
        pytest.skip("the flowers are not there: ../shared/data, beside the repository, is missing")
    data = load(FLOWERS)
    assert data.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    assert (len(data.train), len(data.test), data.evaluated_split) == (240, 80, "val")
    result = resnetlab.train("photos", data=str(FLOWERS), out=tmp_path / "run", **(TINY_PHOTOS | {"steps": 2}))  # type: ignore[arg-type]
    assert result.n == 80 and (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_splits_in_any_case_and_under_other_names(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"Train": 4, "Test": 2})
    data = load(root)
    assert (data.classes, data.evaluated_split, len(data.train)) == (NAMES, "test", 12) and data.train.names[
        0
    ].startswith("Train")
    others = (
        ("training", "valid"),
        ("training_set", "validation"),
        ("Train Data", "testing"),
        ("trainset", "Test set"),
    )
    for i, (name, evaluated) in enumerate(others):
        other = load(folder(tmp_path / f"e{i}", {name: 4, evaluated: 2}))
        assert (len(other.train), len(other.test)) == (12, 6)
        assert other.evaluated_split == ("val" if evaluated.startswith("val") else "test")
    with pytest.raises(DataError, match="holds val and valid; put the images of both into val"):
        load(folder(tmp_path / "g", {"train": 4, "val": 2, "valid": 2}))
    assert load(folder(tmp_path / "f", {"": 5}, ("Train", "Ship"))).classes == ("Ship", "Train")  # vehicles
    assert load(folder(tmp_path / "h", {"": 5}, ("train", "ship"))).classes == ("ship", "train")
    folder(tmp_path / "d" / "train", {"": 2})
    with pytest.raises(DataError, match="holds Train and train; put the images of both into train"):
        load(root)


def test_a_quarantine_list_takes_any_name(tmp_path: Path) -> None:
    names = ("#dog", "cat", "two\nlines", 'a "quote', "a\x85b\u2028c", '"q"')
    root = folder(tmp_path / "d", {"": 5}, names)
    listed = [f"{name}/bild 1.jpg" for name in names]
    text = "# a comment\r\n" + "".join(f"{quarantine_line(name)}\r\n" for name in listed)
    (tmp_path / "list.txt").write_bytes(text.encode())
    whole = load(root, quarantine=str(tmp_path / "list.txt")).all_images
    assert whole is not None and len(whole) == 24 and not set(listed) & set(whole.names)


def test_the_check_quarantines_from_a_folder_called_by_a_hash(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 5}, ("#dog", "cat"))
    (root / "#dog" / "bild 1.jpg").write_bytes(b"")
    bad = tmp_path / "bad.txt"
    assert run_command(["data", "check", str(root), "--quarantine", str(bad), "--no-timing", "--workers", "0"]) == 1
    whole = load(root, quarantine=str(bad)).all_images
    assert whole is not None and "#dog/bild 1.jpg" not in whole.names and len(whole) == 9


def test_images_of_other_kinds_are_read_or_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 5})
    shutil.copy(root / "alpha" / "bild 0.jpg", root / "alpha" / "from a browser.jfif")
    photo(77).save(root / "alpha" / "new.avif")
    shutil.copy(root / "alpha" / "bild 0.jpg", root / "alpha" / "no suffix")
    (root / "alpha" / "notes.txt").write_text("no image")
    with pytest.warns(
        UserWarning, match="1 file in the class folders of .* such as alpha/no suffix; save them as JPEG"
    ):
        data = load(root)
    assert data.all_images is not None and len(data.all_images) == 17
    for name in ("alpha/from a browser.jfif", "alpha/new.avif"):
        assert data.all_images.read_image(list(data.all_images.names).index(name)).shape[2] == 3
    assert [(p.kind, Path(p.file).name) for p in check.find_unexpected_files(data)] == [("stray", "no suffix")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_in_another_encoding_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(tmp_path / "f", {"": 3}, ("a", "b\x1b[31m")) / "a"
    os.rename(os.fsencode(place / "bild 0.jpg"), os.fsencode(place) + b"/caf\xe9\n.jpg")
    with pytest.raises(DataError, match=r"/a/caf\\udce9\\n.jpg' is not in UTF-8; rename it \(convmv"):
        sources.load_dataset(str(tmp_path / "f"), tmp_path)
    os.remove(os.fsencode(place) + b"/caf\xe9\n.jpg")
    names = sources.load_dataset(str(tmp_path / "f"), tmp_path).classes
    console.print_table(names[1], names, [(name, "") for name in names])
    assert capsys.readouterr().out.split() == [
        r"b\x1b[31m",
        "a",
        r"b\x1b[31m",
        "a",
        r"b\x1b[31m",
    ]  # none moves the cursor


def test_one_image_left_of_a_batch_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "d", {"train": 2, "val": 1}, ("a", "b"))
    for name in ("a/bild 0.jpg", "a/bild 1.jpg", "b/bild 0.jpg"):
        cut(root, f"train/{name}")
    values = [f"--set={key}={value}" for key, value in TINY_PHOTOS.items() if key not in ("device", "steps", "batch")]
    arguments = ["train", str(root), "--recipe", "photos", "--out", str(tmp_path / "run"), "--on-bad-image", "skip"]
    assert run_command([*arguments, "--steps", "3", "--batch", "2", "--device", "cpu", *values]) == 1
    assert re.search(r"(too few|none) of the .*images of step \d can be read; fix them", capsys.readouterr().err)


def test_output_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "d", {"": 4}, ("größe", "猫"))
    arguments = ["data", "check", str(root), "--no-timing", "--workers", "0"]
    for encoding, wanted in (("ascii", "\\u732b"), ("utf-8", "猫")):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output := io.BytesIO(), encoding))
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0 and wanted in output.getvalue().decode(encoding)
    command = [sys.executable, "-c", "from resnetlab.cli.main import main; main()", *arguments]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert b"set the environment variable PYTHONUTF8=1" in done.stderr + done.stdout
