"""Checkpoints are written beside training: from a copy, one after the other, and errors are not lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from resnetlab.errors import NoSpaceError
from resnetlab.run_folder import RunFolder, list_checkpoints
from resnetlab.tensor_file import read_tensor_file
from resnetlab.training import checkpoint
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import CheckpointWriter
from resnetlab.training.step import train_step
from tiny_runs import make_train_state, tiny


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), checkpoint.write_tensor_file

    def write_when_allowed(path: Path, *contents: Any) -> None:
        assert may_write.wait(30)
        if path.stem.endswith("3"):
            raise NoSpaceError(path)
        write(path, *contents)

    monkeypatch.setattr(checkpoint, "write_tensor_file", write_when_allowed)
    train_state, writer = make_train_state(tiny(ema_decay=0.9)), CheckpointWriter(RunFolder(tmp_path))
    set_train_mode(train_state.task.net)

    def step() -> None:
        output = train_step(train_state, train_state.task.micro_batches(train_state.state.step), 0.1)
        train_state.state.losses.append(output.loss)
        train_state.state.errors.append(output.error)

    step()
    writer.save(train_state)
    before = {name: x.clone() for name, x in train_state.tensors().items()} | {
        "losses": torch.stack(train_state.state.losses)
    }
    step()
    writer.check()  # does not wait
    assert not list_checkpoints(RunFolder(tmp_path))
    may_write.set()
    writer.save(train_state)  # waits for the one before
    tensors, metadata = read_tensor_file(tmp_path / "checkpoints" / "step-00000001.safetensors", "checkpoint")
    assert metadata["step"] == 1 and all(torch.equal(tensors[name], x) for name, x in before.items())
    step()
    writer.save(train_state)
    with pytest.raises(NoSpaceError):
        writer.wait()
    writer.close()
    assert [path.stem for path in list_checkpoints(RunFolder(tmp_path))] == ["step-00000001", "step-00000002"]
