"""`resnetlab models`, `recipes` and `doctor`: what there is, and what is missing."""

from __future__ import annotations

import platform
import sys
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.cli.options import Json
from resnetlab.errors import UsageError, install_hint
from resnetlab.formatting import format_count


def models(pattern: Annotated[str, Parameter(show_default=False)] = "*", /, *, json: Json = False) -> None:
    """List the networks, with parameters, multiply-adds and the errors that the papers report.

    Example: `resnetlab models 'resnet*'`

    Other depths of 6n+2 are names too; `resnetlab inspect NET` shows the layers of one. Published weights are names such as
    torchvision:resnet50.IMAGENET1K_V2 and timm:resnet50.a1_in1k.

    Parameters
    ----------
    pattern
        Show the names that match, such as 'preresnet*'.
    """
    from resnetlab.evaluation.published import find_error
    from resnetlab.models.cost import compute_totals, default_image_size
    from resnetlab.models.spec import get_specification, list_network_names

    names = [name for name in list_network_names() if fnmatch(name, pattern)]
    if not names:
        raise UsageError(f"no network matches {pattern!r}; `resnetlab models` lists them all.")
    rows: list[dict[str, Any]] = []
    for name in names:
        spec = get_specification(name)
        parameters, multiply_adds = compute_totals(spec)
        cifar = spec.stem == "cifar"
        printed = find_error(spec, "cifar10", "1crop") if cifar else find_error(spec, "imagenet", "10crop")
        rows.append(
            {
                "net": name,
                "image_size": default_image_size(spec),
                "parameters": parameters,
                "multiply_adds": multiply_adds,
                "paper_top1_error": printed and printed.top1,
                "paper_data": None if printed is None else "cifar10" if cifar else "imagenet, 10crop",
            }
        )
    if json:
        return console.print_json({"models": rows})
    cells = [
        (
            row["net"],
            str(row["image_size"]),
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['multiply_adds'] / 1e9:,.3f} G",
            "–" if row["paper_top1_error"] is None else f"{row['paper_top1_error']:.2%} ({row['paper_data']})",
        )
        for row in rows
    ]
    columns = ("network", "pixels", "parameters", "multiply-adds", "top-1 error in the papers")
    return console.print_table("", columns, cells, right=(1, 2, 3))


def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """List the recipes, or print one with its paper, cost and every value.

    Example: `resnetlab recipes paper-cifar > mine.toml`, then `resnetlab train --recipe mine.toml`

    Parameters
    ----------
    name
        A recipe.
    """
    from resnetlab.cli.train import print_recipe
    from resnetlab.training.recipes import RECIPES, find_recipe

    if name is not None and not json:
        return print_recipe(name, RECIPES[name]().task if name in RECIPES else "classify")
    chosen = RECIPES if name is None else {name: RECIPES.get(name) or (lambda: find_recipe(name, "classify"))}
    found = {key: (make(), (make.__doc__ or "").strip().splitlines()[0]) for key, make in chosen.items()}
    if json:
        return console.print_json(
            {"recipes": [{"about": about} | recipe.to_json() for recipe, about in found.values()]}
        )
    rows = [
        (key, recipe.task, recipe.net or "that of the weights", f"{recipe.steps:,}", f"{recipe.batch:,}", about)
        for key, (recipe, about) in found.items()
    ]
    return console.print_table("", ("recipe", "task", "net", "steps", "batch", "what it is"), rows, right=(3, 4))


def doctor(*, json: Json = False) -> None:
    """Show versions, devices, what they compute fast, and extras, with the command that installs what is missing.

    Example: `resnetlab doctor`
    """
    import os
    import shutil

    import resnetlab
    from resnetlab.data.jpeg_region import load_region_decoder
    from resnetlab.device import count_cores
    from resnetlab.nn.kernel import load_kernel
    from resnetlab.pixels import load_pixel_kernels
    from resnetlab.training.timing import measure_bf16

    packages = ("torch", "torchvision", "numpy", "pillow", "safetensors")
    versions = {name: _version(name) or "missing" for name in packages}
    extras = {extra: [name for name in names if _version(name) is None] for extra, names in _extras().items()}
    document: dict[str, Any] = {
        "resnetlab": resnetlab.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "versions": versions,
        "devices": _devices(),
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("cl"),
        "cores": count_cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # Windows has none
        "bf16_speedup": round(measure_bf16(), 2),
        "fused_kernel": str(load_kernel()),
        "jpeg_regions": str(load_region_decoder()),
        "pixel_kernels": str(load_pixel_kernels()),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "extras": {
            extra: {"installed": not missing, "missing": missing, "install": install_hint(extra) if missing else None}
            for extra, missing in extras.items()
        },
    }
    if json:
        return console.print_json(document)
    console.write_line(f"resnetlab {document['resnetlab']}, Python {document['python']}, {document['system']}")
    console.write_line(", ".join(f"{name} {value}" for name, value in versions.items()))
    load, busy = document["load"], console.describe_busy()
    measured, programs = f"while {busy}" if busy else "measured", "programs that wanted one in the last minute"
    lines = {
        "executable": sys.executable,
        "devices": "; ".join(document["devices"]),
        "cores": f"{document['cores']}" + ("" if load is None else f", load {load} ({programs})"),
        "bf16": f"a step takes {1 / document['bf16_speedup']:.2f} times as long as in fp32 ({measured})",
        "kernel": document["fused_kernel"],
        "JPEGs": document["jpeg_regions"],
        "pixels": document["pixel_kernels"],
        "compiler": document["compiler"] or "none: --compile on is not possible here (install g++)",
        "free disk": f"{document['free_disk_gb']} GB here",
    }
    for name, text in lines.items():
        console.write_line(f"{name:<14} {text}")
    print()
    rows = [
        (extra, "installed" if not missing else f"without {', '.join(missing)}", install_hint(extra) if missing else "")
        for extra, missing in extras.items()
    ]
    return console.print_table("", ("extra", "state", "install it with"), rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """The packages that each extra installs; without the extra that is all of them."""
    import re

    extras: dict[str, list[str]] = {}
    try:
        declared = requires("resnetlab") or []
    except PackageNotFoundError:  # run from its source
        return extras
    for requirement in declared:
        match = re.fullmatch(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"].*", requirement)
        if match and match[2] != "all":
            extras.setdefault(match[2], []).append(match[1])
    return extras


def _devices() -> list[str]:
    """The devices that torch can compute on, the one that "auto" takes first."""
    import torch

    from resnetlab.device import default_precision

    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    cpu = torch.device("cpu")
    return [*gpus, *mps, f"cpu, {format_count(torch.get_num_threads(), 'thread')}, {default_precision(cpu)}"]
