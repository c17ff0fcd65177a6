"""Every kind of image becomes upright RGB, by either decoder; what cannot be read is named."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import resnetlab
from images import photo, png_bomb
from resnetlab.data import decode
from resnetlab.data.array_files import read_array
from resnetlab.data.check import check_file
from resnetlab.data.decode import decode_pixels
from resnetlab.errors import DataError
from resnetlab.models.model_file import TrainedModel
from resnetlab.preprocessing import MAX_RESIZED_PIXELS, Preprocessing

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flowers"


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    assert decode.jpeg_decoder() == request.param
    return str(request.param)


def pixels(content: bytes) -> np.ndarray:
    array = decode_pixels(content, "x").numpy()
    assert array.dtype == np.uint8 and array.shape[2] == 3
    return array


def near(a: np.ndarray, b: Image.Image, levels: float = 4) -> bool:
    expected = np.asarray(b.convert("RGB")).astype(int)
    return a.shape == expected.shape and float(np.abs(a - expected).mean()) < levels


@pytest.mark.usefixtures("decoder")
def test_every_mode_becomes_rgb() -> None:
    image = photo(1)
    grey = image.convert("L")
    assert near(pixels(encoded(grey, "JPEG", quality=95)), grey)
    assert near(pixels(encoded(grey, "PNG")), grey, 0.01)
    assert near(pixels(encoded(image, "JPEG", quality=95)), image)
    assert near(pixels(encoded(image.convert("CMYK"), "JPEG", quality=95)), image)
    assert near(pixels(encoded(image.convert("P"), "PNG")), image.convert("P"), 0.01)
    assert near(pixels(encoded(image.convert("YCbCr"), "TIFF")), image)
    one = grey.convert("1")
    assert near(pixels(encoded(one, "PNG")), one, 0.01)


@pytest.mark.usefixtures("decoder")
def test_transparency_is_composited_on_white() -> None:
    image = photo(2, 8, 8)
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (0, 0, 4, 8))
    image.putalpha(alpha)
    result = pixels(encoded(image, "PNG"))
    assert (result[:, :4] == 255).all() and np.array_equal(result[:, 4:], np.asarray(image)[:, 4:, :3])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.usefixtures("decoder")
def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(values), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.usefixtures("decoder")
def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), (250, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 250))
    for format in ("GIF", "WEBP"):
        result = pixels(encoded(first, format, save_all=True, append_images=[second]))
        assert result[0, 0, 0] > 230 and result[0, 0, 2] < 20


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_upright(orientation: int) -> None:
    upright = photo(3, 40, 24)
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Pillow's numbers of the transposition that the orientation undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert near(pixels(encoded(stored, "JPEG", quality=95, exif=exif)), upright)


def test_both_decoders_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    contents = [
        encoded(photo(i, 61, 47), "JPEG", quality=80, subsampling=i % 3, progressive=i % 2 == 0) for i in range(6)
    ]
    contents += [file.read_bytes() for file in sorted(FLOWERS.rglob("*.jpg"))[::8]]
    fast = [decode_pixels(content, "x") for content in contents]
    monkeypatch.setattr(decode, "simplejpeg", None)
    for a, content in zip(fast, contents, strict=True):
        assert np.array_equal(a.numpy(), decode_pixels(content, "x").numpy())


def jpeg_bomb() -> bytes:
    content = encoded(photo(1), "JPEG")
    start = content.index(b"\xff\xc0") + 5
    return content[:start] + struct.pack(">HH", 20_000, 20_000) + content[start + 4 :]


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (encoded(photo(1), "JPEG")[:-300], "a b.jpg is damaged: image file is truncated"),
        (encoded(photo(1), "PNG")[:-900], "a b.jpg is damaged: "),
        (png_bomb(), "a b.jpg claims more than 178,956,970 pixels; make it smaller"),
        (jpeg_bomb(), "a b.jpg claims more than 178,956,970 pixels; make it smaller"),
        (b"", "a b.jpg is not an image that can be read"),
        (b"\xff\xd8\xff", "a b.jpg is not an image that can be read"),
        (b"hello", "a b.jpg is not an image that can be read: it is a text"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML>", "it is a web page, which a download may give in place of an image"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a pointer of Git LFS: `git lfs pull` fetches the image"),
        (b"PK\x03\x04\x14", "it is a zip archive"),
    ],
    ids=["truncated jpeg", "truncated png", "bomb", "jpeg bomb", "empty", "three bytes", "text", "page", "lfs", "zip"],
)
def test_what_cannot_be_read_is_named(content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        decode_pixels(content, "a b.jpg")


@pytest.mark.usefixtures("decoder")
def test_one_pixel_is_an_image() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


class Awkward(Exception):
    """An error type that nobody expects."""


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "error", [struct.error("x"), TypeError("x"), NotImplementedError(), SyntaxError("x"), Awkward(), MemoryError()]
)
def test_whatever_pillow_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    content = encoded(photo(1), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(DataError, match=rf"^a b.png is damaged: ({error}|{type(error).__name__})$"):
        decode_pixels(content, "a b.png")


FORMATS = {"JPEG": {}, "PNG": {}, "GIF": {}, "WEBP": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {}}


@pytest.mark.parametrize("format", FORMATS)
def test_scrambled_files_are_read_or_named(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    content = encoded(photo(4, 30, 20), format, **FORMATS[format])
    rng = np.random.default_rng(5)
    for _ in range(150):
        scrambled = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            scrambled[place] = rng.integers(256)
        with contextlib.suppress(DataError):  # and nothing else
            assert decode_pixels(bytes(scrambled[: rng.integers(1, len(content) + 1)]), "x").shape[2] == 3


@pytest.mark.parametrize("width", [1, 400_000])
def test_a_very_narrow_image_takes_little_memory(width: int) -> None:
    values = np.arange(400_000, dtype=np.uint8)[None].repeat(3, 0).T[None]  # (1, 400000, 3)
    image = Image.fromarray(values if width > 1 else values.transpose(1, 0, 2).copy())
    assert image.width == width
    preprocessing = Preprocessing(3, (224, 224), 256, torch.zeros(3), torch.ones(3))
    resized, cropped = preprocessing.resize_image(image, 256), preprocessing(image)
    assert max(resized.size) == MAX_RESIZED_PIXELS // 256 and min(resized.size) == 256
    assert cropped.shape == (224, 224, 3)
    assert set(cropped.unique().tolist()) <= {63, 64}  # the crop is pixels 199,999 and 200,000, enlarged 256 times


def test_a_pillow_image_is_predicted_like_its_file(tmp_path: Path) -> None:
    net = resnetlab.build("resnet8", classes=3)
    preprocessing = Preprocessing(3, (32, 32), 32, torch.full((3,), 0.5), torch.full((3,), 0.2))
    TrainedModel(net, ("a", "b", "c"), preprocessing).save(tmp_path / "m.safetensors")
    model = resnetlab.load(tmp_path / "m.safetensors", device="cpu")
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = photo(2, 40, 30)
    alpha.putalpha(Image.linear_gradient("L").resize((40, 30)))
    deep = (np.asarray(photo(3, 40, 30).convert("L")).astype(np.uint16) * 256) + 7
    palette = photo(5, 40, 30).quantize(8)
    files = {
        "turned.jpg": encoded(photo(1, 40, 30), "JPEG", exif=turned),
        "alpha.png": encoded(alpha, "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "four.jpg": encoded(photo(4, 40, 30).convert("CMYK"), "JPEG"),
        "palette.png": encoded(palette, "PNG", transparency=0),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with Image.open(io.BytesIO(content)) as image:
            assert model.predict(image).top == model.predict(tmp_path / name).top, name
            raw = preprocessing(image)
        assert not torch.equal(raw, preprocessing(decode.decode(tmp_path / name))) or name == "four.jpg", name
    with pytest.raises(DataError, match="the image is damaged: image file is truncated"):
        model.predict(Image.open(io.BytesIO(files["turned.jpg"][:-200])))


def segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    """The JPEG with one more segment, in front of all others."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


XMP = (
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-"
    b"syntax-ns#'><rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation=\"6\"/></rdf:RDF></x:xmpmeta>"
)


@pytest.mark.usefixtures("decoder")
def test_a_rotation_is_found_in_any_segment() -> None:
    image, exif = photo(3, 60, 40), Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_270)
    plain = encoded(image, "JPEG", quality=95)
    far = encoded(image, "JPEG", quality=95, exif=exif)
    for number in (2, 1):
        far = segment(far, 0xE2, b"ICC_PROFILE\0" + bytes([number, 2]) + bytes(60_000))
    for content in (segment(plain, 0xE1, XMP), far, segment(far, 0xFE, b"a comment")):
        assert near(pixels(content), turned)
    assert near(pixels(segment(plain, 0xE2, bytes(60_000))), image)


@pytest.mark.usefixtures("decoder")
def test_a_transparent_colour_is_composited_on_white() -> None:
    left = np.zeros((4, 6, 3), np.uint8)
    left[:, 3:] = 200
    for content in (
        encoded(Image.fromarray(left), "PNG", transparency=(0, 0, 0)),
        encoded(Image.fromarray(left[..., 0]), "PNG", transparency=0),
        encoded(Image.fromarray(left[..., 0].astype(np.uint16) * 256), "PNG", transparency=0),
    ):
        result = pixels(content)
        assert (result[:, :3] == 255).all() and (result[:, 3:] == 200).all()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "values", [np.full((4, 6), 200, np.int32), np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)]
)
def test_values_without_a_known_white_are_refused(values: np.ndarray) -> None:
    with pytest.raises(
        DataError, match=r"^x has 32 bits per value and does not define which value is white; save it with 8"
    ):
        pixels(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.usefixtures("decoder")
def test_16_bits_in_a_pgm_are_scaled() -> None:
    assert pixels(b"P5 2 1 65535\n" + struct.pack(">2H", 256, 65535))[0, :, 0].tolist() == [1, 255]


def png_with(chunk: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk in front of its pixels."""
    whole = encoded(photo(1), "PNG")
    added = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return whole[:33] + added + whole[33:]


LARGE = zlib.compress(b"x" * 3_000_000)
METADATA = {
    "a large profile": png_with(b"iCCP", b"icc\0\0" + LARGE),
    "a large text": png_with(b"zTXt", b"parameters\0\0" + LARGE),
    "large XMP": png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "broken EXIF": png_with(b"eXIf", b"no tiff header at all"),
    "broken EXIF in WebP": encoded(photo(1), "WEBP", lossless=True, exif=b"no tiff header at all"),
}


def test_sizes_of_pngs_are_found_without_decoding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Image.Exif()
    turned[274] = 6
    xmp = png_with(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')
    for content in (encoded(photo(1), "PNG", exif=turned), xmp):
        (tmp_path / "x.png").write_bytes(content)
        assert decode.read_header(tmp_path / "x.png")[0] == photo(1).size == decode.decode(content).size[::-1]
    (tmp_path / "x.png").write_bytes(encoded(photo(1), "PNG"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert decode.read_header(tmp_path / "x.png") == (photo(1).size[::-1], False)


@pytest.mark.parametrize("content", METADATA.values(), ids=METADATA)
def test_metadata_beside_whole_pixels_do_not_matter(content: bytes, tmp_path: Path) -> None:
    assert np.array_equal(pixels(content), np.asarray(photo(1)))
    (tmp_path / "x").write_bytes(content)
    assert decode.read_header(tmp_path / "x")[0] == photo(1).size[::-1]
    info = check_file(content, "x")
    assert info.size == photo(1).size and any("EXIF cannot be read" in words for words in info.suspicious) == (
        b"no tiff header" in content
    )


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1, **more: int) -> bytes:
    """A grey TIFF of one strip: 12 bits are packed, 16 are words; `more`: tag number -> value."""
    data = values.astype("<u2").tobytes()
    if bits == 12:
        one, two = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
        packed = np.stack([one >> 4, ((one & 15) << 4) | (two >> 8), two & 255], 1)
        data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), *((int(tag[1:]), value) for tag, value in more.items())]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 3 if value < 2**16 else 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_grey_tiffs_are_scaled_by_the_depth_that_they_declare() -> None:
    values = np.array([[0, 16, 2048, 4095]])
    expected = [0, 1, 128, 255]
    assert pixels(grey_tiff(values, 12))[0, :, 0].tolist() == expected
    assert pixels(grey_tiff(values * 16 + 15, 16))[0, :, 0].tolist() == expected
    assert pixels(grey_tiff(values, 16, t281=4095))[0, :, 0].tolist() == expected  # 12 bits in words of 16
    assert pixels(grey_tiff(65535 - values * 16, 16, photometric=0))[0, :, 0].tolist() == expected  # 0 is white
    with pytest.raises(DataError, match=r"^x has signed values of 16 bits and does not define which value is white"):
        pixels(grey_tiff(values, 16, t339=2))


def test_values_of_12_bits_as_stored_are_of_the_scale_of_16() -> None:
    """A folder of 12-bit TIFFs beside 16-bit ones showed the former nearly black."""
    values = np.array([[0, 16, 2048, 4095]])
    assert read_array(grey_tiff(values, 12))[0, :, 0].tolist() == [0, 256, 32768, 65520]
    assert read_array(grey_tiff(4095 - values, 12, photometric=0))[0, :, 0].tolist() == [0, 256, 32768, 65520]
    assert read_array(grey_tiff(values, 16))[0, :, 0].tolist() == values[0].tolist()


def heic_header() -> bytes:
    return b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)


def test_heic_is_named_with_the_extra_that_reads_it_and_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_1.HEIC").write_bytes(heic_header())
    (found,) = decode.list_images(tmp_path)
    assert found == tmp_path / "IMG_1.HEIC"
    for source in (found, found.read_bytes()):
        with pytest.raises(DataError, match=r"is a HEIC image; to read it, install: .*\[heic\]"):
            decode.decode(source)


def test_heic_is_read_with_the_extra(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "a.heic")
    assert decode.decode(tmp_path / "a.heic").size == (32, 32)


def test_images_of_108_megapixels_are_taken(tmp_path: Path) -> None:
    Image.new("1", (12_000, 9_000)).save(tmp_path / "phone.png")
    assert decode.decode(tmp_path / "phone.png").size == (12_000, 9_000)
