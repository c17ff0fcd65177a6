"""Services for tests, in a process of their own or in a thread of this one."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

import zygote
from resnetlab.models.annotated_model import AnnotatedModel
from resnetlab.models.annotated_model import build_annotated_net as build_annotated
from resnetlab.models.head_spec import DetectorSpec, HeadSpec, SegmenterSpec
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.models.spec import get_specification
from resnetlab.preprocessing import Preprocessing

CLASSES = ("alpha", "größe ß", "红 花", "<img src=x onerror=alert(1)>", "e", "f")


def write_classifier(path: Path) -> Path:
    """Writes a classifier with six classes, one of them with a hostile name."""
    net = build("resnet8", classes=6, seed=0).eval()
    about = {"recipe": {"net": "resnet8"}, "data": {"name": "/secret/place/photos", "fingerprint": "0"}}
    TrainedModel(
        net, CLASSES, Preprocessing(3, (32, 32), 36, torch.full((3,), 0.5), torch.full((3,), 0.25)), 1.5, **about
    ).save(path)
    return path


class ServiceClient:
    """A client of a service on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, body: bytes, kind: str = "image/jpeg", path: str = "/predict") -> tuple[int, Any]:
        status, _, content = self.request("POST", path, body, {"content-type": kind})
        return status, json.loads(content)


class RunningService(ServiceClient):
    """A service in a process of its own, and the folder it runs in."""

    def __init__(self, process: subprocess.Popen[str], port: int, folder: Path, backend: str) -> None:
        super().__init__(port)
        self.process, self.folder, self.backend = process, folder, backend


@contextmanager
def service_in_thread(model: Path, **limits: int) -> Iterator[ServiceClient]:
    """A service in a thread of this process."""
    import uvicorn

    from resnetlab.serve.app import make_app
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.models import load_served_model
    from resnetlab.serve.process import _protocol_with_limits
    from resnetlab.serve.service import Service

    app = make_app(Service(load_served_model(str(model), "torch", "fp32", "cpu")[0], Limits(**limits)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http=_protocol_with_limits(30)))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield ServiceClient(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


@contextmanager
def service_process(model: Path, folder: Path, *options: str) -> Iterator[RunningService]:
    """`resnetlab serve` on a free port; it must exit with 0."""
    arguments = [zygote.python(), "-m", "resnetlab", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        backend, line = process.stderr.readline(), process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert address and backend.startswith("backend: "), backend + line + process.stderr.read()
        yield RunningService(process, int(address[1]), folder, backend.removeprefix("backend: "))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # Ctrl-C prints nothing
        assert process.wait(60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


HEAD = {"longest": 128, "mean": (0.5,) * 3, "std": (0.25,) * 3, "bn": "live", "frozen": ""}
HEADS: dict[str, tuple[HeadSpec, tuple[str, ...]]] = {
    "detect": (
        DetectorSpec(image_size=72, form="fpn", anchors=(8, 16, 32, 64, 128), context=False, pyramid=16, **HEAD),
        ("<b>round", "square"),
    ),
    "segment": (
        SegmenterSpec(image_size=72, head="fcn", output_stride=16, **HEAD),
        ("background", "<b>round", "square"),
    ),
}


def write_annotated_model(path: Path, task: str) -> Path:
    """Writes an untrained detector with many boxes of high scores, or an untrained segmenter that predicts all its classes."""
    values, classes = HEADS[task]
    small: dict[str, Any] = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    net = build_annotated(build("resnet18", seed=0, **small), values, len(classes), seed=1)
    about = {"recipe": {"net": "resnet18"}, "data": {"name": "/secret/place/cells", "fingerprint": "0"}}
    if isinstance(values, DetectorSpec):
        cast(Any, net).roi_heads.box_predictor.cls_score.bias.data[:] = torch.tensor([0.0, 2.0, 1.8])
    AnnotatedModel(
        task, net.eval(), get_specification("resnet18", **small | {"classes": 1}), values, classes, **about
    ).save(path)
    return path
