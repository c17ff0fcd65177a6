"""`resnetlab inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from resnetlab.cli import console
from resnetlab.cli.options import Json, Settings
from resnetlab.errors import UsageError

if TYPE_CHECKING:
    from resnetlab.models.cost import Cost, LayerCost
    from resnetlab.models.spec import Specification


def inspect(
    net: str,
    /,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    channels: int | None = None,
    set_: Settings = (),
    json: Json = False,
) -> None:
    """Show a network's layers, shapes, parameters and multiply-adds, with the paper's figures where they are published.

    Example: `resnetlab inspect resnet50 --set shortcut=C`

    Parameters
    ----------
    net
        A network's name, a model file, or a published name such as timm:resnet50.a1_in1k.
    image_size
        Side of the input in pixels; by default the paper's, 32 or 224 (or that of the model file).
    classes
        Number of classes; by default the paper's, 10 or 1000.
    channels
        Channels of the input; 3 by default.
    set_
        Changes one value of the network's specification, key=value; may be given several times.
    """
    from resnetlab.models.cost import compute_cost

    spec, own_size = _resolve_specification(net, console.parse_pairs(set_), classes, channels)
    cost = compute_cost(spec, (image_size, image_size) if image_size is not None else own_size)
    if json:
        return console.print_json({"net": net, "specification": spec.to_json()} | cost.to_json())
    rows = [
        (name, kind, "x".join(map(str, output)), f"{parameters:,}", f"{multiply_adds:,}" if multiply_adds else "")
        for name, kind, output, parameters, multiply_adds in _group_blocks(cost)
    ]
    console.print_table("", ("layer", "kind", "output", "parameters", "multiply-adds"), rows, right=(2, 3, 4))
    print()
    _print_totals(net, spec, cost)
    return None


def _resolve_specification(
    net: str, changes: dict[str, str], classes: int | None, channels: int | None
) -> tuple[Specification, tuple[int, int] | None]:
    from resnetlab.inference.download import find_trained, get_scheme, load_or_download
    from resnetlab.models.spec import get_specification, parse_changes

    if net.endswith(".safetensors") or get_scheme(net) or find_trained(net) or Path(net).exists():
        if changes or classes is not None or channels is not None:
            raise UsageError(
                "a model file is inspected as it is; --set, --classes and --channels go with a network's name."
            )
        model = load_or_download(net)
        return model.spec, model.preprocessing.size
    sizes = {k: v for k, v in {"classes": classes, "channels": channels}.items() if v is not None}
    return get_specification(net, **(parse_changes(changes) | sizes)), None


def _group_blocks(cost: Cost) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """The layers, with equal blocks of a stage grouped in one row: layer1.1-17.conv1 is 17 layers."""

    def block_name(layer: LayerCost) -> str:
        parts = layer.name.split(".")
        return ".".join(parts[:2]) if parts[0].startswith("layer") else layer.name

    blocks = [(name, list(layers)) for name, layers in groupby(cost.layers, block_name)]

    def group_key(entry: tuple[str, list[LayerCost]]) -> tuple[object, ...]:
        name, layers = entry
        rows = [(layer.name.removeprefix(name), layer.kind, layer.output, layer.parameters) for layer in layers]
        return (name.split(".")[0], *rows)

    for _, group in groupby(blocks, group_key):
        same = list(group)
        first, last = same[0][0], same[-1][0]
        label = first if first == last else f"{first}-{last.rpartition('.')[2]}"
        for layer in same[0][1]:
            name = label + layer.name.removeprefix(first)
            yield name, layer.kind, layer.output, len(same) * layer.parameters, len(same) * layer.multiply_adds


def _print_totals(net: str, spec: Specification, cost: Cost) -> None:
    height, width = cost.image_size
    blocks = f"{spec.block} blocks {'-'.join(map(str, spec.depths))}"
    console.write_line(
        f"{net}: {cost.depth} layers, {blocks}, shortcut {spec.shortcut}, activation order {spec.activation_order}, "
        f"input {height}x{width}"
    )
    console.write_line(f"parameters     {cost.parameters:>15,}{_format_published(cost.paper_parameters, cost.source)}")
    console.write_line(
        f"multiply-adds  {cost.multiply_adds:>15,}{_format_published(cost.paper_multiply_adds, cost.source)}"
    )


def _format_published(figure: float | None, source: str | None) -> str:
    if figure is None:
        return ""
    return f"   ({source}: {figure / 1e9:.1f}e9)" if figure >= 1e9 else f"   ({source}: {figure / 1e6:.3g}M)"
