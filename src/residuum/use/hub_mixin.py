"""A model as the hub's own library has models: `save_pretrained`, `from_pretrained` and `push_to_hub` of its mixin.

    from residuum.use.hub_mixin import HubModel
    model = HubModel.from_pretrained("me/flowers")   # also a folder, a revision, …
    HubModel(residuum.load("runs/photos/model.safetensors")).push_to_hub("me/flowers")

What travels is the model file and its card, as with `residuum push`. Needs the extra `hub`, and is imported by nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from residuum.models.bundle import Bundle, load_bundle
from residuum.use import hub


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="residuum"):
    """The network of a model file, which takes normalised pictures (B, C, h, w) and gives logits (B, classes).

    Attributes:
        bundle: all that is in the file: classes, preprocessing, temperature, ….
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.bundle, self.net, self._name = bundle, bundle.net, "OWNER/NAME"
        self._hub_mixin_config = None  # no config.json: the model file says all of itself

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As the mixin's, with a card that names the repository."""
        self._name = repo_id
        return str(super().push_to_hub(repo_id, **options))

    def _save_pretrained(self, save_directory: Path) -> None:
        hub.save_pretrained(self.bundle, save_directory, self._name)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        """Raises ModelFileError where the file is damaged or foreign, and the hub's own errors where there is none."""
        if Path(model_id).is_dir():
            return cls(hub.from_pretrained(Path(model_id)))
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        file = hf_hub_download(model_id, "model.safetensors", **{name: options[name] for name in names})
        return cls(load_bundle(Path(file)))
