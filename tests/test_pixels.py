"""What training reads of a photograph by compiled code: the part of a JPEG that a crop shows, resized and normalised."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from images import folder, photo
from resnetlab import compiled, pixels
from resnetlab.compiled import CompiledLibrary
from resnetlab.data import disk_split, jpeg_region
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop, resize_crop
from resnetlab.data.decode import decode_pixels
from resnetlab.data.jpeg_region import cut_out, decode_region, load_region_decoder
from resnetlab.data.sampler import TrainLoader
from resnetlab.data.sources import load_dataset
from resnetlab.device import select_device
from resnetlab.pixels import load_pixel_kernels, normalise_bytes, resize_bytes
from resnetlab.preprocessing import INTERPOLATIONS, Preprocessing, tensor_to_pil

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
needs_libjpeg = pytest.mark.skipif(load_region_decoder().library is None, reason="libjpeg-turbo's header is not here")
needs_avx512 = pytest.mark.skipif(load_pixel_kernels().library is None, reason="no AVX-512 for bytes (VBMI)")
PREPROCESSING = Preprocessing(3, (24, 24), 26, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]))
MISSING = CompiledLibrary(None, "", "the test says so")


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)  # type: ignore[arg-type]
    return file.getvalue()


@needs_libjpeg
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_part_of_a_jpeg_has_the_pixels_of_the_whole(data: st.DataObject) -> None:
    size = (data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150)))
    options = data.draw(st.sampled_from([{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}]))
    sampling, quality = data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "4:1:1"])), data.draw(st.integers(5, 98))
    image = (
        Image.fromarray(random_pixels(*size, 3, seed=quality).numpy()) if quality % 2 else photo(quality, *size[::-1])
    )
    content = encode(image, subsampling=sampling, quality=quality, **options)
    h, w = data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1]))
    box = data.draw(st.integers(0, size[0] - h)), data.draw(st.integers(0, size[1] - w)), h, w
    seen: list[tuple[int, int]] = []

    def choose(height: int, width: int) -> tuple[int, int, int, int]:
        seen.append((height, width))
        return box

    part = decode_region(content, choose)
    assert part is not None and seen == [size]
    assert torch.equal(part, cut_out(decode_pixels(content, "it"), lambda *_: box))


@needs_libjpeg
def test_only_what_can_be_read_alike_is_read_in_part() -> None:
    image, exif = photo(1), Image.Exif()
    exif[0x0112] = 6
    content = encode(image, quality=95)
    whole = decode_pixels(content, "it")
    others = (
        encode(image.convert("L")),
        encode(image.convert("CMYK")),
        encode(image, exif=exif.tobytes()),
        content[:-200],
    )
    assert all(
        decode_region(other, lambda *_: (0, 0, 5, 5)) is None for other in (*others, b"", b"\xff\xd8\xff", b"\x89PNG")
    )
    assert all(
        decode_region(content, lambda *_, box=box: box) is None for box in [(-1, 0, 5, 5), (0, 58, 5, 5), (0, 0, 0, 5)]
    )
    start = content.index(b"\xff\xda") + 14
    damaged = content[:start] + b"\xff\x00" * 40 + content[start + 80 :]
    assert decode_region(damaged, lambda *_: (0, 0, 45, 60)) is None  # as libjpeg warns; Pillow's pixels are taken
    below = content[: -len(content) // 4] + b"\x00" * 40 + content[-len(content) // 4 + 40 :]
    part = decode_region(below, lambda *_: (0, 0, 8, 60))
    assert part is not None and torch.equal(part, whole[:8])


def batches(root: Path, kind: str) -> list[Tensor]:
    data = load_dataset(str(root), Path("data"))
    assert data.all_images is not None
    augmentation = Augmentation(flip=True, colour=True, crop=Crop(kind, (26, 40)))
    loader = TrainLoader(data.all_images, PREPROCESSING, augmentation, 12, 3, select_device("fp32", "cpu"))
    return [loader.batch(step).images for step in range(4)]


@pytest.mark.parametrize("kind", ["centre", "scale", "resized"])
def test_training_sees_the_same_bits_without_the_compiled_code(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "photos", {"": 8})
    photo(80).save(root / "alpha" / "another.png")
    photo(81).convert("L").save(root / "alpha" / "grey.jpg")
    compiled_here = batches(root, kind)
    monkeypatch.setattr(jpeg_region, "load_region_decoder", lambda: MISSING)
    monkeypatch.setattr(pixels, "load_pixel_kernels", lambda: MISSING)
    without = batches(root, kind)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(compiled_here, without, strict=True))
    assert not torch.equal(without[0], without[1])


@needs_libjpeg
def test_training_decodes_only_what_its_crop_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a whole image was decoded")

    monkeypatch.setattr(disk_split, "decode_as", refuse)
    assert len(batches(folder(tmp_path / "photos", {"": 8}), "resized")) == 4


@needs_avx512
@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    size=st.integers(1, 300),
    seed=st.integers(0, 9),
    inside=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_resized_crop_has_torchs_bits(height: int, width: int, size: int, seed: int, inside: bool) -> None:
    image = random_pixels(height + 3, width + 2, 3, seed=seed)
    crop = image[2 : 2 + height, 1 : 1 + width] if inside else image[:height, :width].contiguous()
    x = crop[None].permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)[0]
    assert torch.equal(resize_crop(crop, size), theirs if (height, width) != (size, size) else crop)


@needs_avx512
@given(
    height=st.integers(1, 400), width=st.integers(1, 400), resize=st.integers(1, 300), crop=st.integers(1, 300),
    interpolation=st.sampled_from(list(INTERPOLATIONS)), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_a_resized_image_has_pillows_bits(
    height: int, width: int, resize: int, crop: int, interpolation: str, seed: int
) -> None:
    image = random_pixels(height, width, 3, seed=seed)
    image = torch.where(image > 127, 255, 0).to(torch.uint8) if seed % 2 else image
    preprocessing = replace(PREPROCESSING, size=(crop, max(1, crop - 3)), resize=resize, interpolation=interpolation)
    with mock.patch.object(pixels, "load_pixel_kernels", return_value=MISSING):
        by_pillow, whole = preprocessing(tensor_to_pil(image)), preprocessing.resize_bytes(image, resize)
    assert torch.equal(preprocessing(image), by_pillow) and torch.equal(preprocessing(tensor_to_pil(image)), by_pillow)
    assert torch.equal(preprocessing.resize_bytes(image, resize), whole)


@needs_avx512
@pytest.mark.parametrize("method", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("before", "after"), [((375, 500), (256, 341)), ((500, 375), (341, 256)), ((32, 32), (70, 90))]
)
def test_usual_photographs_are_resized_here(method: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    image = random_pixels(*before, 3)
    part = resize_bytes(method, image, after, (5, 7, 20, 30))
    whole = tensor_to_pil(image).resize(after[::-1], INTERPOLATIONS[method])
    assert part is not None and torch.equal(part, torch.from_numpy(np.array(whole))[5:25, 7:37])


@needs_avx512
@given(width=st.integers(1, 70), height=st.integers(1, 5), images=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_normalised_and_mirrored_pixels_have_torchs_bits(width: int, height: int, images: int, seed: int) -> None:
    x = random_pixels(images, height, width, 3, seed=seed)
    flips = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5
    scale, shift = 1 / (255 * PREPROCESSING.std), PREPROCESSING.mean / PREPROCESSING.std
    ours = normalise_bytes(x, scale, shift, flips)
    theirs = PREPROCESSING.normalise(torch.where(flips[:, None, None, None], x.flip(2), x))
    assert ours is not None and torch.equal(ours, theirs) and ours.is_contiguous(memory_format=torch.channels_last)


def test_code_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly = pixels._resize_slowly
    for wrong, name in (("torch", "torch"), ("bilinear", "Pillow"), ("bicubic", "Pillow")):
        monkeypatch.setattr(pixels, "_resize_slowly", lambda m, x, size, wrong=wrong: slowly(m, x, size) + (m == wrong))
        other = load_pixel_kernels.__wrapped__()
        assert other.library is None
        assert other.reason.startswith((f"{name} resizes in another way", "this processor has no"))
    monkeypatch.setattr(jpeg_region, "_gives_the_same", lambda function, subsampling: subsampling < 2)
    assert load_region_decoder.__wrapped__().library is None


def test_the_header_is_looked_for_in_a_conda_environment_and_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command)
        raise compiled.subprocess.CalledProcessError(
            1, command, stderr="x.cpp:9:10: fatal error: jpeglib.h: No such file"
        )

    monkeypatch.setattr(compiled, "_compile", lambda folder, key, command: run(command))
    monkeypatch.setattr(compiled, "_find", lambda folder, key: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    reason = str(load_region_decoder.__wrapped__())
    assert reason.endswith("libjpeg-turbo's header is missing (on Debian and Ubuntu: apt install libjpeg-dev)")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "jpeglib.h").touch()
    load_region_decoder.__wrapped__()
    assert commands[0][-1] == "-ljpeg" and f"-I{tmp_path / 'include'}" not in commands[0]
    assert commands[1][-4:] == [
        f"-I{tmp_path / 'include'}",
        f"-L{tmp_path / 'lib'}",
        f"-Wl,-rpath,{tmp_path / 'lib'}",
        "-ljpeg",
    ]


def test_a_library_that_cannot_be_loaded_any_more_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load, failures = compiled.ctypes.CDLL, [OSError("libjpeg.so.62: cannot open shared object file")]
    assert compiled.load_library("one", [tmp_path / "one.cpp"]).library.one() == 1  # type: ignore[union-attr]

    def fail_once(name: str) -> object:
        if failures:
            raise failures.pop()
        return load(name)

    monkeypatch.setattr(compiled.ctypes, "CDLL", fail_once)
    again = compiled.load_library("one", [tmp_path / "one.cpp"])
    assert not failures and again.library is not None and again.library.one() == 1
