"""Images of any number of channels and of 16 and 32 bits: what reaches the network, from the file to the served prediction."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import cells
import resnetlab
from images import png_of
from resnetlab.cli.main import main
from resnetlab.data import box_dataset, sources
from resnetlab.data.annotations import AnnotatedItem
from resnetlab.data.check import check_dataset
from resnetlab.data.decode import decode_as, decode_pixels, find_pixel_format, read_header
from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.objects import dataset_from_object
from resnetlab.data.pack import pack_shards
from resnetlab.data.prefetch import preprocess_image
from resnetlab.device import select_device
from resnetlab.errors import DataError, ResNetLabError, UsageError
from resnetlab.inference.export import describe_export
from resnetlab.inference.inference_module import InferenceModule
from resnetlab.inference.resizing import Resize
from resnetlab.preprocessing import RGB, PixelFormat, Preprocessing, pixel_statistics, render_pixels
from resnetlab.training.recipes import photos
from resnetlab.training.recorder import RunStopped
from resnetlab.training.run_options import RunOptions
from resnetlab.training.tasks.base import TaskSetup
from resnetlab.training.tasks.classification_data import load_source

tifffile = pytest.importorskip("tifffile")
SETTINGS: dict[str, Any] = {
    "net": "resnet8", "batch": 8, "image_size": 16, "eval_resize": 18, "seed": 0, "progress": False, "steps": 4,
}  # fmt: skip
Array = NDArray[Any]


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    """Values over the whole range of a type."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(300, 1000, shape).astype(np.float32)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


def npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png(array: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def deep_png(array: Array) -> bytes:
    """16 bits a value, of two to four channels."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png_of(width, height, (16, {2: 4, 3: 2, 4: 6}[channels]), rows)


def call(*arguments: str) -> None:
    """Runs a command, which must succeed."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


GREY: dict[str, Any] = {"photometric": "minisblack"}
FORMS: dict[
    str, Callable[[], tuple[bytes, Array]]
] = {}  # the bytes of a file, and its values as NumPy and tifffile have them


def form(
    name: str, write: Callable[[Array], bytes], shape: tuple[int, ...], dtype: str, move: int | None = None
) -> None:
    def make() -> tuple[bytes, Array]:
        array = random_array(shape, dtype)
        content = write(array)
        if content.startswith((b"II", b"MM")):
            assert np.array_equal(tifffile.imread(io.BytesIO(content)).squeeze(), array.squeeze())
        expected = array[..., None] if array.ndim == 2 else np.moveaxis(array, 0, -1) if move == 0 else array
        return content, expected

    FORMS[name] = make


form("npy, channels last", npy, (20, 24, 5), "uint16")
form("npy, channels first", npy, (13, 20, 24), "float32", 0)
form("npy, big-endian", lambda a: npy(a.astype(a.dtype.newbyteorder(">"))), (20, 24, 4), "int16")
form("npy, Fortran's order", lambda a: npy(np.asfortranarray(a)), (20, 24, 2), "uint8")
form("npy, one channel", npy, (20, 24), "int16")
form("npy, RGB of 16 bits", npy, (20, 24, 3), "uint16")
form("TIFF, samples", lambda a: tiff(a, planarconfig="contig", **GREY), (20, 24, 5), "uint16")
form("TIFF, planes", lambda a: tiff(a, planarconfig="separate", **GREY), (4, 20, 24), "uint8", 0)
form("TIFF, pages of one array", lambda a: tiff(a, **GREY), (6, 20, 24), "float32", 0)
form("TIFF, pages of bytes", lambda a: tiff(a, **GREY), (7, 20, 24), "uint8", 0)
form(
    "TIFF, thirteen bands, packed",
    lambda a: tiff(a, planarconfig="contig", compression="zlib", **GREY),
    (20, 24, 13),
    "uint16",
)
form("TIFF, LZW and a predictor", lambda a: tiff(a, planarconfig="contig", compression="lzw", predictor=True, **GREY),
     (20, 24, 5), "uint16")  # fmt: skip
form("TIFF, RGB of 16 bits", lambda a: tiff(a, photometric="rgb"), (20, 24, 3), "uint16")
form("TIFF, RGB and infrared", lambda a: tiff(a, photometric="rgb", extrasamples=["unspecified"]), (20, 24, 4), "uint8")
form("TIFF, two channels", lambda a: tiff(a, planarconfig="contig", **GREY), (20, 24, 2), "uint8")
form("TIFF, grey", lambda a: tiff(a, **GREY), (20, 24), "uint16")
form("TIFF, grey, big-endian", lambda a: tiff(a, byteorder=">", **GREY), (20, 24), "uint16")
form("TIFF, signed", lambda a: tiff(a, **GREY), (20, 24), "int16")
form("TIFF, floats", lambda a: tiff(a, **GREY), (20, 24), "float32")
form("TIFF, OME", lambda a: tiff(a, ome=True, metadata={"axes": "CYX"}, **GREY), (5, 20, 24), "uint16", 0)
form("TIFF, ImageJ", lambda a: tiff(a, imagej=True, metadata={"axes": "CYX"}), (5, 20, 24), "uint16", 0)
form("BigTIFF", lambda a: tiff(a, bigtiff=True, planarconfig="contig", **GREY), (20, 24, 5), "int16")
form("PNG of 16 bits", png, (20, 24), "uint16")
form("PNG, RGB of 16 bits", lambda a: deep_png(a), (20, 24, 3), "uint16")


@pytest.mark.parametrize("name", FORMS)
def test_values_are_read_as_numpy_and_tifffile_read_them(name: str) -> None:
    content, expected = FORMS[name]()
    found = find_pixel_format(content, "x")
    assert found == PixelFormat(expected.shape[2], expected.dtype.name)
    pixels = decode_as(content, "x", found)
    assert pixels.dtype == torch.float32 and np.array_equal(pixels.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_turn_all_channels_as_pillow_turns_a_photo(orientation: int) -> None:
    array = random_array((6, 9, 3), "uint8")
    tag = [(274, "H", 1, orientation, False)]
    photo = decode_pixels(tiff(array, photometric="rgb", extratags=tag), "x")
    five = np.concatenate([array, array[..., :2]], 2)
    stored = decode_as(tiff(five, planarconfig="contig", extratags=tag, **GREY), "x", PixelFormat(5, "uint8"))
    assert torch.equal(stored[..., :3], photo.float())


def test_ordinary_images_are_read_as_ever() -> None:
    colours, grey = random_array((20, 24, 3), "uint8"), random_array((20, 24), "uint8")
    alpha = random_array((20, 24, 4), "uint8")
    for content in (png(colours), png(grey), png(alpha), tiff(colours, photometric="rgb"), tiff(grey, **GREY),
                    tiff(alpha, photometric="rgb", extrasamples=["unassalpha"]), npy(colours), npy(grey)):  # fmt: skip
        assert find_pixel_format(content, "x") == RGB
    for array in (colours, grey, np.moveaxis(colours, -1, 0)):  # the same bits from .npy as from PNG
        image = np.moveaxis(array, 0, -1) if array.shape[0] == 3 else array
        assert torch.equal(decode_pixels(npy(array), "x"), decode_pixels(png(image), "x"))
    assert find_pixel_format(png(alpha), "x", 4) == PixelFormat(4, "uint8")  # transparency as a channel, if asked for
    assert np.array_equal(decode_as(png(alpha), "x", PixelFormat(4, "uint8")).numpy(), alpha.astype(np.float32))
    deep = random_array((20, 24), "uint16")
    clear = random_array((20, 24, 4), "uint16")
    assert np.array_equal(decode_as(deep_png(clear), "x", PixelFormat(4, "uint16")).numpy(), clear.astype(np.float32))
    white = np.rint(65_535 + (clear[..., :3] - 65_535.0) * clear[..., 3:] / 65_535)  # drawn on white, unless asked for
    assert np.abs(decode_as(deep_png(clear), "x", PixelFormat(3, "uint16")).numpy() - white).max() <= 1
    assert find_pixel_format(deep_png(clear[..., :2]), "x") == PixelFormat(1, "uint16")
    with pytest.raises(DataError, match="x is damaged"):
        find_pixel_format(deep_png(clear)[:900], "x")
    assert find_pixel_format(png(deep), "x", 3) == RGB  # 16-bit grey as 8-bit RGB, if asked for
    assert find_pixel_format(png(grey), "x", 1) == PixelFormat(1)
    assert np.array_equal(decode_as(png(grey), "x", PixelFormat(1))[..., 0].numpy(), grey)


UNUSABLE: dict[str, bytes] = {
    "has values that are not finite": npy(np.full((20, 24, 5), np.nan, np.float32)),
    "has 64 bits per value of type int64": npy(np.zeros((20, 24, 5), np.int64)),
    "is an array of 20x20x20, which does not tell its channels": npy(np.zeros((20, 20, 20), np.uint16)),
    "is an array of 200x64x60, which does not tell": npy(np.zeros((200, 64, 60), np.uint16)),
    "has 4 dimensions": npy(np.zeros((2, 8, 8, 3), np.uint8)),
    "is damaged: it is cut short": npy(np.zeros((20, 24, 5), np.uint16))[:-1],
    "or holds Python objects": npy(np.array([[{}]])),
    r"several pages \(3x20x24\); channels=3 takes": tiff(np.zeros((3, 20, 24), np.uint16), metadata=None, **GREY),
    "more than": npy(np.zeros((0, 24), np.uint16))[:64].replace(b"(0, 24)", b"(9, 24)"),
}


@pytest.mark.parametrize("sentence", [s for s in UNUSABLE if s != "more than"])
def test_what_cannot_be_read_is_refused_by_name(sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^x .*{sentence}"):
        find_pixel_format(UNUSABLE[sentence], "x")


SEVERAL = [
    name
    for name in FORMS
    if name.startswith(("TIFF, p", "TIFF, samp", "TIFF, OME", "TIFF, I", "TIFF, RGB and", "TIFF, two"))
]


@pytest.mark.parametrize("name", SEVERAL)
def test_eight_bit_readers_refuse_several_channels(name: str) -> None:
    """Detectors, segmenters and models of 8 bits had the first page of these, or three channels of four."""
    content, array = FORMS[name]()
    with pytest.raises(DataError, match=rf"a\.tif has {array.shape[2]} channels.*, where grey or RGB of 8 bits"):
        decode_pixels(content, "a.tif")


def test_arrays_of_eight_bits_are_images_for_a_detector(tmp_path: Path) -> None:
    colours = random_array((20, 24, 3), "uint8")
    (tmp_path / "a.npy").write_bytes(npy(colours))
    assert read_header(tmp_path / "a.npy") == ((20, 24), False)
    assert np.array_equal(AnnotatedItem("a", tmp_path / "a.npy", (20, 24)).read_pixels().numpy(), colours)
    (tmp_path / "b.npy").write_bytes(npy(random_array((20, 24, 5), "uint16")))
    with pytest.raises(DataError, match=r"b\.npy has 5 channels of 16 bits, where grey or RGB of 8 bits are expected"):
        read_header(tmp_path / "b.npy")


def test_a_few_deep_images_among_others_are_read_as_eight_bits(tmp_path: Path) -> None:
    """One PNG of 16 bits that comes first made all others "of another kind", which `skip` left out."""
    for i in range(6):
        values = random_array((20, 24, 3), "uint16" if i == 0 else "uint8")
        place = tmp_path / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(deep_png(values) if i == 0 else png(values))
    split = sources.load_dataset(str(tmp_path), tmp_path).all_images
    assert split is not None
    with pytest.warns(UserWarning, match=r"images of 8 bits beside 3 channels of 16 bits: all are read as 8 bits"):
        assert split.find_pixel_format() == RGB
    with pytest.warns(UserWarning, match="all are read as 8 bits"):
        report = check_dataset(sources.load_dataset(str(tmp_path), tmp_path))
    assert [(Path(p.file).name, p.detail) for p in report.problems if "bits" in p.detail] == [
        ("0.png", "its values have more than 8 bits and are scaled to 8")
    ]


@pytest.mark.parametrize("reader", ["folder", "table", "archive", "shards"])
def test_deep_images_after_the_first_are_scaled_and_said_by_name(reader: str, tmp_path: Path) -> None:
    """Where the first image was of 8 bits nothing said that others of 16 were scaled."""
    values = random_array((20, 24), "uint16")
    for i in range(12):
        place = tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(values if i == 7 else (values >> 8).astype(np.uint8)))
    data = tmp_path / "data"
    if reader == "table":
        data = tmp_path / "data.csv"
        rows = sorted((tmp_path / "data").rglob("*.png"))
        data.write_text("\n".join(["path,label", *(f"{file},{file.parent.name}" for file in rows)]))
    elif reader == "archive":
        data = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "data"))
    elif reader == "shards":
        pack_shards(sources.load_dataset(str(data), tmp_path), tmp_path / "shards")
        data = tmp_path / "shards"
    split = sources.load_dataset(str(data), tmp_path).all_images
    assert isinstance(split, DiskSplit)
    with pytest.warns(UserWarning, match=r"^1 image with more than 8 bits per value, scaled to 8, such as .*07\.png"):
        assert split.find_pixel_format() == RGB
    with pytest.warns(UserWarning, match=r"^1 image with more than 8 bits .*07\.png"):
        split.require_readable()
    assert all(torch.equal(split.read_image(i), split.read_image(0)) for i in range(12))


def test_arrays_of_several_types_are_no_images_of_one_scale() -> None:
    """A list of uint8 and uint16 became one array of uint16, in which the former were nearly black."""
    arrays = [random_array((20, 24), "uint8"), random_array((20, 24), "uint16")] * 2
    with pytest.raises(
        DataError, match=r"image 1 has values of uint16, image 0 of uint8; give all images the same type"
    ):
        dataset_from_object((arrays, [0, 1] * 2))


def test_a_detector_says_that_it_scales_to_eight_bits(tmp_path: Path) -> None:
    cells.make_voc_folder(tmp_path, 2, 1)
    (tmp_path / "JPEGImages" / "p1.png").write_bytes(deep_png(random_array((64, 80, 3), "uint16")))
    with pytest.warns(UserWarning, match=r"^1 image with more than 8 bits per value, scaled to 8, such as .*p1\.png"):
        box_dataset.load_boxes(tmp_path)


def test_a_number_of_channels_settles_what_an_array_leaves_open() -> None:
    array = random_array((40, 64, 60), "uint16")
    assert np.array_equal(decode_as(npy(array), "x", PixelFormat(40, "uint16")), np.moveaxis(array, 0, -1))
    assert np.array_equal(decode_as(npy(array), "x", PixelFormat(60, "uint16")), array)
    pages = tiff(array[:3], metadata=None, **GREY)
    assert find_pixel_format(pages, "x", 3) == PixelFormat(3, "uint16")
    with pytest.raises(DataError, match="x has 5 channels of 16 bits, where 4 channels of 16 bits are expected"):
        decode_as(npy(array[..., :5]), "x", PixelFormat(4, "uint16"))
    with pytest.raises(DataError, match="x has 8 bits, grey or RGB, where 5 channels"):
        decode_as(png(array[..., 0].astype(np.uint8)), "x", PixelFormat(5, "uint16"))
    with pytest.raises(DataError, match="x has 5 channels of 16 bits, where grey or RGB of 8 bits are expected"):
        decode_pixels(npy(array[..., :5]), "x")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_values_are_resized_as_pillow_resizes_floats(interpolation: str) -> None:
    array = random_array((50, 37, 5), "uint16").astype(np.float32)
    shape = Preprocessing(5, (20, 20), 24, torch.zeros(5), torch.ones(5), interpolation, "uint16")
    size = (24, int(24 * 50 / 37))  # (width, height)
    resample = getattr(Image.Resampling, interpolation.upper())
    planes = [np.asarray(Image.fromarray(array[..., c]).resize(size, resample)) for c in range(5)]
    top, left = round((size[1] - 20) / 2), 2
    expected = np.stack(planes, -1)[top : top + 20, left : left + 20]
    assert np.abs(preprocess_image(shape, torch.from_numpy(array)).numpy() - expected).max() < 0.2  # of 65,535
    resized = Resize(shape)(torch.from_numpy(array)[None])[0].numpy()
    assert np.abs(resized - expected).max() < 0.2  # as an exported file does it


def test_statistics_are_numpys() -> None:
    array = random_array((40, 6, 7, 5), "float32") * np.float32(100)
    array[..., 4] = 7.25  # a channel of one value is not divided by its rounding
    mean, std = pixel_statistics(torch.from_numpy(array), False, True, white=1)
    wide = array.astype(np.float64)
    assert np.allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
    assert np.allclose(std[:4], wide.std((0, 1, 2))[:4], rtol=1e-6) and float(std[4]) == 1


def write_classes(root: Path, write: Callable[[Path, Array], None], n: int = 12) -> None:
    """Two classes of images of five channels, uint16, that differ in the fourth."""
    for label, name in enumerate(("dry", "wet")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            array = random_array((22, 26, 5), "uint16", seed=100 * label + i) // 4
            array[..., 3] += 30_000 * label
            write(root / name / f"{i}", array)


def write_tiff(path: Path, array: Array) -> None:
    path.with_suffix(".tif").write_bytes(tiff(array, planarconfig="contig", **GREY))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bands")
    write_classes(root, write_tiff)
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on the folder, and what it said."""
    out, said = tmp_path_factory.mktemp("run") / "run", list[str]()
    resnetlab.train(folder, out=out, report=said.append, **SETTINGS)
    return out, said


def test_a_folder_trains_and_its_model_sees_every_channel(run: tuple[Path, list[str]], folder: Path) -> None:
    out, said = run
    assert (
        said[0]
        == "images of 5 channels of 16 bits, read as stored: torch resizes them, and statistics are of every channel"
    )
    assert "channels = 5" in (out / "recipe.toml").read_text()
    model = resnetlab.load(out)
    assert model.preprocessing.pixel_format == PixelFormat(5, "uint16") and model.resnet.conv1.in_channels == 5
    file = folder / "wet" / "3.tif"
    array = tifffile.imread(file)
    # the network's input by hand: the middle of the resized values, divided by 65,535, minus the mean, by the deviation
    x = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, (18, 21), mode="bilinear", antialias=True, align_corners=False)[
        ..., 1:17, 2:18
    ]
    mean, std = (v[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    with torch.no_grad():
        expected = torch.softmax(model.resnet((x / 65_535 - mean) / std) / model.temperature, 1)[0]
    predicted = {each.label: each.score for each in model.predict(file).top}
    assert [predicted[name] for name in model.classes] == pytest.approx(expected.tolist(), abs=1e-5)
    for other in (
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array.astype(np.int32)),
        file.read_bytes(),
        str(file),
    ):
        assert model.predict(other).top == model.predict(file).top
    changed = array.copy()
    changed[..., 4] = 65_535 - changed[..., 4]
    assert model.predict(changed).top != model.predict(file).top
    flip = model.predict(file, protocol="flip")
    assert flip.error is None and flip.top != model.predict(file).top


def test_the_model_is_evaluated_embedded_and_explained(
    run: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    model, recorded = resnetlab.load(run[0]), json.loads((run[0] / "result.json").read_text())
    assert model.evaluate(folder).top1_error == recorded["top1_error"]
    page = resnetlab.evaluate(model, folder, split="train")
    assert page.n + recorded["n"] == 24
    files = sorted(folder.rglob("*.tif"))
    features = model.embed(files)
    x = torch.stack([model.preprocessing(decode_as(f.read_bytes(), "x", PixelFormat(5, "uint16"))) for f in files])
    with torch.no_grad():
        expected = model.resnet.forward_features(model.preprocessing.normalise(x)).mean((2, 3))
    assert torch.allclose(features, expected, atol=1e-5)
    explanation = model.explain(files[0])
    assert explanation.pixels.shape == (16, 16, 5) and explanation.overlay.size == (256, 256)
    call("explain", str(run[0]), str(files[0]), "--out", str(tmp_path / "why"))
    rows = tmp_path / "features.npz"
    call("embed", str(run[0]), str(folder), "--out", str(rows))
    assert np.load(rows)["features"].shape == (24, 64)


def test_eight_bit_images_are_refused_for_it(run: tuple[Path, list[str]], folder: Path, tmp_path: Path) -> None:
    model = resnetlab.load(run[0])
    (tmp_path / "x.png").write_bytes(png(random_array((20, 24, 3), "uint8")))
    with pytest.raises(DataError, match=r"x\.png has 8 bits, grey or RGB, where 5 channels of 16 bits are expected"):
        model.predict(tmp_path / "x.png")
    for array in (np.zeros((20, 24, 5), np.uint8), np.zeros((20, 24, 3), np.uint16), np.zeros((20, 24, 5), np.float32)):
        with pytest.raises(DataError, match=r"where 5 channels of 16 bits .* are expected"):
            model.predict(array)
    with pytest.raises(ResNetLabError, match=r"where 5 channels of 16 bits are expected|digits"):
        model.evaluate("digits")
    from resnetlab.evaluation.robustness import evaluate_corruptions

    with pytest.raises(UsageError, match="corruptions are defined on grey and RGB of 8 bits"):
        evaluate_corruptions(model.evaluate(folder))


def test_a_table_an_archive_and_a_resumed_run_give_the_same_weights(
    run: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    expected = weights(run[0])
    rows = [f"{file},{file.parent.name}" for file in folder.rglob("*.tif")]
    (tmp_path / "bands.csv").write_text("\n".join(["path,label", *rows]))
    shutil.make_archive(str(tmp_path / "bands"), "zip", folder)
    for data in ("bands.csv", "bands.zip"):
        resnetlab.train(tmp_path / data, out=tmp_path / data[-3:], **SETTINGS)
        assert_equal(weights(tmp_path / data[-3:]), expected)

    pack_shards(sources.load_dataset(str(folder), Path()), tmp_path / "shards")
    kinds = [sources.load_dataset(str(place), Path()).train for place in (folder, tmp_path / "shards")]
    images = [
        {name: s.with_pixel_format(s.find_pixel_format()).read_image(i) for i, name in enumerate(s.names)}
        for s in kinds
    ]
    assert_equal(*images)

    def stop(figures: Mapping[str, float]) -> bool:
        return figures["step"] == 2

    settings = {**SETTINGS, "eval_every": 2}
    with pytest.raises(RunStopped):
        resnetlab.train(folder, out=tmp_path / "stopped", on_evaluate=stop, **settings)
    resnetlab.train(resume=tmp_path / "stopped", progress=False)
    assert_equal(weights(tmp_path / "stopped"), expected)


def weights(run: Path) -> dict[str, torch.Tensor]:
    model = resnetlab.load(run)
    return {**model.resnet.state_dict(), "mean": model.preprocessing.mean, "std": model.preprocessing.std}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_model_file_keeps_images_and_the_exported_graph_takes_values_as_stored(run: tuple[Path, list[str]]) -> None:
    model = resnetlab.load(run[0])
    kept = model.reference_images
    assert kept is not None and kept.check.dtype == torch.float32 and kept.check.shape[1:] == (16, 16, 5)
    assert float(kept.check.max()) > 1000 and model.without_images().reference_images is None
    about = describe_export(model, "onnx", "fp32")["input"]
    assert (about["type"], about["channels"], about["shape"][-1]) == ("float32", "uint16", 5)
    graph = torch.nn.Sequential(Resize(model.preprocessing), InferenceModule(model))  # what is exported
    array = random_array((2, 33, 29, 5), "uint16")
    with torch.inference_mode():
        require_scores(model, array, graph(torch.from_numpy(array.astype(np.float32))).numpy())


def require_scores(model: Any, array: Array, scores: Array) -> None:
    for row, each in zip(scores, model.predict(list(array)), strict=True):
        named = {score.label: score.score for score in each.top}
        assert row == pytest.approx([named[name] for name in model.classes], abs=1e-4)


@pytest.mark.slow
def test_an_onnx_file_takes_values_as_stored(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    onnxruntime, model = pytest.importorskip("onnxruntime"), resnetlab.load(run[0])
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession(model.export(tmp_path / "m.onnx"))
    array = random_array((2, 33, 29, 5), "uint16")
    (scores,) = session.run(None, {"pixels": array.astype(np.float32)})
    require_scores(model, array, scores)


def test_the_service_takes_the_same_files(run: tuple[Path, list[str]], folder: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from resnetlab.serve.app import make_app
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.models import ServedClassifier
    from resnetlab.serve.service import Service

    model = resnetlab.load(run[0])
    file = folder / "dry" / "1.tif"
    with TestClient(make_app(Service(ServedClassifier(model), Limits(max_pixels=1000)))) as client:
        files = [("image", (name, content)) for name, content in (
            ("1.tif", file.read_bytes()), ("1.npy", npy(tifffile.imread(file))), ("8.png", png(np.zeros((9, 9), np.uint8))),
            ("large.npy", npy(np.zeros((99, 99, 5), np.uint16))),
        )]  # fmt: skip
        answer = client.post("/predict", files=files).json()["predictions"]
        expected = {each.label: each.score for each in model.predict(file).top}
        for each in answer[:2]:
            assert {row["class"]: row["score"] for row in each["top"]} == pytest.approx(expected, abs=1e-6)
        assert "8 bits, grey or RGB, where 5 channels of 16 bits are expected" in answer[2]["error"]
        assert "99 x 99 pixels, more than 1,000" in answer[3]["error"]
        assert "heat" in client.post("/explain", files=files[:1]).json()


def test_data_check_names_the_images_of_other_channels(folder: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    (mixed / "wet" / "four.tif").write_bytes(tiff(random_array((22, 26, 4), "uint16"), planarconfig="contig", **GREY))
    (mixed / "wet" / "photo.png").write_bytes(png(random_array((22, 26, 3), "uint8")))
    assert not check_dataset(sources.load_dataset(str(folder), Path())).problems
    report = check_dataset(sources.load_dataset(str(mixed), Path()))
    assert {Path(p.file).name: p.kind for p in report.problems} == {"four.tif": "unreadable", "photo.png": "unreadable"}
    assert report.kinds == {"TIF 5 channels of 16 bits": 24} and sorted(report.quarantine) == [
        "wet/four.tif",
        "wet/photo.png",
    ]
    with pytest.raises(DataError, match=r"(four\.tif has 4 channels|photo\.png has 8 bits).*, where 5 channels"):
        resnetlab.train(mixed, out=tmp_path / "run", **SETTINGS)


def test_what_is_for_eight_bits_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for key in ("colour", "trivial_augment"):
        with pytest.raises(
            UsageError, match=f"{key} changes colours of 8 bits, and the images have 5 channels of 16 bits"
        ):
            resnetlab.train(folder, out=tmp_path / "run", **SETTINGS, **{key: True})
    with pytest.raises(DataError, match=r"has 5 channels of 16 bits, not 4 channels"):
        resnetlab.train(folder, out=tmp_path / "run", **SETTINGS, channels=4)
    assert not (tmp_path / "run").exists()


def test_other_augmentations_work_on_all_channels(folder: Path, tmp_path: Path) -> None:
    def double(array: Array) -> Array:
        assert array.shape == (16, 16, 5) and array.dtype == np.float32
        return array * 2

    settings = {**SETTINGS, "steps": 1, "crop": "resized", "mixup": 0.2, "erasing": 0.5, "rotate": 10}
    resnetlab.train(folder, out=tmp_path / "run", transform=double, **settings)


def test_colour_weights_start_a_network_of_five_channels(
    run: tuple[Path, list[str]], folder: Path, tmp_path: Path
) -> None:
    rgb = tmp_path / "rgb"
    write_classes(rgb, lambda path, a: path.with_suffix(".png").write_bytes(png((a[..., :3] >> 8).astype(np.uint8))), 6)
    resnetlab.train(rgb, out=tmp_path / "first", **{**SETTINGS, "steps": 1})
    said: list[str] = []
    values = {
        **SETTINGS,
        "steps": 1,
        "lr": 1e-30,
        "warmup_lr": 1e-30,
        "weight_decay": 0.0,
        "start_from": str(tmp_path / "first"),
    }
    del values["net"]
    resnetlab.train("finetune", data=folder, out=tmp_path / "second", report=said.append, **values)
    assert any("the kernels of its first convolution are repeated in turn, times 3/5" in sentence for sentence in said)
    old, new = (resnetlab.load(tmp_path / name).resnet.conv1.weight for name in ("first", "second"))
    assert torch.allclose(new, old[:, [0, 1, 2, 0, 1]] * 0.6)
    own, expected = (resnetlab.load(each).preprocessing for each in (tmp_path / "second", run[0]))
    assert torch.equal(own.mean, expected.mean) and torch.equal(own.std, expected.std)  # not the start's


def test_arrays_and_data_sets_in_memory(tmp_path: Path) -> None:
    x, y = random_array((24, 22, 26, 5), "uint16"), [0, 1] * 12
    said: list[str] = []
    resnetlab.train((x, y), out=tmp_path / "arrays", report=said.append, **{**SETTINGS, "steps": 1, "eval_resize": 16})
    assert said[0].startswith("images of 5 channels of 16 bits")
    model = resnetlab.load(tmp_path / "arrays")
    assert model.evaluate((x, y), split="train").n
    first = dataset_from_object((np.moveaxis(x, -1, 1), y)).train
    assert torch.equal(first.read_image(0), dataset_from_object((x, y)).train.read_image(0))
    items = dataset_from_object(list(zip(x, y, strict=True))).train  # a data set's items, one by one
    assert items.pixel_format == PixelFormat(5, "uint16")
    assert any(np.array_equal(items.read_image(0).numpy(), image) for image in x)
    grey = dataset_from_object((random_array((24, 22, 26), "uint16"), y)).train
    assert grey.pixel_format == PixelFormat(1, "uint16")
    with pytest.raises(
        DataError, match="the images have 1 channel of 16 bits, where 5 channels of 16 bits are expected"
    ):
        model.evaluate((random_array((24, 22, 26), "uint16"), y))


def test_images_are_shown_by_their_first_three_channels() -> None:
    array = random_array((20, 24, 5), "float32")
    shown = np.asarray(render_pixels(torch.from_numpy(array))).astype(float)
    low, high = np.quantile(array[..., :3].astype(np.float64), [0.01, 0.99], axis=(0, 1))
    assert np.abs(shown - 255 * ((array[..., :3] - low) / (high - low)).clip(0, 1)).max() <= 0.51
    assert render_pixels(torch.from_numpy(array[..., :2])).mode == "L"
    colours = random_array((20, 24, 3), "uint8")
    assert np.array_equal(np.asarray(render_pixels(torch.from_numpy(colours))), colours)


def test_runs_begun_before_go_on_with_8_bits(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b", "a", "b", "a", "b", "a", "b", "a", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.png").write_bytes(png(random_array((20, 24), "uint16", seed=i)))
    recipe = replace(photos(), data=str(tmp_path))
    for resuming, channels, expected in ((True, 0, RGB), (False, 0, PixelFormat(1, "uint16")), (True, 3, RGB)):
        setup = TaskSetup(select_device("fp32", "cpu"), RunOptions(data_dir=tmp_path), resuming=resuming)
        found, source = load_source(replace(recipe, channels=channels), setup)
        assert source.train.pixel_format == source.test.pixel_format == expected
        assert found.channels == (1 if expected.dtype else channels)
        assert source.train.read_image(0).dtype == (torch.float32 if expected.dtype else torch.uint8)
