"""JPEGs that a GPU decodes and crops, against the CPU's pixels: on a simulated GPU, whose decoder is the CPU's."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from images import NAMES, folder, photo
from resnetlab.data import device_decode
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import NUM_DRAWS, Crop
from resnetlab.data.decode import decode_on_gpu, decode_pixels, read_plain_size
from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.objects import dataset_from_object
from resnetlab.data.sampler import TrainLoader, crop_image
from resnetlab.data.sources import load_dataset
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.evaluate import evaluate
from resnetlab.evaluation.scores import SKIPPED, Member, predict_scores
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.recipe import Recipe
from resnetlab.training.train import RunOptions, build_task
from simulated_gpu import GPU, GPUTensor, simulated_gpu
from tiny_runs import make_train_state, tiny

HERE = DeviceConfig(torch.device("cpu"), "fp32", 1, "for the test")
PREPROCESSING = Preprocessing(3, (16, 16), 20, torch.full((3,), 0.5), torch.full((3,), 0.25))
LEVEL = 1 / 255 / 0.25  # a grey level after normalisation


def encode(kind: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    photo(1).convert(kind).save(file, "JPEG", **options)  # type: ignore[arg-type]
    return file.getvalue()


def decode_as_a_gpu(files: list[Tensor], device: torch.device) -> list[Tensor]:
    try:
        return [decode_pixels(x.numpy().tobytes(), "it").pin_memory().to(device, non_blocking=True) for x in files]
    except DataError as error:
        raise RuntimeError("nvjpeg error 3 when decoding") from error


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """JPEGs, one of them grey and one without a usable Huffman table, and a PNG."""
    root = folder(tmp_path / "photos", {"train": 5, "val": 4})
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.jpg"))
        photo(7).convert("L").save(files[2])
        photo(8).save(files[3], "PNG")
        content = bytearray(files[1].read_bytes())
        table = content.index(b"\xff\xc4") + 5
        content[table : table + 16] = b"\xff" * 16
        files[1].write_bytes(content)
    return root


def load(images: Path, split: str, decode_on: str, on_bad: str = "skip") -> DiskSplit:
    data = load_dataset(str(images), images, ReadOptions(on_bad)).with_decode_on(decode_on)
    found = data.train if split == "train" else data.test
    assert isinstance(found, DiskSplit)
    return found


def test_only_plain_jpegs_are_left_to_a_gpu() -> None:
    exif = photo(1).getexif()
    exif[0x0112] = 6
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        assert read_plain_size(encode(**options))
    for kind in ("L", "CMYK"):
        assert not read_plain_size(encode(kind))
    assert not read_plain_size(encode(exif=exif.tobytes())) and not read_plain_size(encode(keep_rgb=True))
    content = encode()
    assert not any(map(read_plain_size, (content[:-300], content[:20], b"", b"\xff\xd8\xff", b"\x89PNG")))


@pytest.mark.parametrize(("kind", "levels"), [("resized", 1), ("scale", 1), ("centre", 2)])
def test_a_gpus_crop_is_that_of_the_cpu(kind: str, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the grey levels that torch's and Pillow's ways of rounding are apart."""
    crop, most = Crop(kind, (18, 40)), 0
    for i in range(12):
        pixels = decode_pixels(encode_photo(i), "it")
        draws = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(i), dtype=torch.float64).tolist()
        ours = crop_image(pixels, PREPROCESSING, crop, draws)
        with simulated_gpu(monkeypatch):
            theirs = crop_image(pixels.pin_memory().to(GPU, non_blocking=True), PREPROCESSING, crop, draws)
        assert isinstance(theirs, GPUTensor) and theirs.shape == ours.shape and theirs.values.dtype == torch.uint8
        most = max(most, int((theirs.values.int() - ours.int()).abs().max()))
    assert most <= levels


def encode_photo(i: int) -> bytes:
    file = io.BytesIO()
    photo(i, 40 + 7 * i, 60 - 3 * i).save(file, "JPEG", quality=90)
    return file.getvalue()


def test_a_gpu_decodes_into_memory_that_nothing_queued_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's decoder writes at once, without waiting for the caller's stream, into memory of the current one."""
    streams = []

    def decode_jpeg(files: list[Tensor], mode: object, device: torch.device) -> list[Tensor]:
        streams.append(torch.cuda.current_stream())
        return [torch.zeros(3, 4, 5, dtype=torch.uint8, device=device) + len(file) for file in files]

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode_jpeg)
    with simulated_gpu(monkeypatch) as gpu:
        for _ in range(2):
            found = decode_on_gpu([torch.zeros(n, dtype=torch.uint8) for n in (1, 2)], GPU)
            assert [(tuple(x.shape), int(x.sum()) // 60) for x in found] == [((4, 5, 3), 1), ((4, 5, 3), 2)]
            _ = [x.float() for x in found]
            del found
        assert streams[0] is streams[1] is not torch.cuda.current_stream() and gpu.reused == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_a_gpu_decodes_has_the_cpus_draws(
    workers: int, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentation = Augmentation(flip=True, colour=True, erasing=0.3, crop=Crop("resized"))
    monkeypatch.setattr(device_decode, "decode_on_gpu", decode_as_a_gpu)
    device_decode._require_decoder.cache_clear()

    def make(split: DiskSplit, config: DeviceConfig) -> TrainLoader:
        return TrainLoader(split, PREPROCESSING, augmentation, 12, 3, config)

    ours = make(load(images, "train", "cpu"), HERE)
    expected = [ours.batch(step) for step in (0, 1)]
    split = replace(load(images, "train", "device"), workers=workers)
    with simulated_gpu(monkeypatch) as gpu:
        theirs = make(split, DeviceConfig(GPU, "fp32", 1, "for the test"))
        found = [theirs.batch(step) for step in (0, 1)]
        theirs.close()
        assert gpu.waits == []
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.labels.values, other.labels)  # type: ignore[attr-defined]
        apart = (batch.images.values - other.images).abs().max()  # type: ignore[attr-defined]
        assert float(apart) < 1.01 * LEVEL
    assert sum(len(batch.labels) for batch in expected) < 24
    assert split.errors.skipped.keys() == ours.split.errors.skipped.keys() and len(split.errors.skipped) == 1


def test_what_a_gpu_cannot_decode_the_cpu_does(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: list[Tensor], device: torch.device) -> list[Tensor]:
        raise RuntimeError("nvjpeg error 7\nmore")

    monkeypatch.setattr(device_decode, "decode_on_gpu", fail)
    split = load(images, "train", "device")
    readable = [0, 2, 3, 4]
    files = [split.read_encoded(i) for i in readable]
    assert [x.ndim for x in files] == [1, 3, 3, 1]
    with simulated_gpu(monkeypatch), pytest.warns(UserWarning, match=r"cannot decode some JPEG \(nvjpeg error 7\)"):
        positions, found = device_decode.decode_images(split, files, readable, GPU)
    assert positions == [0, 1, 2, 3]
    for i, x in zip(readable, found, strict=True):
        assert torch.equal(x.values, split.read_image(i))  # type: ignore[attr-defined]
    device_decode._require_decoder.cache_clear()
    with simulated_gpu(monkeypatch), pytest.raises(UsageError, match=r"nvjpeg error 7\); leave it to the CPU"):
        device_decode.decodes_on_device(split, GPU)
    with pytest.raises(UsageError, match="mps decodes none"):
        device_decode.decodes_on_device(split, torch.device("mps"))


def test_an_evaluation_that_a_gpu_decodes_for_has_the_cpus_scores(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_decode, "decode_on_gpu", decode_as_a_gpu)
    device_decode._require_decoder.cache_clear()
    net = build("resnet8", classes=len(NAMES), seed=0)
    (expected,) = predict_scores([Member.from_network(net, PREPROCESSING, HERE)], load(images, "val", "cpu"), HERE)
    with simulated_gpu(monkeypatch):
        config = DeviceConfig(GPU, "fp32", 1, "for the test")
        split, member = load(images, "val", "device"), Member.from_network(net, PREPROCESSING, config)
        (found,) = predict_scores([member], split, config)
    assert torch.equal(found == SKIPPED, expected == SKIPPED) and int((expected == SKIPPED).all(1).sum()) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert not torch.equal(found, expected)  # it is the GPU's resize that was computed


def test_on_a_cpu_nothing_differs_and_the_recipe_says_what_was_asked(images: Path) -> None:
    values = {"data": str(images), "crop": "resized", "on_bad_image": "skip", "pad": 0, "eval_resize": 10, "batch": 12}
    batches = []
    for decode_on in ("cpu", "device"):
        recipe = tiny(decode_on=decode_on, val_images=0, **values)
        task = build_task(recipe, RunOptions(device="cpu"))
        batches.append(task.micro_batches(0)[0].images)  # type: ignore[attr-defined]
        assert isinstance(recipe, Recipe) and recipe.to_json().get("decode_on") == {"device": "device"}.get(decode_on)
        assert Recipe.from_values(recipe.to_json()) == recipe
    assert torch.equal(*batches)
    model = task.trained_model({})  # type: ignore[attr-defined]
    figures = [
        evaluate(model, images, on_bad_image="skip", decode_on=decode_on, device="cpu").to_json()
        for decode_on in ("cpu", "device")
    ]
    assert figures[1].pop("decode_on") == "device" and figures[0] == figures[1]
    files = [(path, path.parent.name) for path in sorted(images.rglob("*.jpg"))]
    listed = build_task(
        replace(recipe, data="python"),
        RunOptions(device="cpu", dataset=dataset_from_object(files, ReadOptions("skip"))),
    )
    assert listed.loader.split.decode_on == "device"  # type: ignore[attr-defined]
    for wrong in (lambda: tiny(decode_on="gpu"), lambda: evaluate(model, images, decode_on="gpu")):
        with pytest.raises(UsageError, match="unknown decode_on 'gpu'"):
            wrong()
    with pytest.raises(UsageError, match="decode_on=device is for images on disk"):
        evaluate(make_train_state(tiny()).task.trained_model({}), "digits", decode_on="device", device="cpu")  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="decode_on=device is for images on disk"):
        build_task(tiny(decode_on="device"), RunOptions(device="cpu"))
    with pytest.raises(UsageError, match="trivial_augment changes each image on the CPU"):
        build_task(tiny(decode_on="device", trivial_augment=True, **values), RunOptions(device="cpu"))
