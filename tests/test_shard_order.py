"""sampling=shards: the order of images, and shards that are fetched when a machine needs them."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from process_groups import call_in_processes
from resnetlab.data import shard_order
from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.remote_shards import RemoteShards
from resnetlab.data.shard_order import BLOCK, ShardOrder, group_positions
from resnetlab.data.shards import ShardSource
from resnetlab.data.sources import load_dataset
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.training.train import RunOptions, build_task, start_run
from shard_files import load, packed
from tiny_runs import tiny


def make_order(sizes: list[int], groups: int, batch: int, seed: int = 0) -> ShardOrder:
    members = torch.split(torch.arange(sum(sizes)), sizes)
    return ShardOrder(tuple(members), tuple(range(len(sizes))), groups, seed, batch)


def test_every_image_occurs_once_an_epoch_and_few_shards_at_once() -> None:
    sizes = [5 + k % 4 for k in range(40)]
    order, shard_of = make_order(sizes, 2, 8), torch.repeat_interleave(torch.arange(40), torch.tensor(sizes))
    for group, positions in enumerate((range(4), range(4, 8))):
        images = torch.cat([order.indices(step, positions) for step in range(200)])
        first = list(itertools.islice(order.shards_from(0, positions), 20))
        assert len(set(first)) == 20
        count = sum(sizes[k] for k in first)
        assert sorted(images[:count].tolist()) == sorted(
            i for k in first for i in torch.nonzero(shard_of == k).flatten().tolist()
        )
        for start in range(0, 20, BLOCK):  # one block after the other, shuffled
            block = first[start : start + BLOCK]
            begin, end = (sum(sizes[k] for k in first[:n]) for n in (start, start + BLOCK))
            assert set(shard_of[images[begin:end]].tolist()) == set(block)
            assert images[begin:end].tolist() != images[begin:end].sort().values.tolist()
        assert group == 0 or not set(first) & set(itertools.islice(order.shards_from(0, range(4)), 20))
    both = torch.cat([order.indices(step, range(8)) for step in range(300)])
    assert max(Counter(both.tolist()).values()) - min(Counter(both.tolist()).values()) <= 2


def test_positions_by_group_take_four_bytes_each() -> None:
    groups = torch.tensor([3, 0, 3, 7, 0, 3])
    found = group_positions(groups)
    assert [x.tolist() for x in found] == [[1, 4], [0, 2, 5], [3]] and {x.dtype for x in found} == {torch.int32}
    order = ShardOrder(found, (0, 3, 7), 1, 0, 6)
    assert order.indices(0, range(6)).dtype == order.first_images(6).dtype == torch.int64


def test_the_processes_of_a_step_share_what_one_would_read() -> None:
    order = make_order([7] * 12, 4, 24)
    for step in (0, 5, 11, 40):
        whole = order.indices(step, range(24))
        for size in (1, 2, 3, 4, 6, 12):
            each = 24 // size
            parts = [order.indices(step, range(r * each, (r + 1) * each)) for r in range(size)]
            assert torch.equal(torch.cat(parts), whole)
            for r, part in enumerate(parts):  # what is needed next is what is read
                ahead = itertools.islice(order.shards_from(step, range(r * each, (r + 1) * each)), 4 * BLOCK)
                assert set((part // 7).tolist()) <= set(ahead)
    assert not torch.equal(make_order([7] * 12, 4, 24, seed=1).indices(0, range(24)), order.indices(0, range(24)))


def test_a_thread_that_looks_ahead_leaves_the_order_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fetching thread may find where epochs start while a step does; here it does so in the middle."""
    sizes = [5, 9, 14, 3, 20, 8, 2, 11]  # of shards: the epochs of a group differ in length
    expected = [make_order(sizes, 2, 8).indices(step, range(8)) for step in (100, 250)]
    order, shuffle, interrupted = make_order(sizes, 2, 8), shard_order._shuffle_shards, list[int]()

    def shuffle_while_another_looks(order: ShardOrder, epoch: int) -> list[int]:
        if not interrupted:
            interrupted.append(epoch)
            order.indices(200, range(8))
        return shuffle(order, epoch)

    monkeypatch.setattr(shard_order, "_shuffle_shards", shuffle_while_another_looks)
    found = [order.indices(step, range(8)) for step in (100, 250)]
    assert all(map(torch.equal, found, expected)) and interrupted


def test_epochs_and_neighbours_are_unrelated() -> None:
    """Within a block the order is random: no correlation with places, neighbours or the epoch before."""
    order = make_order([500] * 16, 1, 2000)
    for block in range(4):
        x = order.indices(block, range(2000)).double()
        y = order.indices(block + 4, range(2000)).double()
        for a, b in ((x % 500, torch.arange(2000.0)), (x[1:] % 500, x[:-1] % 500), (x, y)):
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A store in memory with 12 shards to train on and 2 to validate on, and the folder that they are from."""
    memory = fsspec.filesystem("memory")
    _, out = packed(tmp_path, {"train": 12, "val": 4}, per_shard=2)
    for file in out.iterdir():
        memory.pipe(f"/as-needed/{file.name}", file.read_bytes())
    yield memory, out
    memory.rm("/as-needed", recursive=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_fetches_what_it_reads_within_its_budget(
    store: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is that of the same shards in a folder."""
    _, out = store
    small = tiny(
        data=str(out), steps=6, batch=4, image_size=8, eval_resize=8, val_images=-1, sampling="shards", keep_images=2
    )
    shards = list(out.glob("train-*.tar"))
    space, most, fetched = 12 * max(file.stat().st_size for file in shards), 0, Counter[int]()
    fetch = RemoteShards.fetch

    def watch(self: RemoteShards, shard: int) -> None:
        nonlocal most
        if "train" in self.urls[shard]:
            fetched[shard] += not self.tars[shard].is_file()
        fetch(self, shard)
        most = max(most, sum(tar.stat().st_size for tar in self.tars if "train" in tar.name and tar.is_file()))

    monkeypatch.setattr(RemoteShards, "fetch", watch)
    monkeypatch.setattr("resnetlab.data.remote_shards.LOOK_PAUSE", 0)
    monkeypatch.setattr("resnetlab.training.tasks.classification_data.SAMPLE", 5)
    expected = start_run(small, tmp_path / "local", RunOptions(device="cpu"))
    options = RunOptions(device="cpu", data_dir=tmp_path / "data", shard_space=space)
    remote = replace(small, data="memory://as-needed/")
    found = start_run(remote, tmp_path / "remote", options)
    ours, theirs = load_file(found.model), load_file(expected.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert small.resolve_like(replace(small, shard_groups=2, val_images=0)).shard_groups == 2
    assert "shard_groups = 1" in (tmp_path / "remote" / "recipe.toml").read_text()
    assert set(fetched) and most <= space
    folder = next((tmp_path / "data" / "shards").iterdir())
    assert 0 < len(list(folder.glob("train-*.tar"))) <= 12 < len(shards)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_each_machine_fetches_the_shards_of_its_own_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of one process, with a disk each: no shard is fetched by both, and none exceeds its budget.

    Before the first step both look at images for the mean of all, which also stay within the budget.
    """
    memory = fsspec.filesystem("memory")
    _, out = packed(tmp_path, {"train": 12, "val": 2}, per_shard=1)
    for file in out.iterdir():
        memory.pipe(f"/machines/{file.name}", file.read_bytes())
    small = tiny(
        data="memory://machines/", steps=9, batch=4, image_size=8, eval_resize=8, sampling="shards", val_images=0
    )
    space, fetch = 12 * max(file.stat().st_size for file in out.glob("train-*.tar")), RemoteShards.fetch
    monkeypatch.setattr("resnetlab.data.remote_shards.LOOK_PAUSE", 0)

    def train(world: World) -> tuple[list[Any], set[int], set[int], int]:
        folder, fetched, most = tmp_path / f"machine {world.rank}", set[int](), 0

        def watch(remote: RemoteShards, shard: int) -> None:
            nonlocal most
            if "train" in remote.urls[shard] and not remote.tars[shard].is_file():
                fetched.add(shard)
            fetch(remote, shard)
            most = max(most, sum(file.stat().st_size for file in folder.rglob("train-*.tar")))

        monkeypatch.setattr(RemoteShards, "fetch", watch)
        task: Any = build_task(small, RunOptions(device="cpu", data_dir=folder, shard_space=space), world)
        before = set(fetched)
        fetched.clear()
        images = [task.micro_batches(step)[0].images.numpy().copy() for step in range(4)]
        task.loader.close()
        return images, before, fetched, most

    try:
        (first, *looked_at, most), (second, *also_looked_at, most_of_second) = call_in_processes(2, train, machines=2)
    finally:
        memory.rm("/machines", recursive=True)
    assert looked_at[0] == also_looked_at[0] and len(looked_at[0]) <= 2 * BLOCK + 1 < 36
    ours, theirs = looked_at[1], also_looked_at[1]
    assert ours and theirs and max(most, most_of_second) <= space
    alone: Any = build_task(replace(small, data=str(out), shard_groups=2), RunOptions(device="cpu"))
    order = alone.loader._sampler.shards
    for fetched, positions in ((ours, range(2)), (theirs, range(2, 4))):  # of 18 shards each
        assert fetched <= set(itertools.islice(order.shards_from(0, positions), 18))
    for step, parts in enumerate(zip(first, second, strict=True)):
        assert torch.equal(torch.cat(list(map(torch.from_numpy, parts))), alone.micro_batches(step)[0].images)


def test_what_sampling_shards_needs_is_said(store: tuple[Any, Path], tmp_path: Path) -> None:
    memory, _ = store
    options = RunOptions(device="cpu", data_dir=tmp_path / "data")
    run = tiny(
        data="memory://as-needed/", steps=2, batch=4, image_size=8, eval_resize=8, sampling="shards", val_images=0
    )
    for values, space, words in (
        ({"shard_groups": 3}, None, "shard_groups=3 must divide the batch of 4"),
        ({"val_images": 3}, None, "needs shards called train and val"),
        ({"sampling": "shuffle", "shard_groups": 2}, None, "shard_groups is for sampling=shards"),
        ({"data": "digits"}, None, "needs shards called train and val|is for tar shards"),
        ({}, 1000, "12 shards must fit on this machine's disk"),
        ({"sampling": "keyed"}, 1000, "--shard-space is for --set sampling=shards"),
    ):
        with pytest.raises(UsageError, match=words):
            start_run(replace(run, **values), tmp_path / "run", replace(options, shard_space=space))
    memory.rm("/as-needed/train-000001.index.json")
    with pytest.raises(DataError, match=r"train-000001\.tar has no index train-000001\.index\.json beside it"):
        start_run(run, tmp_path / "run", options)


def test_a_shard_of_another_packing_is_fetched_again(store: tuple[Any, Path], tmp_path: Path) -> None:
    memory, out = store
    options = ReadOptions(as_needed=True)
    data = load_dataset("memory://as-needed/", tmp_path, options)
    pixels = data.train.read_image(0)
    assert isinstance(data.train, DiskSplit) and isinstance(data.train.source, ShardSource)
    assert data.train.source.remote is not None and len(data.train.source.remote.present()) == 1
    memory.pipe("/as-needed/train-000000.tar", (out / "train-000000.tar").read_bytes())  # at another time
    again = load_dataset("memory://as-needed/", tmp_path, options)
    assert (
        torch.equal(again.train.read_image(0), pixels)
        and again.fingerprint == data.fingerprint == load(out).fingerprint
    )
