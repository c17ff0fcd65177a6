#!/usr/bin/env python3
"""Measures ResNetLab's speed beside its peers', and writes docs/speed.md and docs/speed.svg.

    python benchmarks/speed_table.py MODEL IMAGE --data-dir DATA [--only ROW …]     quiet machine, about half an hour
    python benchmarks/speed_table.py --draw                                         only the page, from results/speed.json

MODEL is a ResNet-18 at 224 pixels and IMAGE a photograph, for the service. A row is read from what a script of this folder
prints; results/speed.json keeps it with the machine and the commit. Rows that are not measured again stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

import resnetlab
from resnetlab.device import environment
from resnetlab.run_folder import write_atomically

HERE = Path(__file__).resolve().parent
RECORD, PAGE, DRAWING = (HERE.parent / name for name in ("results/speed.json", "docs/speed.md", "docs/speed.svg"))
RATIO = r"(\d+\.\d\d) \((\d+\.\d\d) to (\d+\.\d\d)\)"


class Row(NamedTuple):
    """A row of the table: what is measured beside what, the issue's goal, the script, and where its ratios stand."""

    name: str
    peer: str
    goal: float
    command: str  # {model}, {image}, {data} and {small} are filled in
    pattern: str  # one group for each round's ratio, or three: median, lowest, highest


LOOP, CROPS = "the eager fp32 loop", "torchvision's PIL pipeline"
PIPELINE = "data.py --rounds 7 --only pipeline"
RESNET20 = "train.py --nets resnet20 --contestants 'eager fp32,resnetlab' --rounds 9"
ROWS = (
    Row("train ResNet-20, 32 px", LOOP, 2.8, RESNET20, rf"\| resnetlab \|[^|]*\| {RATIO}"),
    Row("train ResNet-20, beside a busy process", LOOP, 3.8, f"{RESNET20} --busy 1", rf"\| resnetlab \|[^|]*\| {RATIO}"),
    Row(
        "train ResNet-18, 224 px", LOOP, 0, "train.py --nets resnet18 --contestants 'eager fp32,resnetlab' --rounds 3",
        rf"\| resnetlab \|[^|]*\| {RATIO}",
    ),
    Row(
        "train ResNet-50, 224 px", LOOP, 3.2,
        "train.py --nets resnet50 --contestants 'eager fp32,resnetlab' --rounds 5",
        rf"\| resnetlab \|[^|]*\| {RATIO}",
    ),
    Row("random-resized crops of JPEGs", CROPS, 2.3, PIPELINE, r"ours resized, simplejpeg +\d+ +(\d+\.\d\d)"),
    Row("scale augmentation of JPEGs", CROPS, 4.2, PIPELINE, r"ours scale, simplejpeg +\d+ +(\d+\.\d\d)"),
    Row(
        "serve ResNet-18", "the same engine called directly", 0.84, "serve.py {model} {image} --rounds 15",
        r"served [\d.]+ requests/s \((\d+\.\d)%\)",
    ),
    Row("evaluate ResNet-20 on CIFAR-10", LOOP, 2.5, "evaluate.py {small} --data-dir {data} --rounds 3", rf"ratio +{RATIO}"),
    Row(
        "evaluate, beside a busy process", LOOP, 4.0, "evaluate.py {small} --data-dir {data} --rounds 3 --busy 1",
        rf"ratio +{RATIO}",
    ),
)  # fmt: skip
PAGE_HEAD = """# Speed

Ratios of ResNetLab's speed to that of a peer which takes turns with it in one run of a script in `benchmarks/`: medians, with
the lowest and the highest round. Written by `benchmarks/speed_table.py` from `results/speed.json`, which has the commands.

![The ratios of the table](speed.svg)

| what | beside | ratio | rounds from … to | goal | commit |
|---|---|---|---|---|---|
"""


@cache
def run_script(command: str) -> str:
    """What a script of this folder prints."""
    print(command, file=sys.stderr, flush=True)
    return subprocess.run(
        f"{sys.executable} {HERE}/{command}", shell=True, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(row: Row, values: dict[str, str]) -> dict[str, Any]:
    """Runs a row's script and reads its ratios. Raises SystemExit where that would measure other code than this commit's."""
    if not Path(resnetlab.__file__).is_relative_to(HERE.parent):
        raise SystemExit(f"{resnetlab.__file__} would be measured, not this folder's; install that: uv sync.")
    printed = run_script(row.command.format(**values))
    found = [
        [float(x) for x in ([match] if isinstance(match, str) else match)] for match in re.findall(row.pattern, printed)
    ]
    if not found:
        raise SystemExit(f"{row.name}: no ratio in what {row.command} printed:\n{printed}")
    scale = 100 if "%" in row.pattern else 1
    ratios = sorted(x / scale for x in ([each[0] for each in found] if len(found) > 1 else found[0]))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True, cwd=HERE)
    machine = environment()
    return {
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1], "command": row.command,
        "commit": git.stdout.strip(), "machine": {key: machine[key] for key in ("cpu", "threads", "torch", "torchvision")},
        "output": printed.splitlines(),
    }  # fmt: skip


def write_page(record: dict[str, Any]) -> None:
    """The table, and the figure."""
    rows = [row for row in ROWS if row.name in record]
    lines = []
    for row in rows:
        found, goal = record[row.name], f"{row.goal:.2f}" if row.goal else "–"
        spread = (
            f"{found['lowest']:.2f} to {found['highest']:.2f}" if found["highest"] > found["lowest"] else "one median"
        )
        lines.append(f"| {row.name} | {row.peer} | **{found['ratio']:.2f}** | {spread} | {goal} | {found['commit']} |")
    machines = sorted(
        {f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}" for m in (record[r.name]["machine"] for r in rows)}
    )
    write_atomically(PAGE, PAGE_HEAD + "\n".join(lines) + f"\n\nMachine: {'; '.join(machines)}.\n" + PAGE_TAIL)
    matplotlib.rcParams |= {"svg.hashsalt": "speed", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure = Figure(figsize=(8, 0.42 * len(rows) + 0.8), layout="constrained")
    axes, places = figure.subplots(), range(len(rows))
    found = [record[row.name] for row in rows]
    axes.barh(places, [each["ratio"] for each in found], color="#2f6fab", height=0.55)
    errors = [[each["ratio"] - each["lowest"] for each in found], [each["highest"] - each["ratio"] for each in found]]
    axes.errorbar([each["ratio"] for each in found], places, xerr=errors, fmt="none", ecolor="#1b2733", capsize=3)
    axes.scatter(
        [row.goal or float("nan") for row in rows], places, marker="|", s=160, color="#c4541a", label="goal", zorder=3
    )
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="#8a949e", linewidth=1)
    axes.set_xlabel("times as fast as the peer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(DRAWING, metadata={"Date": None, "Creator": None})


PAGE_TAIL = """
The goals were set on a processor with bf16 in hardware, as this one has it; on one without it both sides compute in fp32, and
the ratios are smaller ([log](log.md), which also has what was tried for each goal, and what it gave).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("image", nargs="?")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--only", nargs="*", help="names of rows, or their beginnings")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    small = HERE.parent / "src/resnetlab/trained/cifar10-resnet20/model.safetensors"
    values = {"model": str(options.model), "image": str(options.image), "data": options.data_dir, "small": str(small)}
    for name in options.only or ():
        if not any(row.name.startswith(name) for row in ROWS):
            parser.error(f"no row is called {name!r}; the rows are {', '.join(row.name for row in ROWS)}.")
    wanted = tuple(options.only or ("",))
    rows = [] if options.draw else [row for row in ROWS if row.name.startswith(wanted)]
    if options.image is None and any("{image}" in row.command for row in rows):
        parser.error("the service is measured with a model and a photograph: give MODEL and IMAGE.")
    for row in rows:
        record[row.name] = measure(row, values)
        write_atomically(RECORD, json.dumps(record, indent=1) + "\n")
    write_page(record)


if __name__ == "__main__":
    main()
