"""Models are uploaded to a local hub and downloaded unchanged; the card has the file's metadata."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import zygote
from resnetlab.cli.main import run_command
from resnetlab.errors import ModelFileError
from resnetlab.inference import hub
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.train import RunOptions, start_run
from tiny_runs import tiny


def make_model(**changes: Any) -> TrainedModel:
    net = build("resnet8", classes=3, seed=0).eval()
    values = {
        "recipe": {"net": "resnet8", "lr": 0.1, "milestones": [3, 4], "data": "photos"},
        "metrics": {"test": {"top1_error": 0.0417, "n": 1200}, "published": {"top1_error": 0.1}},
        "data": {"name": "/home/me/flowers", "fingerprint": "0"},
        "versions": {"resnetlab": "0.1.0"},
        "temperature": 1.25,
        "calibration": {"data": "flowers", "split": "held_out", "n": 77, "protocol": "1crop"},
    }
    shape = Preprocessing(3, (16, 20), 18, torch.zeros(3), torch.ones(3))
    return TrainedModel(net, ("rose", "<script>|x|", "größe"), shape, **values | changes)


def test_a_folder_is_loaded_unchanged_and_has_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model().save(tmp_path / "model.safetensors")
    assert run_command(["push", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'README.md'}\n"
    again = load_trained_model(tmp_path / "out/model.safetensors")
    assert again.classes == make_model().classes and again.calibration == make_model().calibration
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.net.state_dict().values(), make_model().net.state_dict().values(), strict=True)
    )
    numbers = f"{sum(p.numel() for p in again.net.parameters()):,} parameters"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: resnetlab\n")
    for words in (
        "# resnet8 on flowers", numbers, "16x20 pixels", "| test | 1,200 | 4.17 % |", "divided by 1.25, fitted on 77 images",
        "- milestones: 3, 4", "resnetlab 0.1.0", 'resnetlab.load("hf:OWNER/NAME")', r"\<script\>\|x\|",
    ):  # fmt: skip
        assert words in card, words
    assert "<script>" not in card and "/home/me" not in card


def test_the_card_of_a_model_with_little_metadata() -> None:
    card = hub.make_model_card(make_model(recipe={}, metrics={}, data={}, versions={}, calibration={}), "a/b")
    assert "# residual network" in card and "not calibrated" in card and "It was not evaluated" in card


def test_the_card_of_several_classes_per_image_has_their_figures() -> None:
    metrics = {"test": {"mean_ap": 0.5, "n": 1200}}
    card = hub.make_model_card(make_model(metrics=metrics, thresholds=(0.5,) * 3), "a/b")
    assert "| split | images | mAP |" in card and "| test | 1,200 | 0.500 |" in card and "logits" not in card
    assert "the classes over their thresholds: the highest F1 of each class on 77 images" in card


class Hub:
    """The part of the hub's protocol that upload and download need; files are in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, content: bytes, **headers: str) -> None:
                self.send_response(200)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/api/repos/create":
                    document: Any = {"url": outer.url + "me/flowers"}
                elif "/preupload/" in self.path:
                    document = {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                            for f in json.loads(body)["files"]
                        ]
                    }
                elif "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    for line in lines:
                        if line["key"] == "file":
                            outer.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    document = {
                        "commitUrl": f"{outer.url}me/flowers/commit/{'c' * 40}",
                        "commitOid": "c" * 40,
                        "commitMessage": "x",
                        "success": True,
                    }
                else:
                    document = {}
                self.reply(json.dumps(document).encode(), Content_Type="application/json")

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                if "/resolve/" in self.path and name in outer.files:
                    return self.reply(outer.files[name], ETag=f'"{name}"', X_Repo_Commit="c" * 40)
                if self.path.startswith("/api/"):
                    return self.reply(b'{"id": "me/flowers", "sha": "%s", "siblings": []}' % (b"c" * 40))
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"


@pytest.fixture
def server() -> Iterator[Hub]:
    it = Hub()
    threading.Thread(target=it.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield it
    it.server.shutdown()
    it.server.server_close()


def run(hub: Hub, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own: the hub's library reads its address when it is imported."""
    environment = {"HF_ENDPOINT": hub.url.rstrip("/"), "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_x",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": "/usr/bin:/bin"}  # fmt: skip
    return subprocess.run([zygote.python(), "-c", program], env=environment, cwd=folder, capture_output=True, text=True)


PUSH_AND_IMPORT = """
from resnetlab.cli.main import run_command
assert run_command(["push", "model.safetensors", "hf:me/flowers"]) == 0
assert run_command(["import", "hf:me/flowers", "--out", "again.safetensors"]) == 0
"""


def test_upload_and_download(server: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    make_model().save(tmp_path / "model.safetensors")
    done = run(server, tmp_path, PUSH_AND_IMPORT)
    assert done.returncode == 0, done.stderr
    assert set(server.files) == {"model.safetensors", "README.md"}
    assert 'resnetlab.load("hf:me/flowers")' in server.files["README.md"].decode()
    assert load_trained_model(tmp_path / "again.safetensors").classes == make_model().classes


MIXIN = """
import torch, resnetlab
from pathlib import Path
from resnetlab.models.model_file import load_trained_model
from resnetlab.inference.hub_mixin import HubModel
x = torch.rand(2, 3, 16, 20)
model = HubModel(load_trained_model(Path("model.safetensors"))).eval()
model.save_pretrained("folder")
model.push_to_hub("me/flowers")
for again in (HubModel.from_pretrained("folder"), HubModel.from_pretrained("me/flowers")):
    assert torch.equal(again.eval()(x), model(x)) and again.model.classes == model.model.classes
"""


def test_the_hub_librarys_mixin(server: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    make_model().save(tmp_path / "model.safetensors")
    done = run(server, tmp_path, MIXIN)
    assert done.returncode == 0, done.stderr
    assert set(server.files) == {"model.safetensors", "README.md"}
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["README.md", "model.safetensors"]
    assert 'resnetlab.load("hf:me/flowers")' in server.files["README.md"].decode()


def test_invalid_uploads(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save(tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    for to, words in (
        ("hf:flowers", "'flowers' is not a repository name"),
        ("hf:../x/y", "is not a repository name"),
    ):
        assert run_command(["push", file, to]) == 2
        assert words in capsys.readouterr().err
    assert run_command(["push", file, str(tmp_path / "x"), "--private"]) == 2
    capsys.readouterr()
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(ModelFileError, match=r"me/x could not be pushed \(no network\)"):
        hub.push_to_hub(make_model(), "me/x")


def make_model_with_images() -> TrainedModel:
    check = torch.arange(2 * 16 * 20 * 3).remainder(256).to(torch.uint8).view(2, 16, 20, 3)
    return make_model(reference_images=ReferenceImages(check, torch.tensor([0, 1]), check.flip(0)))


def test_images_do_not_leave_with_a_model_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "out"
    make_model_with_images().save(file)
    images = make_model_with_images().reference_images
    assert images is not None
    pixels = images.check.numpy().tobytes()
    assert pixels in file.read_bytes()
    assert run_command(["push", str(file), str(folder)]) == 0
    err = capsys.readouterr().err
    assert "holds 2 images to check backends on and 2 training images" in err
    assert "they are left out, --with-images shares them too" in err
    assert pixels not in (folder / "model.safetensors").read_bytes()
    assert "The model file holds no images." in (folder / "README.md").read_text()
    assert run_command(["push", str(file), str(folder), "--with-images"]) == 0
    assert pixels in (folder / "model.safetensors").read_bytes()
    assert "holds 2 images to check backends on" in (folder / "README.md").read_text()
    capsys.readouterr()
    assert run_command(["strip", str(file)]) == 0
    printed = capsys.readouterr()
    assert "2 training images, as the network gets them; they are left out." in printed.err
    out = Path(printed.out.strip())
    assert out.name == "model.stripped.safetensors" and pixels not in out.read_bytes()
    stripped = load_trained_model(out)
    assert stripped.reference_images is None and stripped.metrics == make_model().metrics
    for suffix in (".pth", ".safetensors"):
        exported = tmp_path / f"exported{suffix}"
        assert run_command(["export", str(file), "--to", "torchvision", "--out", str(exported)]) == 0
        assert pixels not in exported.read_bytes()
        assert f"2 training images, as the network gets them; {exported} holds none." in capsys.readouterr().err
    assert run_command(["export", str(out), "--to", "torchvision", "--out", str(exported)]) == 0
    assert "images" not in capsys.readouterr().err
    assert run_command(["strip", str(file), "--out", str(file)]) == 2
    assert pixels in file.read_bytes()


def test_a_run_can_keep_no_images(tmp_path: Path) -> None:
    recipe = tiny(steps=1, keep_images=0)
    assert "keep_images" in recipe.to_json() and "keep_images" not in tiny(steps=1).to_json()  # keys of older runs
    result = start_run(recipe, tmp_path / "run", RunOptions(device="cpu"))
    assert load_trained_model(Path(result.model)).reference_images is None
    assert "The model file holds no images." in Path(result.report).read_text()
