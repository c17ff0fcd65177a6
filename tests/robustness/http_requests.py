"""Hostile requests are answered in a sentence or hung up on; good ones between them get the same answer as before.

Whatever the service logs is a failure too: a traceback there is a request that nobody thought of.
"""

from __future__ import annotations

import io
import json
import logging
import random
import socket
import tempfile
from pathlib import Path

from harness import damage, run

from images import photo
from service import ServiceClient, service_in_thread, write_classifier

KINDS = (
    "image/jpeg",
    "image/png",
    "",
    "text/plain",
    "multipart/form-data",
    "multipart/form-data; boundary=XX",
    "a" * 9000,
)
HEADERS = ("content-encoding: gzip", "content-encoding: x", "expect: 100-continue", "transfer-encoding: chunked", "host: evil",
           "content-length: -1", "connection: close", "x: " + "y" * 70_000, "range: bytes=0-1", "x\x01: 1")  # fmt: skip
PATHS = (
    "/predict",
    "/explain",
    "/predict?top=1",
    "/predict?top=x",
    "/model",
    "/metrics",
    "/docs",
    "/healthz",
    "/none",
    "//",
)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    photo(1, 60, 45).save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = jpeg()
PART = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
FORM = b"--XX\r\n" + PART + GOOD + b"\r\n--XX\r\n" + PART + GOOD + b"\r\n--XX--\r\n"


def make_request(draw: random.Random) -> bytes:
    body = draw.choice([GOOD, FORM, b"", b"x" * 100])
    if draw.random() < 0.7:
        body = damage(body, draw)
    head = [f"{draw.choice(['POST', 'POST', 'POST', 'GET', 'HEAD', 'PUT', 'X'])} {draw.choice(PATHS)} HTTP/1.1"]
    head += ["host: localhost", f"content-type: {draw.choice(KINDS)}"]
    head.append(f"content-length: {len(body) if draw.random() < 0.9 else draw.randrange(10**6)}")
    head += draw.sample(HEADERS, draw.choice((0, 0, 0, 1, 2)))
    content = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body
    return damage(content, draw) if draw.random() < 0.3 else content


class Log(logging.Handler):
    """Keeps what the service logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}")


def attack_service(client: ServiceClient, log: Log, expected: object, draw: random.Random) -> str | None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(make_request(draw))
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(2**16):
                answer += chunk
        except (ConnectionError, BrokenPipeError):
            pass
    if answer and not answer.startswith(b"HTTP/1.1 "):
        return f"not an answer: {answer[:60]!r}"
    if answer[9:12] >= b"500" and answer[9:12] != b"503":
        return f"an answer {answer[:300]!r}"
    if log.lines:
        return f"logged (for this request or the one before): {log.lines.pop()}"
    if draw.random() < 0.02 and client.post(GOOD) != expected:
        return "a good request got another answer"
    return None


if __name__ == "__main__":
    with service_in_thread(
        write_classifier(Path(tempfile.mkdtemp(prefix="resnetlab-robustness-")) / "m.safetensors")
    ) as it:
        before = it.post(GOOD)
        assert before[0] == 200, json.dumps(before)
        log = Log()
        run("hostile requests", lambda draw: attack_service(it, log, before, draw), 5000)
