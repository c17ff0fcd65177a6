"""Order and augmentation are functions of (seed, step, position), whatever the source, workers, processes or start."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pictures import folder
from residuum.data import cifar, pack, sources
from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.dataset import Dataset, Pictures
from residuum.data.loader import Batch, Loader, order, share
from residuum.data.mixing import Mixing
from residuum.data.stored import Reading, Stored
from residuum.data.tars import index_of
from residuum.errors import UsageError
from residuum.preprocessing import Preprocessing
from residuum.runtime import pick_engine
from residuum.world import World
from server import Server
from test_cifar import write_binary

ENGINE = pick_engine("fp32", "cpu")
SIZE, STEPS = 7, 8  # pictures in a step (an odd number), steps: more than an epoch of every source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    root = tmp_path_factory.mktemp("data")
    folder(root / "folder", {"train": 8, "val": 1})
    pack.pack(sources.load(str(root / "folder"), root), root / "shards", per_shard=5)
    write_binary(root / cifar.FOLDER, "cifar10")
    names = {"digits": "digits", "cifar10": "cifar10", "folder": str(root / "folder"), "shards": str(root / "shards")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cifar.RECORDS, "cifar10", (4, 4))
        return {source: sources.load(name, root) for source, name in names.items()}


def shape(split: Pictures, side: int) -> Preprocessing:
    channels = split.pictures([0])[0].shape[-1]
    return Preprocessing(channels, (side, side), side, torch.full((channels,), 0.4), torch.full((channels,), 0.3))


def batches(split: Pictures, steps: range, workers: int, world: World, everything: bool) -> list[Batch]:
    if isinstance(split, Stored):
        split = replace(split, reading=Reading(workers=workers))
    preprocessing = shape(split, 24 if isinstance(split, Stored) else split.pictures([0])[0].shape[0])
    colour = everything and preprocessing.channels == 3
    augmentation = Augmentation(2, "mean", True, colour, trivial=everything, erasing=0.5 * everything)
    crop = Crop("scale", (26, 40)) if isinstance(split, Stored) else Crop()
    mixing = Mixing(0.5, 1.0) if everything else Mixing()
    loader = Loader(split, preprocessing, augmentation, SIZE, 3, ENGINE, crop, mixing, 10, world)
    try:
        return [loader.batch(step) for step in steps]
    finally:
        loader.close()


def together(parts: list[list[Batch]]) -> list[Batch]:
    """What all processes have, step by step."""
    return [Batch(*map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("everything", [False, True], ids=["paper", "modern"])
@pytest.mark.parametrize("source", ["digits", "cifar10", "folder", "shards"])
def test_the_same_for_any_number_of_workers_and_processes(
    data: dict[str, Dataset], source: str, everything: bool
) -> None:
    split = data[source].train
    whole = batches(split, range(STEPS), 0, World(), everything)
    shown = torch.cat([order(3, len(split), SIZE, step) for step in range(STEPS)])
    if not everything:  # mixing puts another class first now and then
        assert torch.equal(torch.cat([batch.labels for batch in whole]), split.labels[shown])
    for workers in (0, 1, 4) if isinstance(split, Stored) else (0,):
        for n in (1, 2, 3):
            if workers == 4 and n == 2:
                continue  # three of each are told apart by the others already, and processes take time to start
            parts = [batches(split, range(STEPS), workers, World(rank, n), everything) for rank in range(n)]
            assert same(together(parts), whole), (workers, n)
    for world in (World(), World(1, 2)):  # a resume in mid-epoch
        mine = share(SIZE, world)
        later = batches(split, range(5, STEPS), 2, world, everything)
        assert same(later, [Batch(*(x[mine.start : mine.stop] for x in batch)) for batch in whole[5:]])


def mine(url: str, data_dir: Path, rank: int, said: Connection) -> None:
    """What one of two processes fetches, and sees under any number of workers."""
    split = sources.load(url, data_dir).train
    said.send_bytes(
        pickle.dumps([batches(split, range(STEPS), workers, World(rank, 2), False) for workers in (0, 1, 4)])
    )


def test_two_processes_that_fetch_shards_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "folder", {"train": 8, "val": 1})
    theirs = sources.load(str(root), tmp_path)
    made = [file for tar in pack.pack(theirs, tmp_path / "s", per_shard=12) for file in (tar, index_of(tar))]
    server = Server({file.name: file.read_bytes() for file in made}, pause=0.3)
    url, fork = server.url + "{train-000000,train-000001,val-000000}.tar", get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ours = [fork.Process(target=mine, args=(url, tmp_path / "data", i, pipes[i][1])) for i in range(2)]
    for process, (_, said) in zip(ours, pipes, strict=True):
        process.start()  # before the server's threads are
        said.close()
    with server:
        seen = [pickle.loads(hear.recv_bytes()) for hear, _ in pipes]
        for process in ours:
            process.join()
    assert sorted(name for name, _ in server.asked) == sorted(file.name for file in made)  # each once, by one of them
    whole = batches(theirs.train, range(STEPS), 0, World(), False)
    assert all(same(together([one, two]), whole) for one, two in zip(*seen, strict=True))


@given(size=st.integers(2, 300), n=st.integers(1, 9))
def test_shares_are_whole_pairs_in_order_and_nearly_even(size: int, n: int) -> None:
    if size // 2 < n:
        with pytest.raises(UsageError, match=f"cannot be shared by {n} processes; .*--set batch={2 * n}"):
            share(size, World(0, n))
        return
    shares = [share(size, World(rank, n)) for rank in range(n)]
    assert [p for part in shares for p in part] == list(range(size))
    assert all(part.start % 2 == 0 and len(part) >= 2 for part in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    if size % (2 * n) == 0:
        assert {len(part) for part in shares} == {size // n}
