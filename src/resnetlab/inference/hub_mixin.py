"""A model with the mixin of the hub's library: `save_pretrained`, `from_pretrained` and `push_to_hub`.

    from resnetlab.inference.hub_mixin import HubModel
    model = HubModel.from_pretrained("me/flowers")   # also a folder, a revision, …
    HubModel(resnetlab.load("runs/photos/model.safetensors")).push_to_hub("me/flowers")

It uploads the model file and its card, as `resnetlab push` does. Needs the extra `hub`; no other module imports it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from resnetlab.inference import hub
from resnetlab.models.model_file import TrainedModel, load_trained_model


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="resnetlab"):
    """The network of a model file: normalised images (B, C, h, w) -> logits (B, classes).

    Attributes:
        model: the file's contents: classes, preprocessing, temperature, ….
    """

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.model, self.net, self._name, self._card = model, model.net, "OWNER/NAME", True
        self._hub_mixin_config = None  # no config.json: the model file has the configuration

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Like the mixin's, with a card that names the repository, unless a README.md of another hand is there."""
        self._name, self._card = repo_id, hub.may_write_card(repo_id, options.get("token"))
        return str(super().push_to_hub(repo_id, **options))

    def _save_pretrained(self, save_directory: Path) -> None:
        hub.save_pretrained(self.model, save_directory, self._name, self._card)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubModel:
        """Raises ModelFileError if the file is damaged or foreign, and the hub's errors if it cannot be downloaded."""
        if Path(model_id).is_dir():
            return cls(load_trained_model(Path(model_id) / "model.safetensors"))
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        file = hf_hub_download(model_id, "model.safetensors", **{name: options[name] for name in names})
        return cls(load_trained_model(Path(file)))
