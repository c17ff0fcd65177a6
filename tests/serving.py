"""A service in a process of its own, for tests that ask it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from residuum.models.bundle import Bundle
from residuum.models.resnet import build
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


class Running:
    """A service, and the folder that it runs in."""

    def __init__(self, process: subprocess.Popen[str], port: int, folder: Path, engine: str) -> None:
        self.process, self.port, self.folder, self.engine = process, port, folder, engine

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
