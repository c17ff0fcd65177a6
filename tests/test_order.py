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

from cifar_files import write_binary
from http_server import FileServer
from images import folder
from resnetlab.data import cifar, pack, sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.mixing import Mixing
from resnetlab.data.sampler import Batch, TrainLoader, rank_positions, step_indices
from resnetlab.data.tar_index import index_path
from resnetlab.device import select_device
from resnetlab.distributed import World
from resnetlab.errors import RunError, UsageError
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import keyed_epoch
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import find_named
from resnetlab.training.tasks import classification_data
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.train import RunOptions, build_task
from tiny_runs import tiny

ENGINE = select_device("fp32", "cpu")
SIZE, STEPS = 7, 8  # images in a step (an odd number), steps: more than an epoch of every source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    root = tmp_path_factory.mktemp("data")
    folder(root / "folder", {"train": 8, "val": 1})
    pack.pack_shards(sources.load_dataset(str(root / "folder"), root), root / "shards", per_shard=5)
    write_binary(root / cifar.FOLDER, "cifar10")
    names = {"digits": "digits", "cifar10": "cifar10", "folder": str(root / "folder"), "shards": str(root / "shards")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cifar.RECORDS, "cifar10", (4, 4))
        return {source: sources.load_dataset(name, root) for source, name in names.items()}


def shape(split: Split, side: int) -> Preprocessing:
    channels = split.read_image(0).shape[-1]
    return Preprocessing(channels, (side, side), side, torch.full((channels,), 0.4), torch.full((channels,), 0.3))


def batches(split: Split, steps: range, workers: int, world: World, everything: bool) -> list[Batch]:
    if isinstance(split, DiskSplit):
        split = replace(split, workers=workers)
    preprocessing = shape(split, 24 if isinstance(split, DiskSplit) else split.read_image(0).shape[0])
    colour = everything and preprocessing.channels == 3
    crop = Crop("scale", (26, 40)) if isinstance(split, DiskSplit) else Crop()
    mixing = Mixing(0.5, 1.0, classes=10) if everything else Mixing()
    augmentation = Augmentation(2, "mean", True, colour, everything, 0.5 * everything, crop, mixing)
    loader = TrainLoader(split, preprocessing, augmentation, SIZE, 3, replace(ENGINE, world=world))
    try:
        return [loader.batch(step) for step in steps]
    finally:
        loader.close()


def concatenate(parts: list[list[Batch]]) -> list[Batch]:
    """The batches of all processes, step by step."""
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
    indices = torch.cat([step_indices(3, len(split), SIZE, step) for step in range(STEPS)])
    if not everything:  # mixing can change which class has the largest share
        assert torch.equal(torch.cat([batch.labels for batch in whole]), split.labels[indices])
    for workers in (0, 1, 4) if isinstance(split, DiskSplit) else (0,):
        for n in (1, 2, 3):
            if workers == 4 and n == 2:
                continue  # three of each are told apart by the others already, and processes take time to start
            parts = [batches(split, range(STEPS), workers, World(rank, n), everything) for rank in range(n)]
            assert same(concatenate(parts), whole), (workers, n)
    for world in (World(), World(1, 2)):  # a resume in mid-epoch
        mine = rank_positions(SIZE, world)
        later = batches(split, range(5, STEPS), 2, world, everything)
        assert same(later, [Batch(*(x[mine.start : mine.stop] for x in batch)) for batch in whole[5:]])


def test_the_same_in_blocks_for_any_number_of_processes(
    data: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = data["cifar10"].train
    before = batches(split, range(STEPS), 0, World(), True)
    monkeypatch.setattr("resnetlab.random.MAX_UNDIVIDED", SIZE - 1)
    monkeypatch.setattr("resnetlab.random.BLOCK", 3)
    whole = batches(split, range(STEPS), 0, World(), True)
    assert not same(before, whole)
    for n in (2, 3):
        parts = [batches(split, range(STEPS), 0, World(rank, n), True) for rank in range(n)]
        assert same(concatenate(parts), whole), n


def run_process(url: str, data_dir: Path, rank: int, sender: Connection) -> None:
    """Sends the batches that one of two processes loads, for several numbers of workers."""
    split = sources.load_dataset(url, data_dir).train
    sender.send_bytes(
        pickle.dumps([batches(split, range(STEPS), workers, World(rank, 2), False) for workers in (0, 1, 4)])
    )


def test_two_processes_that_fetch_shards_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "folder", {"train": 8, "val": 1})
    theirs = sources.load_dataset(str(root), tmp_path)
    made = [file for tar in pack.pack_shards(theirs, tmp_path / "s", per_shard=12) for file in (tar, index_path(tar))]
    server = FileServer({file.name: file.read_bytes() for file in made}, pause=0.3)
    url, fork = server.url + "{train-000000,train-000001,val-000000}.tar", get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ours = [fork.Process(target=run_process, args=(url, tmp_path / "data", i, pipes[i][1])) for i in range(2)]
    for process, (_, sender) in zip(ours, pipes, strict=True):
        process.start()  # before the server's threads are
        sender.close()
    with server:
        seen = [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
        for process in ours:
            process.join()
    assert sorted(name for name, _ in server.requests) == sorted(
        file.name for file in made
    )  # each once, by one of them
    whole = batches(theirs.train, range(STEPS), 0, World(), False)
    assert all(same(concatenate([one, two]), whole) for one, two in zip(*seen, strict=True))


@given(size=st.integers(2, 300), n=st.integers(1, 9))
def test_shares_are_whole_pairs_in_order_and_nearly_even(size: int, n: int) -> None:
    if size // 2 < n:
        with pytest.raises(UsageError, match=f"cannot be shared by {n} processes; .*--set batch={2 * n}"):
            rank_positions(size, World(0, n))
        return
    shares = [rank_positions(size, World(rank, n)) for rank in range(n)]
    assert [p for part in shares for p in part] == list(range(size))
    assert all(part.start % 2 == 0 and len(part) >= 2 for part in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    if size % (2 * n) == 0:
        assert {len(part) for part in shares} == {size // n}


def test_a_run_keeps_the_version_of_its_random_numbers() -> None:
    """Larger steps have others in new runs; recipes of smaller ones, and their hashes, are as they were."""
    small, large = tiny(), tiny(batch=2048)
    assert "sampling_version" not in small.to_json() and large.to_json()["sampling_version"] == 2
    old = Recipe.from_values({k: v for k, v in large.to_json().items() if k != "sampling_version"})
    assert old.sampling_version == 1 and "sampling_version" not in old.to_json() and old.key != large.key
    assert large.resolve_like(old) == old and find_named(old, "fp32").sampling_version == 1
    for recipe in (small, large, old):
        assert Recipe.from_values(recipe.to_json()) == recipe
    for recipe, version in ((large, 2), (old, 1)):
        task = build_task(recipe, RunOptions(device="cpu"))
        assert isinstance(task, ClassificationTask) and task.loader.version == version
    with pytest.raises(UsageError, match="unknown key 'sampling_version'"):
        small.with_values({"sampling_version": "1"})
    with pytest.raises(RunError, match="sampling_version must be from 1 to 2, not 3"):
        Recipe.from_values(large.to_json() | {"sampling_version": 3})


def test_many_images_have_an_order_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In new runs; one that was recorded before keeps its order, and its hash."""
    monkeypatch.setattr(classification_data, "MAX_TABLE", 100)
    recipe = tiny()
    new, old = (
        build_task(made, RunOptions(device="cpu"))
        for made in (recipe, Recipe.from_values({k: v for k, v in recipe.to_json().items() if k != "sampling"}))
    )
    assert isinstance(new, ClassificationTask) and isinstance(old, ClassificationTask)
    assert (new.recipe.sampling, old.recipe.sampling) == ("keyed", "shuffle")
    for task, keyed in ((new, True), (old, False)):
        n = len(task.loader.split)
        indices = step_indices(recipe.seed, n, recipe.batch, 0, keyed_epoch if keyed else None)
        assert torch.equal(task.loader.batch(0).labels, task.loader.split.labels[indices])
        assert Recipe.from_values(task.recipe.to_json()) == task.recipe == recipe.resolve_like(task.recipe)
    assert "sampling" not in old.recipe.to_json()
    assert replace(new.recipe, sampling="auto").key == old.recipe.key != new.recipe.key
    monkeypatch.setattr(classification_data, "MAX_TABLE", n)
    assert build_task(recipe, RunOptions(device="cpu")).recipe == old.recipe
