"""A service in a process of its own, for tests that ask it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from residuum.models.bundle import Bundle
from residuum.models.dense_file import DenseBundle
from residuum.models.dense_file import build as build_dense
from residuum.models.resnet import build
from residuum.models.spec import specification
from residuum.models.values import Dense, Detector, Segmenter
from residuum.preprocessing import Preprocessing

CLASSES = ("alpha", "größe ß", "红 花", "<img src=x onerror=alert(1)>", "e", "f")


def small_model(path: Path) -> Path:
    """Writes a model of six classes, of which one has a hostile name."""
    net = build("resnet8", classes=6, seed=0).eval()
    about = {"recipe": {"net": "resnet8"}, "data": {"name": "/secret/place/photos", "fingerprint": "0"}}
    Bundle(
        net, CLASSES, Preprocessing(3, (32, 32), 36, torch.full((3,), 0.5), torch.full((3,), 0.25)), 1.5, **about
    ).save(path)
    return path


class Asked:
    """A service on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, body: bytes, kind: str = "image/jpeg", path: str = "/predict") -> tuple[int, Any]:
        status, _, content = self.ask("POST", path, body, {"content-type": kind})
        return status, json.loads(content)


class Running(Asked):
    """A service in a process, and the folder that it runs in."""

    def __init__(self, process: subprocess.Popen[str], port: int, folder: Path, engine: str) -> None:
        super().__init__(port)
        self.process, self.folder, self.engine = process, folder, engine


@contextmanager
def threaded(model: Path) -> Iterator[Asked]:
    """The service of a model in a thread of this process, for what does not need one of its own."""
    import uvicorn

    from residuum.use.serve.answering import load
    from residuum.use.serve.app import make_app
    from residuum.use.serve.limits import Limits
    from residuum.use.serve.service import Service

    app = make_app(Service(load(str(model), "torch", "fp32", "cpu")[0], Limits()))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield Asked(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


@contextmanager
def service(model: Path, folder: Path, *options: str) -> Iterator[Running]:
    """The command in a process of its own, on a free port; it must end well."""
    arguments = [sys.executable, "-m", "residuum", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        engine, line = process.stderr.readline(), process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert address and engine.startswith("engine: "), engine + line + process.stderr.read()
        yield Running(process, int(address[1]), folder, engine.removeprefix("engine: "))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # Ctrl-C is an end without noise
        assert process.wait(60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


DENSE = {"longest": 128, "mean": (0.5,) * 3, "std": (0.25,) * 3, "bn": "live", "frozen": ""}
KINDS: dict[str, tuple[Dense, tuple[str, ...]]] = {
    "detect": (
        Detector(size=72, form="fpn", anchors=(8, 16, 32, 64, 128), context=False, pyramid=16, **DENSE),
        ("<b>round", "square"),
    ),
    "segment": (Segmenter(size=72, head="fcn", output_stride=16, **DENSE), ("background", "<b>round", "square")),
}


def small_dense(path: Path, task: str) -> Path:
    """Writes a detector that is sure of many a box, or a segmenter that sees all its classes; neither has learnt anything."""
    values, classes = KINDS[task]
    small: dict[str, Any] = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    net = build_dense(build("resnet18", seed=0, **small), values, len(classes), seed=1)
    about = {"recipe": {"net": "resnet18"}, "data": {"name": "/secret/place/cells", "fingerprint": "0"}}
    if isinstance(values, Detector):
        cast(Any, net).roi_heads.box_predictor.cls_score.bias.data[:] = torch.tensor([0.0, 2.0, 1.8])
    DenseBundle(task, net.eval(), specification("resnet18", **small | {"classes": 1}), values, classes, **about).save(
        path
    )
    return path
