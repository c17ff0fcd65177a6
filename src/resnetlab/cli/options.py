"""Options that several commands have, with their help: types for the commands' signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(negative="", help="Print the result as one JSON document.")]
Texts = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=False)]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)]
ModelName = Annotated[
    str, Parameter(help="A model file, a run folder, or a published name such as torchvision:resnet50.IMAGENET1K_V2.")
]
DataDir = Annotated[Path, Parameter(help="Folder of the archives.")]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.")]
Precision = Annotated[str, Parameter(help="fp32, bf16, or auto: bf16 where the hardware computes it.")]
Scales = Annotated[
    str | None,
    Parameter(
        help="Multi-scale testing of a detector (2015, appendix B): shorter sides in pixels, such as 240,300,360; each region "
        "uses the two that suit it best."
    ),
]
Refine = Annotated[bool, Parameter(help="Refine and vote a detector's boxes (2015, appendix B).")]
