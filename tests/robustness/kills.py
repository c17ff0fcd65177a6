"""Commands are killed at random moments; run again they end as if nothing had happened, and nothing is lost or half written.

Each fault starts one command in a process of its own and sends SIGKILL (or SIGTERM, Ctrl-C) to it, or to all its processes,
after a random time. Then no process may go on; every file under its final name must be as an undisturbed command leaves it; a
training that was asked to stop must have saved its last step; and the command, run again (a training with --resume), must
leave the same files, byte for byte, as the undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

from harness import run

import cells
import resnetlab.serve.app
import resnetlab.training.train  # noqa: F401 - imported once, for all forks
from images import folder, photo
from resnetlab.cli.main import main
from runs import figures
from service import ServiceClient, write_annotated_model, write_classifier
from tiny_runs import TINY_PHOTOS

FOLDER = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
LIMIT = 120.0  # seconds in which a command that was signalled, and the processes that it started, must end
OFTEN = ["--set=checkpoint_minutes=0", "--set=log_every=2", "--device", "cpu", "--out", "run"]
DIGITS = ["--steps", "8", "--set=batch=32", "--set=val_images=40", "--set=eval_every=4", "--set=bn_batch=16"]
DIGITS += ["--precision", "fp32", *OFTEN]
PHOTOS = ["../photos", "--steps", "8", *OFTEN]
PHOTOS += [f"--set={key}={value}" for key, value in TINY_PHOTOS.items() if key not in ("net", "steps", "device")]
SMALL = ["--steps", "4", "--set=widths=8,8,8,8", "--set=depths=1,1,1,1", "--set=image_size=72", "--set=batch=2", *OFTEN]
BOXES = ["--net", "resnet18", "--set=longest=96", "--set=sides=66", "--set=regions=16", "--set=pyramid=8", *SMALL]
MODEL = ("run/model.safetensors",)
START, AS_ASKED = "../start.safetensors", ["--device", "cpu", "--backend", "torch", "--precision", "fp32"]


class Command(NamedTuple):
    """A command line, patterns of the files that it writes in its folder, and how often it is chosen."""

    arguments: list[str]
    files: tuple[str, ...]
    weight: float = 2

    @property
    def trains(self) -> bool:
        return "train" in self.arguments[:2]


COMMANDS = [
    Command(["train", "digits", "--net", "resnet8", *DIGITS], MODEL, 4),
    Command(["train", "digits", "--net", "resnet8", *DIGITS, "--set=optimizer=adamw", "--set=ema_decay=0.9"], MODEL),
    Command(["train", "digits", "--recipe", "paper-cifar", "--net", "resnet8", *DIGITS], MODEL),
    Command(["train", "digits", "--recipe", "preact-cifar", "--net", "preresnet20", *DIGITS], MODEL),
    Command(["train", *PHOTOS, "--net", "resnet8"], MODEL, 3),
    Command(["train", *PHOTOS, "--net", "resnet8", "--recipe", "modern", "--set=bn_batch=0"], MODEL, 3),
    Command(["train", *PHOTOS, "--net", "resnet8", "--workers", "2"], MODEL),
    Command(["train", *PHOTOS, "--recipe", "finetune", "--start-from", START], MODEL),
    Command(["train", "digits", "--net", "resnet8", *DIGITS, "--procs", "2"], MODEL, 4),
    Command(["detect", "train", "../voc", *BOXES], MODEL, 3),
    Command(["segment", "train", "../voc", *SMALL], MODEL, 3),
    Command(["study", "degradation", "--depths", "8", "--seeds", "1", "--steps", "12", "--device", "cpu", "--out", "study"],
            ("runs/studies/*/model.safetensors",), 0.25),
    Command(["data", "pack", "../photos", "shards", "--per-shard", "5"], ("shards/*",), 3),
    Command(["data", "check", "../photos", "--quarantine", "list.txt", "--no-timing", "--workers", "0"], ("list.txt",)),
    Command(["evaluate", START, "--data", "../photos", "--out", "figures", "--device", "cpu"], ("figures/evaluation.json",), 3),
    Command(["predict", START, "../photos", "--out", "rows.jsonl", *AS_ASKED], ("rows.jsonl",), 3),
    Command(["predict", START, "../photos", "--parts", "parts", *AS_ASKED], ("parts/*",), 3),
    Command(["detect", "predict", "../detector.safetensors", "../voc/JPEGImages", "--out", "drawn"], ("drawn/*",), 1),
    Command(["embed", START, "../photos", "--out", "features.npz", "--device", "cpu"], ("features.npz",), 1),
    Command(["import", "../start.pth", "--out", "m.safetensors", "--classes", "a,b,c,d,e,f", "--mean", "0.5,0.5,0.5",
             "--std", "0.25,0.25,0.25"], ("m.safetensors",), 3),
    Command(["export", START, "--to", "torch", "--images", "../photos", "--out", "m.pt2"], (), 0.5),
    Command(["export", START, "--to", "onnx", "--images", "../photos", "--out", "m.onnx"], ("m.onnx",), 0.5),
    Command(["export", START, "--to", "torchvision", "--out", "m.pth"], ("m.pth",), 1),
    Command(["strip", START, "--out", "m.safetensors"], ("m.safetensors",), 1),
    Command(["push", START, "to"], ("to/model.safetensors", "to/README.md"), 1),
    Command(["explain", START, "../a.jpg", "--out", "maps"], (), 1),
    Command(["serve", START, "--port", "0", *AS_ASKED], ("answer.json",), 4),
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


def wait(pid: int, limit: float = 600.0) -> int | None:
    """The exit code of a process, minus the signal's number where one ended it; None, and a kill, where it runs on."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def complete(arguments: Sequence[str], place: Path) -> int | None:
    """Runs a command to its end, and returns its exit code; a service answers a request and is asked to stop."""
    pid = start(arguments, place)
    if arguments[0] != "serve":
        return wait(pid)
    until, log = time.monotonic() + LIMIT, place.with_suffix(".log")
    before = len(log.read_text()) if log.exists() else 0
    while time.monotonic() < until:
        if log.exists() and (found := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text()[before:])):
            status, _, answer = ServiceClient(int(found[1])).request(
                "POST", "/predict", (FOLDER / "a.jpg").read_bytes()
            )
            (place / "answer.json").write_bytes(
                b"%d %s" % (status, re.sub(rb'"(milliseconds|seconds)": ?[\d.]+', b"", answer))
            )
            break
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    return wait(pid, LIMIT)


def still_running(place: Path) -> list[str]:
    """The processes that work in a folder after LIMIT seconds: all that a command starts inherit it."""
    until, found = time.monotonic() + LIMIT, ["?"]
    while found and time.monotonic() < until:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "cwd") == str(place):
                    found.append((process / "cmdline").read_text().replace("\0", " ")[:200])
        time.sleep(0.02 if found else 0)
    return found


def content(place: Path, files: Sequence[str]) -> dict[str, bytes]:
    """The files that a command has written so far."""
    found = [path for pattern in files for path in place.glob(pattern)]
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in found
        if path.is_file() and not path.name.startswith(".")
    }


def again(command: Command, place: Path) -> list[str]:
    """The command line that goes on after a kill."""
    if not command.trains or not (place / "run" / "recipe.toml").exists():
        return command.arguments
    procs = ["--procs", "2"] if "--procs" in command.arguments else []
    return [*command.arguments[: command.arguments.index("train") + 1], "--resume", "run", *procs]


class Expected(NamedTuple):
    """How an undisturbed command ends."""

    files: dict[str, bytes]
    seconds: float
    lines: list[dict[str, float]]


@cache
def undisturbed(number: int) -> Expected:
    command, place = COMMANDS[number], FOLDER / "whole"
    shutil.rmtree(place, ignore_errors=True)
    place.with_suffix(".log").unlink(missing_ok=True)
    place.mkdir()
    began = time.monotonic()
    if code := complete(command.arguments, place):
        raise SystemExit(f"{command.arguments} ended with {code}: {place.with_suffix('.log').read_text()[-2000:]}")
    seconds, files = time.monotonic() - began, content(place, command.files)
    assert bool(files) == bool(command.files), command
    return Expected(files, seconds, figures(place / "run") if command.trains else [])


def find_unsaved(run: Path) -> str | None:
    """What a run that was asked to stop lacks: a checkpoint of its last recorded step."""
    if not (run / "metrics.jsonl").exists() or not (lines := figures(run)):
        return None
    saved = max((int(path.stem.rpartition("-")[2]) for path in (run / "checkpoints").glob("step-*")), default=0)
    return f"step {lines[-1]['step']} was trained, {saved} saved" if saved < lines[-1]["step"] else None


def kill(command: Command, expected: Expected, place: Path, draw: random.Random) -> tuple[int | None, str | None]:
    """Starts a command and kills it after a random time: its exit code, and what is wrong then."""
    pid = start(again(command, place), place)
    time.sleep(draw.random() * expected.seconds)
    signum = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    whole_group = draw.random() < 0.5
    try:
        (os.killpg if whole_group else os.kill)(pid, signum)
    except ProcessLookupError:  # before it has a group, or after its end
        os.kill(pid, signum)
    code, log = wait(pid, LIMIT), place.with_suffix(".log")
    if code not in (0, -signum, 128 + signum):
        return code, f"code {code} after signal {signum} (group: {whole_group}): {log.read_text()[-800:]}"
    if others := still_running(place):
        return code, f"processes go on after signal {signum} (group: {whole_group}): {others}"
    if "Traceback" in log.read_text():
        return code, f"a traceback after signal {signum} (group: {whole_group}): {log.read_text()[-1500:]}"
    if command.trains and code == 128 + signum and (unsaved := find_unsaved(place / "run")):
        return code, f"after signal {signum} (group: {whole_group}) {unsaved}: {log.read_text()[-800:]}"
    if command.arguments[:2] != ["data", "pack"]:  # an unfinished packing is recognised as a whole
        for file, found in content(place, command.files).items():
            if found != expected.files.get(file):
                return code, f"{file} is not whole after signal {signum} (group: {whole_group})"
    return code, None


CHOSEN: Counter[str] = Counter()


def attack(draw: random.Random) -> str | None:
    number = draw.choices(range(len(COMMANDS)), [each.weight for each in COMMANDS])[0]
    command, expected = COMMANDS[number], undisturbed(number)
    place = FOLDER / "killed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (log := place.with_suffix(".log")).write_text("")
    name = " ".join(command.arguments[:6])
    CHOSEN[" ".join(command.arguments[: 2 if command.trains or command.arguments[0] == "data" else 1])] += 1
    for _ in range(draw.randint(1, 2)):
        code, wrong = kill(command, expected, place, draw)
        if wrong:
            return f"{name}: {wrong}"
        if code == 0:
            break
    done = code == 0 and command.arguments[0] != "serve"
    if not done and (code := complete(again(command, place), place)):
        return f"{name}: code {code} afterwards: {log.read_text()[-800:]}"
    if (files := content(place, command.files)) != expected.files:
        different = [key for key in files.keys() | expected.files if files.get(key) != expected.files.get(key)]
        return f"{name}: other files than of an undisturbed command: {different}"
    if expected.lines and figures(place / "run") != expected.lines:
        return f"{name}: other lines of metrics.jsonl"
    left = [
        p.name for p in place.rglob(".*") if p.name.startswith((".export-", ".packing")) or p.name.endswith(".part")
    ]
    return f"{name}: left behind {left}" if left else None


def main_() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a process has it before Python starts
    folder(FOLDER / "photos", {"train": 12, "val": 6})
    cells.make_voc_folder(FOLDER / "voc")
    photo(1).save(FOLDER / "a.jpg")
    write_classifier(FOLDER / "start.safetensors")
    write_annotated_model(FOLDER / "detector.safetensors", "detect")
    assert complete(["export", "start.safetensors", "--to", "torchvision", "--out", "start.pth"], FOLDER) == 0
    try:
        run("kills", attack, 200)
    finally:
        print("commands:", ", ".join(f"{name} {count}" for name, count in sorted(CHOSEN.items())))


if __name__ == "__main__":
    main_()
