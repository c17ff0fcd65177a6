"""Data that the processes of a machine load once and keep once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from process_groups import call_in_processes
from resnetlab.data import shared_loading
from resnetlab.data.dataset import Dataset
from resnetlab.data.sampler import step_indices
from resnetlab.data.shared_loading import share_loading
from resnetlab.distributed import World
from shard_files import load, packed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def load_in(
    world: World, shards: Path, log: Path, fails: bool = False
) -> tuple[str, list[str], list[bytes], bool, str]:
    """What a process gets: fingerprint, names, images, whether its arrays are in the file, and where that was."""

    def read() -> Dataset:
        with open(log, "a") as file:
            file.write(f"{world.rank}\n")
        return load(shards)

    if fails:
        shared_loading._write_value = lambda *_: os.truncate("/nowhere", 0)  # this process ends with the test
    with share_loading(world) as load_once:
        data = load_once(read)
        maps = Path("/proc/self/maps").read_text()
        place = next((line.split()[-1] for line in maps.splitlines() if "resnetlab-data-" in line), "")
        start = next((int(line.split("-")[0], 16) for line in maps.splitlines() if place and place in line), 0)
        inside = 0 <= data.train.labels.data_ptr() - start < 2**20
    data.train.labels[step_indices(0, len(data.train), 2, 0)] += 0  # may be written to, like any other
    images = [data.train.read_image(i).numpy().tobytes() for i in range(3)]
    return data.fingerprint, list(data.train.names), images, inside, place


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = packed(tmp_path)
    monkeypatch.setattr(shared_loading, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / "resnetlab-data-left"
    left.mkdir()
    (left / ".lock").touch()
    call_in_processes(2, lambda world: load_in(world, out, tmp_path / "log"))
    assert not list(tmp_path.glob("resnetlab-data-*"))


@pytest.mark.parametrize(("machines", "readers"), [(1, "0\n"), (2, "0\n2\n")])
def test_the_first_process_of_a_machine_loads_for_all(machines: int, readers: str, tmp_path: Path) -> None:
    _, out = packed(tmp_path)
    expected, log = load(out), tmp_path / "log"
    found = call_in_processes(4, lambda world: load_in(world, out, log), machines)
    assert "".join(sorted(log.read_text().splitlines(keepends=True))) == readers
    for fingerprint, names, images, inside, place in found:
        assert (fingerprint, names) == (expected.fingerprint, list(expected.train.names))
        assert images == [expected.train.read_image(i).numpy().tobytes() for i in range(3)]
        assert inside and not Path(place).exists()
    assert len({place for *_, place in found}) == machines


def test_without_room_for_the_file_every_process_loads(tmp_path: Path) -> None:
    _, out = packed(tmp_path)
    log = tmp_path / "log"
    found = call_in_processes(2, lambda world: load_in(world, out, log, fails=True))
    assert sorted(log.read_text().split()) == ["0", "1"] and {f[0] for f in found} == {load(out).fingerprint}
