"""A run folder with a damaged, missing or foreign file is resumed bit-identically, or refused in a sentence."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import warnings
from pathlib import Path

from harness import damage, run

from resnetlab.errors import ResNetLabError
from resnetlab.stopping import StopSignal
from resnetlab.training.result import Progress
from resnetlab.training.train import RunOptions, resume, start_run
from runs import figures
from tiny_runs import tiny

FOLDER = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
RECIPE = tiny(steps=12, log_every=2, eval_every=6, val_images=50, checkpoint_minutes=0.0)


def stop(progress: Progress) -> None:
    if progress.step == 8:
        os.kill(os.getpid(), 15)


def prepare() -> None:
    start_run(RECIPE, FOLDER / "whole", RunOptions(device="cpu"))
    try:
        start_run(RECIPE, FOLDER / "stopped", RunOptions(device="cpu", on_progress=stop))
    except StopSignal:
        return
    raise AssertionError("the run did not stop")


def attack(draw: random.Random) -> str | None:
    place = FOLDER / "attacked"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(FOLDER / draw.choice(["whole", "stopped"]), place)
    files = set()
    for _ in range(draw.randint(1, 2)):
        file = draw.choice(sorted(p for p in place.rglob("*") if p.is_file() and "tensorboard" not in p.parts))
        kind = draw.randrange(4)
        files.add(file.name)
        if kind < 2:
            file.write_bytes(damage(file.read_bytes(), draw))
        elif kind == 2:
            file.unlink()
        else:
            file.write_bytes(draw.choice([b"", b"{}", b"[]", b"null", b"[" * 10_000, b"\xff\xfe", b"x = 1\n"]))
    try:
        with warnings.catch_warnings(action="ignore"):
            result = resume(place, RunOptions(device="cpu"))
    except ResNetLabError as error:
        return f"not a sentence: {error}" if "\n" in str(error).strip() else None
    if Path(result.model).read_bytes() != (FOLDER / "whole" / "model.safetensors").read_bytes():
        return "another model"
    if "metrics.jsonl" in files:  # its lines have no digest
        return None
    lines, expected = figures(place), figures(FOLDER / "whole")
    return None if all(line in expected for line in lines) else "another metrics.jsonl"


if __name__ == "__main__":
    prepare()
    run("damaged run folders", attack, 300)
