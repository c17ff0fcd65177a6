"""Digits, CIFAR-10, the hold-out, the order of images and augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from operation_counts import ElementCount
from resnetlab.data import cifar, dataset, digits, sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.sampler import Sampler, TrainLoader, step_indices
from resnetlab.device import select_device
from resnetlab.errors import DataError, UsageError
from resnetlab.preprocessing import Preprocessing, pixel_statistics
from resnetlab.random import KeyedPermutation, StepDraws, keyed_epoch, seed_for


def test_digits_split_is_fixed_and_stratified() -> None:
    data = digits.load_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    assert data.train.images.shape == (1437, 8, 8, 1) and data.train.images.dtype == torch.uint8
    everything = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    shares = torch.bincount(data.test.labels) / everything
    assert (shares - 360 / 1797).abs().max() < 1 / everything.min()
    assert data.fingerprint == digits.load_digits().fingerprint == "0e12daac1825a1dc"


def test_digits_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    bunch, data = sklearn.load_digits(), digits.load_digits()
    expected = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[..., None]
    train, test = dataset.split_stratified(torch.from_numpy(bunch.target).long(), digits.TEST)
    assert torch.equal(data.train.images, expected[train]) and torch.equal(data.test.images, expected[test])
    assert data.test.labels.tolist() == bunch.target[test.numpy()].tolist()
    assert data.classes == tuple(map(str, bunch.target_names))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_hold_out_is_a_partition_in_proportion(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    n = len(labels)
    count = max(1, min(n - 1, round(share * n)))
    if n < 2:
        return
    rest, chosen = dataset.split_stratified(labels, count, seed)
    assert len(chosen) == count
    assert torch.equal(torch.cat([rest, chosen]).sort().values, torch.arange(n))
    taken = torch.bincount(labels[chosen], minlength=len(sizes))
    assert all(abs(int(t) - size * count / n) <= 1 for t, size in zip(taken, sizes, strict=True))


def test_hold_out_of_many_images_and_classes_is_the_same_and_fast() -> None:
    labels = torch.randint(2000, (100_000,), generator=torch.Generator().manual_seed(1))
    with ElementCount() as counted:
        rest, chosen = dataset.split_stratified(labels, 30_000)
    assert counted.elements < 20 * len(labels)  # not one pass over all images for each class
    order = sorted(range(len(labels)), key=lambda i: seed_for(0, "stratified", i))
    taken = torch.bincount(labels[chosen], minlength=2000)
    left, expected = taken.tolist(), []
    for i in order:  # of every class its first images in the order of their seeds
        if left[int(labels[i])]:
            left[int(labels[i])] -= 1
            expected.append(i)
    assert chosen.tolist() == sorted(expected) and len(chosen) == 30_000 and len(rest) == 70_000


def test_hold_out_of_everything_is_refused() -> None:
    with pytest.raises(DataError, match="cannot hold out 10 of 10 images; hold out at least 1 and fewer than all"):
        dataset.split_stratified(torch.zeros(10, dtype=torch.long), 10)


@given(n=st.integers(1, 50), batch=st.integers(1, 60), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_step_indices_cover_every_image_once_per_epoch(n: int, batch: int, seed: int) -> None:
    steps = -(-3 * n // batch)
    stream = torch.cat([step_indices(seed, n, batch, step) for step in range(steps)])
    for epoch in range(3):
        assert torch.equal(stream[epoch * n : (epoch + 1) * n].sort().values, torch.arange(n))
    assert torch.equal(step_indices(seed, n, batch, 2), step_indices(seed, n, batch, 2))


@given(n=st.integers(1, 5000), key=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_a_keyed_permutation_is_one(n: int, key: int) -> None:
    permutation = KeyedPermutation(n, key)
    values = permutation[0:n]
    assert torch.equal(values.sort().values, torch.arange(n))
    assert torch.equal(permutation[n // 3 : n // 2], values[n // 3 : n // 2])


def test_a_keyed_permutation_shuffles_well() -> None:
    n = 40_000
    orders = torch.stack([keyed_epoch(1, n, epoch)[0:n] for epoch in range(4)]).double()
    for a, b in ((orders[0], torch.arange(n).double()), (orders[0], orders[1]), (orders[2], orders[3])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.02  # 1 / sqrt(n) is 0.005
    assert abs(float(torch.corrcoef(torch.stack([orders[0, :-1], orders[0, 1:]]))[0, 1])) < 0.02  # neighbours
    parts = torch.stack([torch.bincount((part // 2000).long(), minlength=20) for part in orders[0].view(20, 2000)])
    chi_square = float(((parts - 100.0) ** 2 / 100).sum())  # of images from each 20th in each 20th of the epoch
    assert 250 < chi_square < 480  # 361 degrees of freedom: mean 361, deviation 27
    fixed = sum(int((keyed_epoch(seed, 100, 0)[0:100] == torch.arange(100)).sum()) for seed in range(200))
    assert 140 < fixed < 260  # one in each is expected of random ones
    first = torch.bincount(torch.cat([keyed_epoch(seed, 7, 0)[0:1] for seed in range(700)]), minlength=7)
    assert bool(((first > 60) & (first < 145)).all())


def test_a_keyed_order_of_a_billion_images_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, encrypt = [], KeyedPermutation._encrypt
    monkeypatch.setattr(KeyedPermutation, "_encrypt", lambda self, x: computed.append(len(x)) or encrypt(self, x))
    sampler = Sampler(10**9, 256, 3, range(64, 128), keyed=True)
    with ElementCount() as counted:
        indices = sampler.indices(10**6)
    assert sum(computed) < 4 * 64 and counted.elements < 4 * 64
    assert len(set(indices.tolist())) == 64 and int(indices.max()) > 5 * 10**8
    whole = Sampler(10**9, 256, 3, range(256), keyed=True)
    assert torch.equal(whole.indices(10**6)[64:128], indices)
    computed.clear()
    Sampler(10**9, 2**30, 3, range(64, 128), keyed=True).indices(5)  # a share of a step costs no more than itself
    assert sum(computed) < 4 * 64
    for share in (range(4), range(2, 7), range(9, 10)):  # of steps that span epochs of seven images
        assert torch.equal(Sampler(7, 10, 3, share).indices(2), step_indices(3, 7, 10, 2)[share.start : share.stop])
    assert not torch.equal(
        Sampler(1000, 64, 3, range(64)).indices(0), Sampler(1000, 64, 3, range(64), keyed=True).indices(0)
    )


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_for(0, "order", 3) == 228_291_028_133_782_092
    assert len({seed_for(s, name, i) for s in range(3) for name in ("a", "b") for i in range(100)}) == 600


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad_with", ["mean", "black"])
def test_augmentation_equals_cropping_one_image_at_a_time(pad_with: str, flip: bool) -> None:
    pixels = torch.randint(256, (64, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = pixel_statistics(pixels, per_pixel=True, divide=True)
    preprocessing = Preprocessing(3, (9, 7), 9, mean, std)
    out = Augmentation(2, pad_with, flip)(pixels, preprocessing, StepDraws(5, 3, len(pixels)))
    assert out.shape == (64, 3, 9, 7) and out.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for i in range(64):
        matches = [
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in ((False, True) if flip else (False,))
            if torch.allclose(out[i], _augment_one(pixels[i], preprocessing, pad_with, dy, dx, mirrored), atol=1e-5)
        ]
        assert matches, f"image {i} is no crop of itself"
        seen.add(matches[0])
    assert len(seen) > 20  # the draws differ between images
    assert not torch.equal(out, Augmentation(2, pad_with, flip)(pixels, preprocessing, StepDraws(5, 4, len(pixels))))
    assert torch.equal(out, Augmentation(2, pad_with, flip)(pixels, preprocessing, StepDraws(5, 3, len(pixels))))


def _augment_one(
    image: torch.Tensor, p: Preprocessing, pad_with: str, dy: int, dx: int, mirrored: bool
) -> torch.Tensor:
    """The same augmentation in numpy, for one image."""
    h, w = p.size
    x = image.numpy().astype(np.float64)
    mean, std = p.mean.numpy().astype(np.float64), p.std.numpy().astype(np.float64)
    if pad_with == "mean":
        x = (x / 255 - mean) / std
    x = np.pad(x, ((2, 2), (2, 2), (0, 0)))[dy : dy + h, dx : dx + w]
    if mirrored:
        x = x[:, ::-1]
    if pad_with == "black":
        x = (x / 255 - mean) / std
    return torch.from_numpy(x.copy()).permute(2, 0, 1).float()


def test_statistics_equal_a_float64_computation() -> None:
    images = torch.randint(256, (5000, 4, 3, 3), dtype=torch.uint8)
    x = images.double() / 255
    mean, std = pixel_statistics(images, per_pixel=False, divide=True)
    torch.testing.assert_close(mean.double(), x.mean((0, 1, 2)), rtol=0, atol=1e-7)
    torch.testing.assert_close(std.double(), x.std((0, 1, 2), unbiased=False), rtol=0, atol=1e-7)
    mean, std = pixel_statistics(images, per_pixel=True, divide=False)
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=0, atol=1e-7)
    assert torch.equal(std, torch.ones(3))


def test_a_batch_is_a_function_of_the_step() -> None:
    data = digits.load_digits()
    mean, std = pixel_statistics(data.train.images, False, True)
    preprocessing = Preprocessing(1, (8, 8), 8, mean, std)
    loader = TrainLoader(data.train, preprocessing, Augmentation(0), 32, 7, select_device("fp32", "cpu"))
    batch = loader.batch(40)
    indices = step_indices(7, 1437, 32, 40)
    assert torch.equal(batch.labels, data.train.labels[indices])
    assert torch.equal(batch.images, preprocessing.normalise(data.train.images[indices]))


def _write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int = 20) -> np.ndarray:
    """Small files of the binary version's form; the records."""
    records = np.random.default_rng(0).integers(0, 256, (6 * n, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    folder.mkdir()
    monkeypatch.setitem(cifar.RECORDS, "cifar10", (n, n))
    for i, name in enumerate((*cifar.VERSIONS["cifar10"][0].train, "test_batch.bin")):
        (folder / name).write_bytes(records[i * n : (i + 1) * n].tobytes())
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n")
    return records


def test_cifar_reads_every_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = _write_cifar(tmp_path / cifar.FOLDER, monkeypatch)
    for place in (tmp_path, tmp_path / cifar.FOLDER):
        data = cifar.load_cifar(place)
        assert data.train.images.shape == (100, 32, 32, 3) and data.train.images.dtype == torch.uint8
        assert data.classes[3] == "cat" and len(data.test) == 20
        record = records[57]
        assert int(data.train.labels[57]) == record[0]
        for channel in range(3):
            plane = record[1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
            assert np.array_equal(data.train.images[57, :, :, channel].numpy(), plane)


def test_real_cifar(cifar10_dir: Path) -> None:
    data = sources.load_dataset("cifar10", cifar10_dir)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    mean = data.train.images.double().mean((0, 1, 2)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), rtol=0, atol=5e-5)  # as published


def test_damaged_cifar_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"CIFAR-10 is not under .*: put the binary version's folder cifar-10-batches-bin"
    ):
        sources.load_dataset("cifar10", tmp_path)
    _write_cifar(tmp_path / cifar.FOLDER, monkeypatch)
    file = tmp_path / cifar.FOLDER / "data_batch_3.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3.bin has 61,459 bytes, not a whole number of 3,073-byte records"):
        sources.load_dataset("cifar10", tmp_path)
    file.write_bytes(whole[:-3073])
    with pytest.raises(
        DataError, match=r"data_batch_3.bin has 19 images, the published file 20: it ends early or is an"
    ):
        sources.load_dataset("cifar10", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"data_batch_3.bin cannot be read"):
        sources.load_dataset("cifar10", tmp_path)
    file.write_bytes(bytes([11]) + whole[1:])
    with pytest.raises(DataError, match=r"has the label 11, but batches.meta.txt names 10 classes"):
        sources.load_dataset("cifar10", tmp_path)
    file.write_bytes(whole)
    meta = tmp_path / cifar.FOLDER / "batches.meta.txt"
    meta.write_bytes(b"airplane\n\xff\xfe\x80\n")
    with pytest.raises(DataError, match=r"batches.meta.txt is damaged: it is not valid UTF-8; unpack"):
        sources.load_dataset("cifar10", tmp_path)
    meta.write_text("cat\ncat\n")
    with pytest.raises(DataError, match=r"batches.meta.txt names 2 classes, some twice or too few"):
        sources.load_dataset("cifar10", tmp_path)


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown data set 'digts'; did you mean 'digits'"):
        sources.load_dataset("digts", tmp_path)
    for empty in ("", " "):  # as from an unset variable; not the folder that one happens to stand in
        with pytest.raises(UsageError, match="the data set's name is empty; give a folder"):
            sources.load_dataset(sources.resolve_data_path(empty, tmp_path), tmp_path)
