"""Python objects as data: lists, arrays, PyTorch's and Hugging Face's data sets give what a folder of the same images gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

import resnetlab
from images import folder, photo
from resnetlab.data import digits, sources
from resnetlab.data.dataset import Dataset
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.objects import dataset_from_object, to_pixels
from resnetlab.errors import DataError, ResNetLabError, UsageError
from resnetlab.models.model_file import load_trained_model
from tiny_runs import TINY

VALUES = TINY | {"steps": 3, "device": "cpu", "progress": False}


class Photos(TorchDataset[Any]):
    def __init__(self, n: int = 20, as_tensor: bool = False) -> None:
        self.n, self.as_tensor = n, as_tensor

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = photo(i, 20, 16)
        if self.as_tensor:  # as torchvision's ToTensor
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, i % 2
        return image, i % 2


def loaded(path: Path) -> Dataset:
    return sources.load_dataset(str(path), Path("data"), ReadOptions())


def test_a_list_of_paths_is_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {"": 10})
    pairs = [(file, file.parent.name) for file in root.rglob("*.jpg")]
    data = dataset_from_object(pairs)
    assert data.fingerprint == loaded(root).fingerprint and data.name == f"python:{data.fingerprint}"
    root = folder(tmp_path / "split", {"train": 4, "val": 3})
    lists = {split: [(file, file.parent.name) for file in (root / split).rglob("*.jpg")] for split in ("train", "val")}
    data = dataset_from_object({"validation": lists["val"], "train": lists["train"]})
    assert data.fingerprint == loaded(root).fingerprint and data.train.names == loaded(root).train.names


def test_a_quarantine_list_leaves_out_paths_of_a_list_and_is_refused_for_arrays(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {"": 10})
    pairs = [(file, file.parent.name) for file in sorted(root.rglob("*.jpg"))]
    (tmp_path / "q.txt").write_text(f"{dataset_from_object(pairs).train.names[0]}\n")
    values: dict[str, Any] = VALUES | {"image_size": 16, "quarantine": tmp_path / "q.txt"}
    heard: list[str] = []
    resnetlab.train(pairs, out=tmp_path / "run", report=heard.append, **values)
    counts = re.search(r"(\d+) images to train on, (\d+) held out .*, (\d+) to test on", heard[0])
    assert counts is not None and sum(map(int, counts.groups())) == len(pairs) - 1
    for key in ("quarantine", "groups"):
        with pytest.raises(UsageError, match=f"{key}=x is for images on disk; leave it out"):
            resnetlab.train("digits", out=tmp_path / "none", **VALUES | {key: "x"})  # type: ignore[arg-type]


def test_whole_numbers_may_be_floats() -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 1, 10]
    for form in (np.array(labels, float), [float(label) for label in labels], torch.tensor(labels).float()):
        assert dataset_from_object((images, form)).classes == ("0", "1", "10")


def test_arrays_train_to_the_weights_of_the_data_set(tmp_path: Path) -> None:
    named = digits.load_digits()
    arrays = {
        "train": (named.train.images, named.train.labels),  # type: ignore[attr-defined]
        "test": (named.test.images.float() / 255, named.test.labels.numpy()),  # type: ignore[attr-defined]
    }
    weights = []
    for i, data in enumerate(("digits", arrays)):
        result = resnetlab.train("quick", data=data, out=tmp_path / str(i), **VALUES)  # type: ignore[arg-type]
        weights.append(load_trained_model(Path(result.model)).net.state_dict())
        assert resnetlab.evaluate(result.model, data, device="cpu").top1_error == result.top1_error
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    heard: list[str] = []
    with pytest.raises(DataError, match="were given as Python objects"):
        resnetlab.train(resume=tmp_path / "1", epochs=4, report=heard.append)
    assert heard == [] and (tmp_path / "1" / "result.json").is_file()  # it is finished as before
    with pytest.raises(DataError, match="were given as Python objects"):
        sources.load_dataset("python:0123", Path("data"))


def test_a_pytorch_data_set(tmp_path: Path) -> None:
    first, second = (dataset_from_object({"train": Photos(), "test": Photos(6, kind)}) for kind in (False, True))
    assert first.classes == ("0", "1") and torch.equal(first.test.read_image(3), second.test.read_image(3))
    assert torch.equal(first.train.read_image(1), torch.from_numpy(np.array(photo(1, 20, 16))))
    small = VALUES | {"batch": 4, "image_size": 16, "eval_resize": 20}
    result = resnetlab.train("photos", data=Photos(), out=tmp_path / "run", **small)  # type: ignore[arg-type]
    assert result.n == 4 and result.split == "held-out"


def test_a_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [photo(i, 20, 16) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(20)]}, features=features)
    own = dataset_from_object(data)
    assert own.classes == ("cat", "dog") and len(own.train) == 16
    assert own.all_images is not None and torch.equal(
        own.all_images.read_image(3), torch.from_numpy(np.array(images[3]))
    )
    datasets.DatasetDict({"train": data, "validation": data.select(range(6))}).save_to_disk(str(tmp_path / "saved"))
    saved = sources.load_dataset(f"hf:{tmp_path / 'saved'}", Path("data"))
    assert {name: len(split) for name, split in saved.splits.items()} == {"train": 20, "val": 6}
    with pytest.raises(DataError, match="hf:/nowhere/at/all cannot be loaded"):
        sources.load_dataset("hf:/nowhere/at/all", Path("data"))


def test_every_form_of_an_image() -> None:
    image = photo(5, 20, 16)
    array = np.array(image)
    for form in (array, array.transpose(2, 0, 1), torch.from_numpy(array).double() / 255, array.astype(np.int64)):
        assert torch.equal(to_pixels(form), torch.from_numpy(array))
    assert to_pixels(np.array(image.convert("L"))).shape == to_pixels(Image.new("1", (20, 16))).shape == (16, 20, 3)


REFUSED: dict[str, Any] = {
    "data is a name, a folder, a table, a list": 5,
    "one class only": (np.zeros((4, 8, 8), np.uint8), [1, 1, 1, 1]),
    "4 images and 3 labels": (np.zeros((4, 8, 8), np.uint8), [1, 2, 1]),
    "labels are names or whole numbers": (np.zeros((4, 8, 8), np.uint8), [1.5, 2, 1, 1]),
    "of 8x8x8, which does not tell its channels": (np.zeros((4, 8, 8, 8), np.uint8), [1, 2, 1, 2]),
    "floats from 0 to 1": (np.full((4, 8, 8), 3.0), [1, 2, 1, 2]),
    "bool": (np.ones((4, 8, 8), bool), [1, 2, 1, 2]),
    "has the splits train, val and test, not left, right": {"left": Photos(), "right": Photos()},
    "items of a data set are": [1, 2, 3],
    "label 1 is None; labels are names or whole numbers": [("a.jpg", "a"), ("b.jpg", None)],
    "label 1 is nan; labels": [("a.jpg", "a"), ("b.jpg", float("nan"))],
    r"image 1 is an array of \(9, 9\), image 0 of \(8, 8\)": ([np.zeros((k, k), np.uint8) for k in (8, 9)], [1, 2]),
    "is there, such as": [("nowhere.jpg", "a"), ("nor here.jpg", "b")],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_refused(sentence: str, tmp_path: Path) -> None:
    for call in (resnetlab.train, lambda data, **_: dataset_from_object(data)):
        with pytest.raises(ResNetLabError, match=sentence):
            call(data=REFUSED[sentence], progress=False, out=tmp_path / "run")
    with pytest.raises(UsageError):
        dataset_from_object(None)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("label", [2, -1])
def test_a_number_without_a_name_is_no_label(label: int, several: bool) -> None:
    class Named(list[Any]):
        classes = ("a", "b")
        targets: Any = None

    data = Named([(np.zeros((8, 8), np.uint8), 0)] * 4)
    data.targets = [[k] for k in (0, 1, 0, label)] if several else [0, 1, 0, label]
    with pytest.raises(DataError, match=rf"label 3 is {label}, but 2 classes are named, counted from 0"):
        dataset_from_object(data)


def test_recipe_and_data_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    train = digits.load_digits().train
    pixels, labels = train.images[:400].numpy(), train.labels[:400].numpy()
    options: dict[str, Any] = TINY | {"steps": 1, "device": "cpu", "progress": False}
    first = resnetlab.train((pixels, labels), recipe="quick", out=tmp_path / "a", **options)
    second = resnetlab.train("quick", (pixels, labels), out=tmp_path / "b", **options)
    third = resnetlab.train(recipe="quick", data=(pixels, labels), out=tmp_path / "c", **options)
    weights = [load_trained_model(Path(each.model)).resnet.state_dict() for each in (first, second, third)]
    torch.testing.assert_close(weights[1:], [weights[0]] * 2, rtol=0, atol=0)
    with pytest.raises(UsageError, match="recipe and data are given; leave out what stands before them"):
        resnetlab.train("quick", (pixels, labels), recipe="quick")
    with pytest.raises(UsageError, match=r"give images and labels as one pair: train\(\(X, y\)\)"):
        resnetlab.train(pixels, labels)


def test_labels_in_two_unicode_forms_are_one_class() -> None:
    """macOS stores é as two characters."""
    images = np.zeros((4, 8, 8), np.uint8)
    data = dataset_from_object(
        {"train": (images, ["\u00e9", "e\u0301", "b", "b"]), "val": (images[:2], ["b", "e\u0301"])}
    )
    assert data.classes == ("b", "\u00e9") and data.train.labels.tolist() == [1, 1, 0, 0]


def test_a_dictionary_without_splits_is_refused() -> None:
    with pytest.raises(UsageError, match="a dictionary of data has the splits train, val and test, not none"):
        dataset_from_object({})
