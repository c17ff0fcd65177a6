"""Tar shards: packing, reading back in the folder's order from a disk or a server, and errors that name the fault."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import resnetlab
from http_server import FileServer
from images import folder
from operation_counts import ElementCount
from resnetlab.cli.main import run_command
from resnetlab.data import download, pack, shards, tar_index
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import Dataset, hold_out
from resnetlab.data.disk_split import DiskSplit, FileNames, ReadOptions
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import select_device
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.inference.images import expand_images
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.trackers import TRACKERS, TrackedRun
from shard_files import files, jpeg, load, packed, tar
from shard_files import members as shard_members

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flowers"


def batch(data: Dataset) -> torch.Tensor:
    shape = Preprocessing(3, (24, 24), 32, torch.zeros(3), torch.ones(3))
    own = TrainLoader(
        data.train, shape, Augmentation(flip=True, crop=Crop("scale", (26, 40))), 6, 3, select_device("fp32", "cpu")
    )
    try:
        return own.batch(7).images
    finally:
        own.close()


@pytest.mark.parametrize("splits", [None, {"": 12}, {"train": 5, "val": 2, "test": 3}])
@pytest.mark.parametrize("with_index", [True, False])
def test_the_same_images_in_the_same_order(tmp_path: Path, splits: dict[str, int] | None, with_index: bool) -> None:
    root, out = packed(tmp_path, splits)
    if not with_index:
        for file in out.glob("*.index.json"):
            file.unlink()
    ours, theirs = load(out), load(root)
    assert ours.fingerprint == theirs.fingerprint  # class names, labels, names, sizes, and their order
    assert (ours.classes, ours.evaluated_split, list(ours.splits)) == (
        theirs.classes,
        theirs.evaluated_split,
        list(theirs.splits),
    )
    for split in ours.splits:
        a, b = ours.splits[split], theirs.splits[split]
        assert list(a.names) == list(b.names)
        assert all(torch.equal(x, y) for x, y in ((a.read_image(i), b.read_image(i)) for i in range(len(a))))
    assert torch.equal(batch(ours), batch(theirs))
    assert torch.equal(batch(load(out, workers=2)), batch(theirs))


def test_another_seed_changes_only_the_order_in_the_shards(tmp_path: Path) -> None:
    root, out = packed(tmp_path)
    pack.pack_shards(load(root), tmp_path / "t", per_shard=5, seed=1)
    pack.pack_shards(load(root), tmp_path / "u", per_shard=5)
    assert load(out).fingerprint == load(tmp_path / "t").fingerprint
    for file in out.glob("*"):
        assert file.read_bytes() == (tmp_path / "u" / file.name).read_bytes()
        assert file.read_bytes() != (tmp_path / "t" / file.name).read_bytes()


def test_the_webdataset_format(tmp_path: Path) -> None:
    root, out = packed(tmp_path)
    assert sorted(f.name for f in out.glob("*.tar")) == [f"train-00000{i}.tar" for i in range(5)] + [
        f"val-00000{i}.tar" for i in range(2)]  # fmt: skip
    with tarfile.open(out / "train-000000.tar") as tar:
        members = tar.getmembers()
        key = members[0].name.split(".")[0]
        assert [m.name for m in members[:3]] == [f"{key}.jpg", f"{key}.cls", f"{key}.json"]
        about = json.loads(tar.extractfile(members[2]).read())  # type: ignore[union-attr]
        assert tar.extractfile(members[0]).read() == (root / about["name"]).read_bytes()  # type: ignore[union-attr]
        assert about["class"] in load(root).classes and len(members) == 15


def test_resizing(tmp_path: Path) -> None:
    _, out = packed(tmp_path, resize=42)
    sizes = [min(image.shape[:2]) for image in map(load(out).train.read_image, range(24))]
    assert max(sizes) == 42 and min(sizes) < 42
    with pytest.raises(RunError, match="is not empty; choose another folder for the shards"):
        pack.pack_shards(load(tmp_path / "my d"), out)
    with pytest.raises(UsageError, match="per_shard must be 1 or more"):
        pack.pack_shards(load(tmp_path / "my d"), tmp_path / "x", per_shard=0)
    with pytest.raises(DataError, match="digits is in memory"):
        pack.pack_shards(load("digits"), tmp_path / "y")


@pytest.mark.parametrize(
    ("num_shards", "per_shard", "num_classes"),
    [
        (20, 500, 5000),
        pytest.param(100, 10_000, 1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),  # as ImageNet
        pytest.param(600, 73, 21_841, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),  # as ImageNet-21k
    ],
)
def test_an_index_takes_little_memory(
    num_shards: int, per_shard: int, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And images are held out in a time in proportion to their number."""
    classes, length = [f"n{i:08d}" for i in range(num_classes)], num_shards * per_shard + 100
    for s in range(num_shards):
        keys = range(s * per_shard, (s + 1) * per_shard)
        samples = [[f"{k:08d}", f"n{k:08d}/n{k:08d}_{k}.JPEG", f"n{k % num_classes:08d}", k, 100] for k in keys]
        index = {"format": 1, "bytes": length, "classes": classes, "samples": samples, "shards": num_shards}
        (tmp_path / f"train-{s:06d}.index.json").write_text(json.dumps(index))
        with open(tmp_path / f"train-{s:06d}.tar", "wb") as file:
            file.truncate(length)
    gc.collect()
    tracemalloc.start()
    data = shards.load_shards(str(tmp_path), tmp_path, ReadOptions())
    names = data.train.names  # kept by a run; a list of them would be 90 bytes a name
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensors = sum(x.nbytes for split in data.splits.values() for x in (split.labels, split.indices))  # type: ignore[attr-defined]
    images, class_list = len(data.train) + len(data.test), sum(sys.getsizeof(name) + 8 for name in classes)
    first = int(data.train.indices[0])  # type: ignore[attr-defined]
    assert (images, names[0]) == (num_shards * per_shard, f"n{first:08d}/n{first:08d}_{first}.JPEG")
    assert names[:2] == list(names)[:2] and data.train.name_of(1) == names[1]
    # the class names of every shard would be 600 bytes an image
    assert (kept + tensors - class_list) / images <= 120
    assert num_shards == 100 or peak + tensors < 100e6
    # names are read many at once: each alone takes ten times as long
    monkeypatch.setattr(FileNames, "__getitem__", None)
    for by_name in (False, True):
        with ElementCount() as counted:
            rest, held_out = hold_out(data.train, images // 20, by_name=by_name)
        assert counted.elements < 20 * images
        assert (len(rest), len(held_out)) == (len(names) - images // 20, images // 20)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="other ways of starting run the script again")
def test_large_indices_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = packed(tmp_path, per_shard=3)
    (pids := tmp_path / "pids").mkdir()

    def read(tar: Path) -> tar_index.TarIndex:
        (pids / str(os.getpid())).touch()
        return tar_index.read_index(tar)

    monkeypatch.setattr(shards, "read_index", read)
    monkeypatch.setattr(shards, "count_cores", lambda: 2)
    alone = load(out)
    assert [file.name for file in pids.iterdir()] == [str(os.getpid())]
    (pids / str(os.getpid())).unlink()
    monkeypatch.setattr(shards, "READER_BYTES", 1)
    together = load(out)
    readers = {file.name for file in pids.iterdir()}
    assert len(readers) == 2 and str(os.getpid()) not in readers
    assert together.fingerprint == alone.fingerprint and together.train.names == alone.train.names
    assert (
        len({id(index.classes) for index in shards._share_classes(shards._read_indices(sorted(out.glob("*.tar"))))})
        == 1
    )
    next(out.glob("*.index.json")).write_text("{")
    with pytest.raises(
        DataError, match=r"^the index [^\n]* cannot be read \([^\n]*; remove it, or pack the shards again\.$"
    ):
        load(out)


def test_patterns() -> None:
    assert list(shards.expand_braces("a/{train,val}-{08..10}.tar")) == [
        f"a/{split}-{n}.tar" for split in ("train", "val") for n in ("08", "09", "10")]  # fmt: skip
    assert list(shards.expand_braces("one.tar")) == ["one.tar"]
    with pytest.raises(DataError, match="a range in braces must rise"):
        list(shards.expand_braces("x-{3..1}.tar"))
    with pytest.raises(DataError, match="braces inside braces"):
        list(shards.expand_braces("{train-{0..1},val-0}.tar"))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_server_gives_them_too(tmp_path: Path, with_index: bool) -> None:
    root, out = packed(tmp_path)
    served = {name: content for name, content in files(out).items() if with_index or name.endswith(".tar")}
    largest = max(map(len, served.values()))
    with FileServer(served, drop_after=largest * 2 // 3, ranges=True) as server:  # the largest take two attempts
        pattern = server.url + "train-{000000..000004}.tar"
        data = load(pattern, tmp_path / "data")
        assert (
            data.evaluated_split == "held-out" and len(data.all_images or ()) == 24
        )  # train alone: a fifth of it is held out
        assert any(wanted for _, wanted in server.requests), "nothing was dropped"
        asked = list(server.requests)
        load(pattern, tmp_path / "data")
        assert server.requests == asked  # fetched once
        both = load(server.url + "{train,val}-{000000..000001}.tar", tmp_path / "data")
        assert both.evaluated_split == "val" and len(both.train) == 10
    assert load(root).classes == data.classes


def test_a_server_that_always_drops_is_reported_with_the_url(tmp_path: Path) -> None:
    _, out = packed(tmp_path)
    with FileServer(
        {n: c for n, c in files(out).items() if n.endswith(".tar")}, drop_after=1000, ranges=False
    ) as server:
        with pytest.raises(DataError, match=rf"{server.url}train-000000.tar cannot be fetched: .* dropped after 1,000"):
            load(server.url + "train-000000.tar", tmp_path / "data")
        assert [name for name, _ in server.requests].count("train-000000.tar") == 3
        with pytest.raises(DataError, match=r"other-000000.tar cannot be fetched: the server says 404"):
            load(server.url + "other-000000.tar", tmp_path / "data")


def test_training_on_signed_shards_equals_training_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked: list[TrackedRun] = []
    monkeypatch.setitem(TRACKERS, "json", lambda run: tracked.append(run) or SimpleNamespace(
        run_id=None, write=lambda *_: None, close=lambda: None))  # fmt: skip
    root, out = packed(tmp_path, per_shard=100)
    here = tmp_path / "data"
    values: dict[str, Any] = {
        "net": "resnet8",
        "image_size": 16,
        "eval_resize": 20,
        "batch": 6,
        "steps": 3,
        "device": "cpu",
        "precision": "fp32",
    }
    a = resnetlab.train("photos", data=str(root), out=tmp_path / "a", **values)
    with FileServer({f"{name}?sig=secret": content for name, content in files(out).items()}) as server:
        url = server.url + "{train,val}-000000.tar"
        values |= {"data": f"{url}?sig=secret", "data_dir": here, "trackers": ("json",)}
        b = resnetlab.train("photos", out=tmp_path / "b", **values)
    one, two = resnetlab.load(a.model), resnetlab.load(b.model)
    assert all(
        torch.equal(x, y) for x, y in zip(one.net.state_dict().values(), two.net.state_dict().values(), strict=True)
    )
    evaluated = resnetlab.evaluate(a.model, f"{url}?sig=secret", data_dir=here, device="cpu")
    assert a.top1_error == b.top1_error and (evaluated.split, evaluated.data) == ("val", url)
    assert (
        two.recipe["data"] == url == tracked[0].config["data"]
    )  # published files have no signature; recipe.toml has it, to resume
    assert all(b"secret" not in Path(file).read_bytes() for file in (b.model, b.report))
    assert "sig=secret" in (tmp_path / "b" / "recipe.toml").read_text()


def test_shards_made_elsewhere(tmp_path: Path) -> None:
    members = {f"n/{i:03d}.{kind}": content for i in range(12)
               for kind, content in (("jpg", jpeg(i)), ("cls", str(i % 2).encode()), ("txt", b"a caption"))}  # fmt: skip
    path = tar(tmp_path / "s" / "shard-0.tar", members)
    data = load(path)
    assert data.classes == ("0", "1") and data.evaluated_split == "held-out" and len(data.train) == 10
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\n")
    assert load(path).classes == ("cat", "dog") and load(path).train.names[0].startswith("n/0")
    named = {
        f"{i}.{kind}": content
        for i in range(12)
        for kind, content in (("jpg", jpeg(i)), ("cls", b"dog" if i % 2 else b"cat"))
    }
    assert load(tar(tmp_path / "named" / "x.tar", named)).classes == ("cat", "dog")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("cut", [700, 3000, 512 * 20])
def test_a_tar_that_ends_early(tmp_path: Path, with_index: bool, cut: int) -> None:
    _, out = packed(tmp_path)
    shard = out / "train-000001.tar"
    content = shard.read_bytes()
    if with_index:
        shard.write_bytes(content[:-cut])
    else:
        tar_index.index_path(shard).unlink()
        shard.write_bytes(
            content[: len(content.rstrip(b"\0")) // 512 * 512 + 512 - cut // 700 * 512]
        )  # the last blocks and more
    with pytest.raises(DataError, match=r"train-000001.tar .*ends early"):
        load(out)


def test_faults_in_shards_are_named(tmp_path: Path) -> None:
    one = {
        f"{i}.{kind}": content for i in range(4) for kind, content in (("jpg", jpeg(i)), ("cls", str(i % 2).encode()))
    }
    tar(tmp_path / "s" / "a-0.tar", one)
    tar(tmp_path / "s" / "a-1.tar", {"3.jpg": jpeg(9), "3.cls": b"1"})
    with pytest.raises(DataError, match=r"two samples have the key 3, in .*a-0.tar and .*a-1.tar; pack them together"):
        load(tmp_path / "s")
    tar(tmp_path / "s" / "a-1.tar", {"9.jpg": jpeg(9), "9.cls": b"7"})
    (tmp_path / "s" / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"9.jpg in .*a-1.tar is of class 7, but there are 2 classes"):
        load(tmp_path / "s")
    tar(tmp_path / "s" / "a-1.tar", {"9.jpg": jpeg(9)})
    with pytest.raises(DataError, match=r"9 in .*a-1.tar has no class: there is neither 9.cls nor"):
        load(tmp_path / "s")
    tar(tmp_path / "s" / "a-1.tar", {"9.jpg": jpeg(9), "9.png": jpeg(9), "9.cls": b"1"})
    with pytest.raises(DataError, match=r"a-1.tar has two images of the key 9"):
        load(tmp_path / "s")
    (tmp_path / "s" / "a-1.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"a-1.tar ends early or is not a tar"):
        load(tmp_path / "s")
    with pytest.raises(DataError, match=r"gone-0.tar is not there; give the shards as a pattern"):
        load(tmp_path / "s" / "gone-{0..2}.tar")


def test_shards_of_different_class_lists(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", {"": 5}, ("cat", "dog")), folder(tmp_path / "b", {"": 5}, ("cat", "cow"))
    pack.pack_shards(load(a), tmp_path / "s")
    pack.pack_shards(load(b), tmp_path / "t")
    for file in (tmp_path / "t").iterdir():
        file.rename(tmp_path / "s" / file.name.replace("000000", "000001"))
    with pytest.raises(
        DataError, match="have different class lists: only in the first dog, only in the second cow; pack them"
    ):
        load(tmp_path / "s")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "d")
    assert run_command(["data", "pack", str(root), str(tmp_path / "s"), "--per-shard", "20"]) == 0
    assert f"3 shards in {tmp_path / 's'}" in capsys.readouterr().out
    assert run_command(["data", "check", str(tmp_path / "s"), "--no-timing", "--workers", "0"]) == 0
    Image.new("RGB", (40, 40), "red").save(root / "train" / "alpha" / "red.png")
    (root / "train" / "alpha" / "gone.jpg").symlink_to(root / "nowhere")
    assert run_command(["data", "pack", str(root), str(tmp_path / "t")]) == 1
    assert "gone.jpg is not there" in capsys.readouterr().err
    assert not list((tmp_path / "t").glob("*.tar"))
    assert run_command(["data", "pack", "--help"]) == 0
    assert "Example: resnetlab data pack photos shards" in " ".join(capsys.readouterr().out.split())


def photographs(data: Dataset, workers: int = 0) -> list[torch.Tensor]:
    assert isinstance(data.train, DiskSplit)
    split = replace(data.train, workers=workers)
    shape = Preprocessing(3, (64, 64), 64, torch.zeros(3), torch.ones(3))
    own = TrainLoader(split, shape, Augmentation(flip=True, crop=Crop("resized")), 16, 1, select_device("fp32", "cpu"))
    try:
        return [own.batch(step).images for step in (13, 14, 15)]  # the end of an epoch of 240, and the next
    finally:
        own.close()


def test_flowers_from_a_folder_from_shards_and_from_a_server(tmp_path: Path) -> None:
    if not FLOWERS.is_dir():
        pytest.skip("the flowers are not there: ../shared/data, beside the repository, is missing")
    theirs, out = load(FLOWERS), tmp_path / "shards"
    assert len(pack.pack_shards(theirs, out, per_shard=50)) == 7
    expected = photographs(theirs)
    ours = load(out)
    assert (ours.fingerprint, ours.classes, ours.evaluated_split) == (theirs.fingerprint, theirs.classes, "val")
    for split in ("train", "val"):
        a, b = ours.splits[split], theirs.splits[split]
        assert isinstance(a, DiskSplit) and isinstance(b, DiskSplit) and list(a.names) == list(b.names)
        assert torch.equal(a.labels, b.labels)
        for i in range(len(a)):  # the very bytes
            assert a.source.read(int(a.indices[i])) == b.source.read(int(b.indices[i]))
    assert all(map(torch.equal, photographs(ours), expected)) and all(map(torch.equal, photographs(ours, 4), expected))
    served = files(out)
    with FileServer(served, drop_after=max(map(len, served.values())) * 2 // 3) as server:
        names = ",".join(name.removesuffix(".tar") for name in sorted(served) if name.endswith(".tar"))
        fetched = load(server.url + "{" + names + "}.tar", tmp_path / "data")
        assert any(wanted for _, wanted in server.requests), "nothing was dropped"
    assert fetched.fingerprint == theirs.fingerprint and all(map(torch.equal, photographs(fetched), expected))
    with FileServer(served, drop_after=100_000, ranges=False) as server:
        pattern = server.url + "train-{000000..000004}.tar"
        with pytest.raises(
            DataError, match=rf"{server.url}train-000000.tar cannot be fetched: .* dropped after 100,000 of"
        ):
            load(pattern, tmp_path / "other")
        assert [name for name, _ in server.requests].count("train-000000.tar") == 1 + len(download.PAUSES)


def test_a_word_of_the_name_is_the_split(tmp_path: Path) -> None:
    for i, (train, val) in enumerate(
        (("imagenet1k-train-0000", "imagenet1k-validation-00"), ("im-train-00", "im_val.00"))
    ):
        tar(tmp_path / str(i) / f"{train}.tar", shard_members("ab", 4))
        tar(tmp_path / str(i) / f"{val}.tar", shard_members("ab", 2, 100))
        data = load(tmp_path / str(i))
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "val": 4}
    tar(tmp_path / "2" / "train-and-test-0.tar", shard_members())
    with pytest.raises(DataError, match="says train and test; rename it after its one split"):
        load(tmp_path / "2")


def test_what_macos_adds_to_a_tar_is_left_out(tmp_path: Path) -> None:
    added = [(f"._{name}", b"\0\5\x16\7") for name in shard_members("ab", 2)]
    file = tar(tmp_path / "train-0.tar", [*added, *shard_members("ab", 2).items()])
    assert {name: len(split) for name, split in load(file).splits.items()} == {"train": 2, "held-out": 2, "all": 4}
    photos = tar(tmp_path / "photos.tar", [("./a/._0.jpg", b"\0\5\x16\7"), ("./a/0.jpg", b"")])
    assert [name for name, _ in expand_images(photos)] == [f"{photos}/./a/0.jpg"]
