"""Every kind of picture becomes upright RGB, by either decoder; what cannot be read is named."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import photo
from PIL import Image

from residuum.data import decode
from residuum.data.decode import decode_pixels
from residuum.errors import DataError

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flowers"


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    assert decode.decoder() == request.param
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
    picture = photo(1)
    grey = picture.convert("L")
    assert near(pixels(encoded(grey, "JPEG", quality=95)), grey)
    assert near(pixels(encoded(grey, "PNG")), grey, 0.01)
    assert near(pixels(encoded(picture, "JPEG", quality=95)), picture)
    assert near(pixels(encoded(picture.convert("CMYK"), "JPEG", quality=95)), picture)
    assert near(pixels(encoded(picture.convert("P"), "PNG")), picture.convert("P"), 0.01)
    assert near(pixels(encoded(picture.convert("YCbCr"), "TIFF")), picture)
    one = grey.convert("1")
    assert near(pixels(encoded(one, "PNG")), one, 0.01)


@pytest.mark.usefixtures("decoder")
def test_transparency_is_laid_on_white() -> None:
    picture = photo(2, 8, 8)
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (0, 0, 4, 8))
    picture.putalpha(alpha)
    shown = pixels(encoded(picture, "PNG"))
    assert (shown[:, :4] == 255).all() and np.array_equal(shown[:, 4:], np.asarray(picture)[:, 4:, :3])
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
        shown = pixels(encoded(first, format, save_all=True, append_images=[second]))
        assert shown[0, 0, 0] > 230 and shown[0, 0, 2] < 20


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


def bomb() -> bytes:
    """A PNG whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


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
        (bomb(), "a b.jpg claims more than 89,478,485 pixels; make it smaller"),
        (jpeg_bomb(), "a b.jpg claims more than 89,478,485 pixels; make it smaller"),
        (b"", "a b.jpg is not a picture that can be read"),
        (b"\xff\xd8\xff", "a b.jpg is not a picture that can be read"),
        (b"hello", "a b.jpg is not a picture that can be read"),
    ],
    ids=["truncated jpeg", "truncated png", "bomb", "jpeg bomb", "empty", "three bytes", "text"],
)
def test_what_cannot_be_read_is_named(content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        decode_pixels(content, "a b.jpg")


@pytest.mark.usefixtures("decoder")
def test_one_pixel_is_a_picture() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]
