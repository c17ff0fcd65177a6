"""`residuum inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import UsageError

if TYPE_CHECKING:
    from residuum.models.accounting import Cost, LayerCost
    from residuum.models.spec import Specification


def inspect(
    net: str,
    /,
    *,
    size: int | None = None,
    classes: int | None = None,
    channels: int | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = (),
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show a network's layers, shapes, parameters and multiply-adds, beside the paper's figures where it prints them.

    Example: `residuum inspect resnet50 --set shortcut=C`

    Parameters
    ----------
    net
        A network's name, a model file, or a publisher's name such as timm:resnet50.a1_in1k.
    size
        Side of the input in pixels; by default the paper's, 32 or 224 (a model file's own).
    classes
        Number of classes; by default the paper's, 10 or 1000.
    channels
        Channels of the input; 3 by default.
    set_
        Changes one value of the network's specification, key=value; may be given several times.
    json
        Print all of it as one JSON document.
    """
    from residuum.models.accounting import cost

    spec, own_size = _specification(net, console.pairs(set_), classes, channels)
    shown = cost(spec, (size, size) if size is not None else own_size)
    if json:
        return console.print_json({"net": net, "specification": spec.to_json()} | shown.to_json())
    rows = [
        (name, kind, "x".join(map(str, output)), f"{parameters:,}", f"{multiply_adds:,}" if multiply_adds else "")
        for name, kind, output, parameters, multiply_adds in _folded(shown)
    ]
    console.print_table("", ("layer", "kind", "output", "parameters", "multiply-adds"), rows, right=(2, 3, 4))
    print()
    _print_totals(net, spec, shown)
    return None


def _specification(
    net: str, changes: dict[str, str], classes: int | None, channels: int | None
) -> tuple[Specification, tuple[int, int] | None]:
    from residuum.models.spec import parse_changes, specification
    from residuum.use.download import model_of, scheme_of

    if net.endswith(".safetensors") or scheme_of(net) or Path(net).exists():
        if changes or classes is not None or channels is not None:
            raise UsageError(
                "a model file is inspected as it is; --set, --classes and --channels go with a network's name."
            )
        bundle = model_of(net)
        return bundle.spec, bundle.preprocessing.size
    sizes = {k: v for k, v in {"classes": classes, "channels": channels}.items() if v is not None}
    return specification(net, **(parse_changes(changes) | sizes)), None


def _folded(cost: Cost) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """The layers, where blocks of one stage that cost the same stand in one line each: layer1.1-17.conv1 is 17 layers."""

    def block(layer: LayerCost) -> str:
        parts = layer.name.split(".")
        return ".".join(parts[:2]) if parts[0].startswith("layer") else layer.name

    blocks = [(name, list(layers)) for name, layers in groupby(cost.layers, block)]

    def content(entry: tuple[str, list[LayerCost]]) -> tuple[object, ...]:
        name, layers = entry
        inside = [(layer.name.removeprefix(name), layer.kind, layer.output, layer.parameters) for layer in layers]
        return (name.split(".")[0], *inside)

    for _, group in groupby(blocks, content):
        same = list(group)
        first, last = same[0][0], same[-1][0]
        label = first if first == last else f"{first}-{last.rpartition('.')[2]}"
        for layer in same[0][1]:
            name = label + layer.name.removeprefix(first)
            yield name, layer.kind, layer.output, len(same) * layer.parameters, len(same) * layer.multiply_adds


def _print_totals(net: str, spec: Specification, cost: Cost) -> None:
    height, width = cost.size
    blocks = f"{spec.block} blocks {'-'.join(map(str, spec.depths))}"
    print(f"{net}: {cost.depth} layers, {blocks}, shortcut {spec.shortcut}, order {spec.order}, input {height}x{width}")
    print(f"parameters     {cost.parameters:>15,}{_printed(cost.paper_parameters, cost.source)}")
    print(f"multiply-adds  {cost.multiply_adds:>15,}{_printed(cost.paper_multiply_adds, cost.source)}")


def _printed(figure: float | None, source: str | None) -> str:
    if figure is None:
        return ""
    return f"   ({source}: {figure / 1e9:.1f}e9)" if figure >= 1e9 else f"   ({source}: {figure / 1e6:.3g}M)"
