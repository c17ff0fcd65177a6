"""Commands are killed at random moments; run again they end as if nothing had happened, and nothing is lost or half written.

Each fault starts one command in a process of its own, sends SIGKILL (or SIGTERM, Ctrl-C) to all its processes after a random
time, checks that every file under its final name is as an undisturbed command leaves it, runs the command again (a training
with --resume) and compares its files, byte for byte, with those of the undisturbed one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

from harness import run

import resnetlab.training.train  # noqa: F401 - imported once, for all forks
from images import folder
from resnetlab.cli.main import main
from runs import CLOCK, figures
from service import write_classifier
from tiny_runs import TINY_PHOTOS

FOLDER = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
SET = [f"--set={key}={value}" for key, value in TINY_PHOTOS.items() if key not in ("net", "steps", "device")]
SAVE = ["--set=checkpoint_minutes=0", "--set=log_every=2", "--device", "cpu", "--out", "run"]
TINY = ["--net", "resnet8", "--steps", "12", "--set=batch=32", "--set=val_images=40", "--set=eval_every=4"]
TINY += ["--precision", "fp32"]
MODEL = ("run/model.safetensors",)


class Command(NamedTuple):
    """A command line, the files that it writes in its folder, and how often it is chosen."""

    arguments: list[str]
    files: tuple[str, ...]
    weight: int = 2


COMMANDS = [
    Command(["train", "digits", *TINY, *SAVE], MODEL, 6),
    Command(["train", "digits", *TINY, *SAVE, "--set=optimizer=adamw", "--set=ema_decay=0.9"], MODEL),
    Command(["train", "../photos", "--net", "resnet8", "--steps", "8", *SET, *SAVE], MODEL, 3),
    Command(["train", "../photos", "--net", "resnet8", "--steps", "8", *SET, *SAVE, "--workers", "2"], MODEL),
    Command(["train", "../photos", "--recipe", "finetune", "--start-from", "../start.safetensors", "--steps", "6",
             *SET, *SAVE], MODEL),
    Command(["train", "digits", *TINY, *SAVE, "--procs", "2"], MODEL, 1),
    Command(["data", "pack", "../photos", "shards", "--per-shard", "5"], ("shards",), 2),
    Command(["data", "check", "../photos", "--quarantine", "list.txt", "--no-timing", "--workers", "0"], ("list.txt",)),
    Command(["evaluate", "../start.safetensors", "--data", "../photos", "--out", "figures", "--device", "cpu"],
            ("figures/evaluation.json",)),
    Command(["import", "../start.pth", "--out", "m.safetensors", "--classes", "a,b,c,d,e,f", "--mean", "0.5,0.5,0.5",
             "--std", "0.25,0.25,0.25"], ("m.safetensors",)),
    Command(["export", "../start.safetensors", "--to", "torch", "--images", "../photos", "--out", "m.pt2"], ()),
    Command(["export", "../start.safetensors", "--to", "torchvision", "--out", "m.pth"], ("m.pth",)),
    Command(["strip", "../start.safetensors", "--out", "m.safetensors"], ("m.safetensors",)),
    Command(["push", "../start.safetensors", "to"], ("to/model.safetensors", "to/README.md")),
    Command(["explain", "../start.safetensors", "../photos/train", "--out", "maps"], ()),
]  # fmt: skip


def start(arguments: Sequence[str], place: Path) -> int:
    """Forks a process that runs a command in a folder, in a group of its own; returns its id."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        os.chdir(place)
        log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        sys.argv = ["resnetlab", *arguments]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of processes that it starts
        main(list(arguments))
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(99)


def wait(pid: int) -> int:
    """The exit code of a process; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(place: Path, files: Sequence[str]) -> dict[str, bytes]:
    """The files that a command has written so far, those of folders too."""
    found = [
        path
        for name in files
        for path in ([place / name] if not (place / name).is_dir() else (place / name).rglob("*"))
    ]
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in found
        if path.is_file() and not path.name.startswith(".")
    }


def again(command: Command, place: Path) -> list[str]:
    """The command line that goes on after a kill."""
    if command.arguments[0] != "train" or not (place / "run" / "recipe.toml").exists():
        return command.arguments
    procs = ["--procs", "2"] if "--procs" in command.arguments else []
    return ["train", "--resume", "run", *procs]


class Expected(NamedTuple):
    """How an undisturbed command ends."""

    files: dict[str, bytes]
    seconds: float
    lines: list[dict[str, float]]


def undisturbed(command: Command) -> Expected:
    place = FOLDER / "whole"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    began = time.monotonic()
    if code := wait(start(command.arguments, place)):
        raise SystemExit(f"{command.arguments} ended with {code}: {place.with_suffix('.log').read_text()[-2000:]}")
    seconds = time.monotonic() - began
    return Expected(content(place, command.files), seconds, figures(place / "run") if (place / "run").is_dir() else [])


def kill_one(expected: dict[int, Expected]) -> Callable[[random.Random], str | None]:
    def attack(draw: random.Random) -> str | None:
        number = draw.choices(range(len(COMMANDS)), [each.weight for each in COMMANDS])[0]
        command, whole = COMMANDS[number], expected[number]
        place = FOLDER / "killed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        place.with_suffix(".log").unlink(missing_ok=True)
        name = " ".join(command.arguments[:3])
        for _ in range(draw.randint(1, 2)):
            pid = start(again(command, place), place)
            time.sleep(draw.random() * whole.seconds)
            signum = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            try:
                os.killpg(pid, signum)
            except ProcessLookupError:  # before it has a group, or after its end
                os.kill(pid, signum)
            code = wait(pid)
            if code not in (0, -signum, 128 + signum):
                return f"{name}: code {code} after signal {signum}: {place.with_suffix('.log').read_text()[-800:]}"
            if signum == signal.SIGKILL:
                time.sleep(0.3 if "--procs" in command.arguments else 0)  # its processes may still be ending
            if command.arguments[:2] != ["data", "pack"]:  # an unfinished packing is recognised as a whole
                for file, found in content(place, command.files).items():
                    if found != whole.files[file]:
                        return f"{name}: {file} is not whole after a kill"
            if code == 0:
                break
        done = (place / "run" / "result.json").exists() or (command.arguments[0] != "train" and code == 0)
        if not done and (code := wait(start(again(command, place), place))):
            return f"{name}: code {code} afterwards: {place.with_suffix('.log').read_text()[-800:]}"
        if content(place, command.files) != whole.files:
            return f"{name}: other files than of an undisturbed command"
        if whole.lines and figures(place / "run") != whole.lines:
            return f"{name}: other lines of metrics.jsonl"
        left = [
            p.name for p in place.rglob(".*") if p.name.startswith((".export-", ".packing")) or p.name.endswith(".part")
        ]
        return f"{name}: left behind {left}" if left else None

    return attack


if __name__ == "__main__":
    assert CLOCK
    folder(FOLDER / "photos", {"train": 12, "val": 6})
    write_classifier(FOLDER / "start.safetensors")
    os.chdir(FOLDER)
    run("kills", kill_one({i: undisturbed(command) for i, command in enumerate(COMMANDS)}), 200)
