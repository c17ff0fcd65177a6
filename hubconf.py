"""Entry points for torch.hub: torch.hub.load("OWNER/REPOSITORY", "resnet50", pretrained=True).

Each network of `resnetlab.list_models` is one; resnet50v1.5 is called resnet50v1_5. The arguments are those of
`resnetlab.build`.
"""

import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "numpy", "PIL", "safetensors"]
sys.path.insert(0, str(Path(__file__).parent / "src"))  # torch.hub takes the repository, not the installed package

import resnetlab  # noqa: E402


def _entry_point(name):
    def entry(**options):
        return resnetlab.build(name, **options)

    entry.__name__ = name.replace(".", "_")
    entry.__doc__ = f"{name}; the arguments are those of resnetlab.build."
    return entry


globals().update({name.replace(".", "_"): _entry_point(name) for name in resnetlab.list_models()})
