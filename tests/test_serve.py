"""The service in a process of its own on loopback: good requests and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import http.client
import io
import json
import logging
import random
import re
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from PIL import Image

from images import photo, png_bomb
from resnetlab.cli import serve as cli_serve
from resnetlab.cli.main import run_command
from resnetlab.inference.predict import load
from service import CLASSES, RunningService, service_in_thread, service_process, write_classifier

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import uvicorn
from fastapi import FastAPI

from resnetlab.serve import process, uploads
from resnetlab.serve.batching import Batcher
from resnetlab.serve.models import load_served_model

CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]
LIMITS = ("--max-body-mb", "1", "--max-pixels", "1000000", "--timeout", "4", "--max-in-flight", "8")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def running(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """With a given backend, checked against a folder of images."""
    images, backend = tmp_path_factory.mktemp("images"), ("--backend", "torch", "--precision", "fp32")
    for i in range(4):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    with service_process(
        model_file, tmp_path_factory.mktemp("service"), *LIMITS, *backend, "--images", str(images)
    ) as it:
        assert it.backend.startswith("torch fp32 (as requested; top-1 agrees on 100.0%") and "2 reference" in it.backend
        yield it
        assert list(it.folder.iterdir()) == []  # nothing was written by any request


def jpeg(seed: int = 1, width: int = 60, height: int = 45) -> bytes:
    buffer = io.BytesIO()
    photo(seed, width, height).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def form(parts: list[tuple[str, str, bytes]]) -> tuple[bytes, str]:
    """A multipart body of (field, file name, content), and its content type."""
    body = b"".join(
        f'--XX\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'.encode()
        + b"Content-Type: image/jpeg\r\n\r\n"
        + content
        + b"\r\n"
        for field, name, content in parts
    )
    return body + b"--XX--\r\n", "multipart/form-data; boundary=XX"


def sentence(content: Any) -> str:
    """The one sentence of an error."""
    assert list(content) == ["error"]
    text = content["error"]
    assert "Traceback" not in text and "\n" not in text and len(text) < 400
    return str(text)


def still_up(running: RunningService) -> None:
    assert [running.request("GET", path)[0] for path in ("/healthz", "/health")] == [200, 200]
    assert running.post(jpeg())[0] == 200


def test_predictions_equal_the_models(running: RunningService, model_file: Path) -> None:
    model = load(model_file)
    status, answer = running.post(jpeg(3), path="/predict?top=2")
    assert status == 200
    (prediction,) = answer["predictions"]
    expected = model.predict(jpeg(3), top=2).to_json()["top"]
    assert [each["class"] for each in prediction["top"]] == [each["class"] for each in expected]
    assert [each["score"] for each in prediction["top"]] == pytest.approx(
        [each["score"] for each in expected], abs=1e-5
    )


def test_many_images_of_a_form_keep_their_order(running: RunningService, model_file: Path) -> None:
    model = load(model_file)
    body, kind = form([("image", f"{i}.jpg", jpeg(i)) for i in range(5)])
    status, answer = running.post(body, kind)
    assert status == 200
    for i, prediction in enumerate(answer["predictions"]):
        assert prediction["image"] == f"{i}.jpg"
        assert prediction["top"][0]["score"] == pytest.approx(model.predict(jpeg(i)).top[0][1], abs=1e-5)


def test_one_bad_image_among_good_ones_is_a_row_with_its_error(running: RunningService) -> None:
    body, kind = form([("image", "a.jpg", jpeg()), ("image", "b.jpg", b"text"), ("image", "c.jpg", jpeg())])
    status, answer = running.post(body, kind)
    assert status == 200
    good, bad, other = answer["predictions"]
    assert good["top"] == other["top"] and set(bad) == {"image", "error"} and "not an image" in bad["error"]
    body, kind = form([("image", "b.jpg", b"text"), ("image", "c.jpg", b"")])
    assert running.post(body, kind)[0] == 415


def test_explanations_have_every_block_and_a_heat_map(running: RunningService) -> None:
    status, answer = running.post(jpeg(), path="/explain?top=3")
    assert status == 200
    assert [each["block"] for each in answer["blocks"]] == ["layer1.0", "layer2.0", "layer3.0"]
    assert all(each["ratio"] > 0 and 0 <= each["score_without"] <= 1 for each in answer["blocks"])
    predicted = running.post(jpeg(), path="/predict?top=3")[1]["predictions"][0]["top"]
    assert [each["class"] for each in answer["top"]] == [each["class"] for each in predicted]
    assert [each["score"] for each in answer["top"]] == pytest.approx([e["score"] for e in predicted], abs=1e-5)
    from base64 import b64decode

    with Image.open(io.BytesIO(b64decode(answer["heat"].removeprefix("data:image/png;base64,")))) as heat:
        assert heat.format == "PNG" and min(heat.size) >= 256
    body, kind = form([("image", "a", jpeg()), ("image", "b", jpeg())])
    assert running.post(body, kind, "/explain")[0] == 422
    assert running.post(b"text", "image/png", "/explain")[0] == 415


def test_the_model_is_described_without_paths_of_the_machine(running: RunningService) -> None:
    status, _, content = running.request("GET", "/model")
    about = json.loads(content)
    assert status == 200 and about["classes"] == list(CLASSES) and about["name"] == "resnet8 on photos"
    assert about["limits"]["body_bytes"] == 1_000_000 and not about["calibrated"]
    assert about["backend"] == "torch fp32"


def test_every_key_is_documented(running: RunningService) -> None:
    known = (
        (Path(__file__).parents[1] / "docs" / "json.md").read_text().split("## `resnetlab serve`")[1].split("\n## ")[0]
    )
    about = json.loads(running.request("GET", "/model")[2])
    explained = running.post(jpeg(), path="/explain")[1]
    metrics = re.findall(
        r"^# TYPE (\w+) (?!gauge)|^# TYPE (resnetlab_in_flight) ", running.request("GET", "/metrics")[2].decode(), re.M
    )
    names = {name or other for name, other in metrics}
    for key in [*about, *about["limits"], *explained, *(name for name in names if not name.endswith("_created"))]:
        assert f"`{key}`" in known, key


def test_metrics_count(running: RunningService) -> None:
    def value(name: str) -> float:
        text = running.request("GET", "/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before, failed = value("resnetlab_images_total"), value('resnetlab_requests_total{path="/predict",status="415"}')
    running.post(jpeg())
    running.post(b"text", "text/plain")
    assert value("resnetlab_images_total") == before + 1
    assert value('resnetlab_requests_total{path="/predict",status="415"}') == failed + 1
    assert value("resnetlab_in_flight") == 0
    assert running.request("GET", "/metrics")[1]["content-type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/", "/docs", "/page.css", "/page.js", "/views.js", "/style.css", "/openapi.json"])
def test_pages_load_nothing_from_elsewhere(running: RunningService, path: str) -> None:
    status, headers, content = running.request("GET", path)
    assert status == 200
    policy = headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and headers["x-content-type-options"] == "nosniff"
    )
    for address in re.findall(rb"https?://[^\s\"'<&]+", content):
        assert address.startswith(b"http://THIS-ADDRESS")
    if path == "/docs":
        assert all(word in content.decode() for word in ("POST /predict", "GET /metrics", "multipart/form-data", "429"))
        assert content.count(b"-F image=@two.png") == 1  # one image is explained at a time


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch hacked) (w) file\nshowpage\n%%EOF\n"
BAD = {
    "text": (b"just text", "image/png", 415, "not an image"),
    "text as text": (b"just text", "text/plain", 415, "text/plain is not an image type"),
    "json": (b"{}", "application/json", 415, "send image/jpeg"),
    "nothing": (b"", "image/jpeg", 400, "the body is empty"),
    "cut short": (jpeg()[: len(jpeg()) // 2], "image/jpeg", 422, "damaged"),
    "cut in its header": (png(9, 9)[:20], "image/png", 422, "damaged"),
    "a bomb": (png_bomb(40_000), "image/png", 413, "more than 1,000,000 pixels"),
    "many pixels": (png(1001, 1000), "image/png", 413, "more than 1,000,000"),
    "postscript": (POSTSCRIPT, "image/jpeg", 415, "not an image"),
    "a large body": (b"x" * 1_000_001, "image/jpeg", 413, "larger than 1 MB"),
    "no boundary": (b"abc", "multipart/form-data", 400, "form cannot be read"),
    "no form": (b"abc", "multipart/form-data; boundary=XX", 400, "form"),
    "an empty form": (b"--XX--\r\n", "multipart/form-data; boundary=XX", 422, "contains no image"),
    "a form cut short": (form([("image", "a", jpeg())])[0][:-20], "multipart/form-data; boundary=XX", 400, "cut short"),
    "a field without a file": (b'--XX\r\nContent-Disposition: form-data; name="top"\r\n\r\n3\r\n--XX--\r\n',
                               "multipart/form-data; boundary=XX", 422, "address, as /predict?top=3"),
    "an encoded part": (form([("image", "a", b"")])[0].replace(b"image/jpeg", b"x\r\nContent-Transfer-Encoding: base64"),
                        "multipart/form-data; boundary=XX", 415, "send its bytes as they are"),
    "a long head": (b"--XX\r\nx: " + b"y" * 20_000 + b"\r\n\r\n\r\n--XX--", "multipart/form-data; boundary=XX", 400, "head"),
    "an empty part": (*form([("image", "a", b"")]), 400, "the image is empty"),
    "too many parts": (*form([("image", "a", b"x")] * 65), 413, "64 images"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/predict", "/explain"])
@pytest.mark.parametrize(("body", "kind", "status", "words"), BAD.values(), ids=BAD)
def test_bad_bodies_get_their_status_and_a_sentence(
    running: RunningService, body: bytes, kind: str, status: int, words: str, path: str
) -> None:
    found, content = running.post(body, kind, path)
    assert (found, words in sentence(content)) == (status, True), content
    still_up(running)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "nothing at this address"),
        ("GET", "/predict", 405, "GET is not supported"),
        ("POST", "/healthz", 405, "POST is not supported"),
        ("POST", "/predict?top=many", 422, "top must be a whole number from 1 to 1,000,000, not 'many'."),
        ("POST", "/predict?top=1&top=x", 422, "top must be a whole number from 1 to 1,000,000, not 'x'."),
        ("POST", "/predict?tpo=3", 422, "tpo"),
        ("POST", "/predict?topk=3", 422, "did you mean 'top'?"),
        ("POST", "/predict?conf=0.3", 422, "did you mean 'min_score'?"),
        ("POST", "/predict?min_score=abc", 422, "min_score must be a number from 0 to 1, not 'abc'."),
        ("POST", "/predict?score=2", 422, "score must be a number from 0 to 1, not '2'."),
        ("POST", "/explain?top=0", 422, "top must be a whole number"),
        ("GET", "/model?x=1", 422, "x"),
        ("GET", "/../../etc/passwd", 404, "nothing"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, "nothing"),
    ],
)
def test_bad_addresses_get_a_sentence(running: RunningService, method: str, path: str, status: int, words: str) -> None:
    found, _, content = running.request(
        method, path, jpeg() if method == "POST" else None, {"content-type": "image/jpeg"}
    )
    assert found == status and words in sentence(json.loads(content))


@pytest.mark.parametrize(
    ("path", "status", "headers"),
    [("/predict/", 404, {}), ("/", 405, {}), ("/predict?tpo=3", 422, {}), ("/predict", 421, {"host": "evil.example"})],
)
def test_a_body_that_no_route_reads_is_read_before_the_answer(
    running: RunningService, path: str, status: int, headers: dict[str, str]
) -> None:
    """Else the connection of a proxy closes while it writes, which nginx answers with 502 in place of the sentence."""
    asked = {"content-type": "image/jpeg", "connection": "close", **headers}  # as nginx asks
    found, _, content = running.request("POST", path, bytes(4_000_000), asked)
    assert found == status and sentence(json.loads(content))


def test_an_image_of_one_pixel_is_accepted(running: RunningService) -> None:
    assert running.post(png(1, 1), "image/png")[0] == 200
    for kind in ("application/octet-stream", "application/x-www-form-urlencoded"):  # as curl --data-binary says
        assert running.post(png(1, 1), kind, "/explain")[0] == 200
    assert running.post(png(20_000, 1), "image/png")[0] == 200


def test_avif_as_browsers_save_it_is_accepted(running: RunningService) -> None:
    buffer = io.BytesIO()
    photo(1, 40, 30).save(buffer, "AVIF")
    assert running.post(buffer.getvalue(), "image/avif")[0] == 200


@pytest.mark.parametrize(
    "name", ["../../../tmp/hacked.png", "/etc/passwd", "C:\\\\x.png", "a\x01b", "😀" * 300, "<b>x</b>"]
)
def test_file_names_are_only_echoed(running: RunningService, name: str) -> None:
    status, answer = running.post(*form([("image", name, jpeg())]))
    assert status == 200 and len(answer["predictions"][0]["image"]) <= 200
    assert not Path("/tmp/hacked.png").exists()


def test_a_hundred_megabytes_are_not_kept(running: RunningService) -> None:
    """Neither when they are declared, nor when they come piece by piece."""

    def memory() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{running.process.pid}/status").read_text())[1])  # type: ignore[index]

    before = memory()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        link.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 100000000\r\n\r\n"
        )
        assert b" 413 " in link.recv(4096)
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        link.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(1600):
                link.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # it hung up, which is allowed
        else:
            pytest.fail("it read all of it")
    assert memory() - before < 40_000  # kB
    still_up(running)


@pytest.mark.parametrize(("others", "length", "status"), [(0, 500, 413), (16 * 100 - 60, 100, 429)])
def test_a_refused_body_is_read_to_its_end_but_not_buffered(others: int, length: int, status: int) -> None:
    """So its sender gets the reason; bodies of other requests may have filled the buffer too."""
    from starlette.requests import Request

    from resnetlab.serve.limits import Limits, RequestError, RequestGate

    gate, left, held = RequestGate(Limits(max_body=100)), [bytes(50)] * (length // 50), []
    gate.buffered = others

    async def receive() -> dict[str, Any]:
        held.append(gate.buffered)
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    async def ask() -> None:
        head = [(b"content-length", str(length).encode())]
        async with gate.read_body(Request({"type": "http", "headers": head}, receive)):
            pytest.fail("it was admitted")

    with pytest.raises(RequestError) as refused:
        asyncio.run(ask())
    assert (refused.value.status, refused.value.hang_up, left, gate.buffered) == (status, False, [], others)
    assert max(held) == (others if status == 413 else others + 50)


CHUNKED = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000,
        CHUNKED + b"1;" + b"a" * 500_000,
        CHUNKED + b"1\r\na\r\n0\r\nX: " + b"a" * 500_000,
    ],
    ids=["a header", "an address", "headers", "a chunk's extension", "a trailer"],
)
def test_a_head_without_end_is_refused(sent: bytes, running: RunningService) -> None:
    """The parser would keep all of it."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        with contextlib.suppress(ConnectionError):  # it hangs up before all is sent
            link.sendall(sent)
        answer = link.recv(4096)
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")) and answer.count(b"HTTP/1.1") == 1, answer


def test_a_body_in_many_small_chunks_is_read(running: RunningService) -> None:
    """The limit is for what is kept beside a body, not for all that is sent beside one."""
    content = io.BytesIO()
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000)).save(content, "PNG")
    body = content.getvalue()
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        for i in range(0, len(body), 4):
            link.sendall((CHUNKED if i == 0 else b"") + b"%x\r\n%b\r\n" % (len(body[i : i + 4]), body[i : i + 4]))
        link.sendall(b"0\r\n\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 200 ")


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def post_image(headers: bytes) -> bytes:
    body = jpeg()
    return b"POST /predict HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b" % (headers, len(body), body)


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (post_image(H2C) + GET, [200, 200]),
        ((post_image(H2C) + GET.replace(b"\r\n\r\n", b"\r\n" + H2C + b"\r\n")) * 2, [200, 200, 200, 200]),
        (CHUNKED.replace(b"\r\n\r\n", b"\r\n" + H2C + b"\r\n") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(jpeg()), jpeg()), [200]),
        (CHUNKED + b"%x\r\n%b\r\n0\r\nContent-Encoding: br\r\n\r\n" % (len(jpeg()), jpeg()) + GET, [200, 200]),
        (CHUNKED.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n" + GET, [400]),
        (GET.replace(b"Host: localhost\r\n", b""), [400]),
        (GET.replace(b"Host", b"Host: localhost\r\nhost"), [400]),
        (GET.replace(b"HTTP/1.1\r\nHost: localhost\r\n", b"HTTP/1.0\r\n"), [200]),
        (GET.replace(b"GET", b"CONNECT") + GET, [400]),
        (GET.replace(b"localhost", b"localhost\r\nX: " + b"a" * 66_000), [431]),
        (GET.replace(b"localhost", b"localhost\r\nX: " + b"a" * 60_000), [200]),
        (post_image(b"") + GET + b"no request\r\n\r\n" + GET, [200, 200, 400]),
        (post_image(b"") + CHUNKED + b"--XX\r\n", [200, 400]),
        (post_image(b"") + CHUNKED + b"--XX\r\n" + b"a" * 70_000, [200, 400]),
        (GET + GET.replace(b"/healthz", b"/" + b"a" * 66_000), [200, 431]),
    ],
)  # fmt: skip
def test_each_request_of_a_connection_gets_its_own_answer(
    sent: bytes, statuses: list[int], running: RunningService
) -> None:
    """Also one that offers another protocol, as Java's client does, and those before one that is refused."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        link.sendall(sent)
        answer = b""
        while answer.count(b"HTTP/1.1 ") < len(statuses) or statuses[-1] in (400, 431):
            read = b""
            with contextlib.suppress(ConnectionResetError):  # it hangs up before it has read all
                answer += (read := link.recv(65_536))
            if not read:
                break
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)] == statuses, answer


@pytest.mark.parametrize("method", ["POST", "HEAD", "X"])
def test_a_body_that_is_not_http_is_answered_once_and_logs_nothing(
    method: str, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn answers 400 beside the answer in progress, and logs a traceback for each of the two."""
    logged: list[object] = []
    for name in ("uvicorn.error", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "error", lambda *values, **_: logged.append(values))
    with service_in_thread(model_file) as it:
        answer = b""
        with socket.create_connection(("127.0.0.1", it.port), timeout=60) as link:
            head = f"{method} /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
            link.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n--XX\r\n")
            while chunk := link.recv(4096):
                answer += chunk
        assert it.request("GET", "/healthz")[0] == 200
    assert answer.count(b"HTTP/1.1 ") == 1 and b" 400 " in answer and b"not a valid HTTP request" in answer
    assert logged == []


def test_a_body_that_never_ends_times_out(running: RunningService) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
        link.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
        )
        assert b" 408 " in link.recv(4096)


def test_a_hundred_slow_clients_do_not_keep_others_waiting(running: RunningService) -> None:
    links = [socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(100)]
    try:
        for i, link in enumerate(links):
            link.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            if i % 2:  # half of them stop in the middle of the body, half in the middle of the header
                link.sendall(b"Content-Length: 1000\r\n\r\nabc")
        still_up(running)
        answers = [link.recv(4096) for link in links]
        assert [answer[9:12] for answer in answers] == [b"408"] * 100
        assert "head did not arrive within 4 seconds" in sentence(json.loads(answers[0].partition(b"\r\n\r\n")[2]))
        assert links[0].recv(1) == b""  # and it has hung up
    finally:
        for link in links:
            link.close()
    still_up(running)


def test_memory_stays_flat(running: RunningService) -> None:
    """A short version; 10,000 requests are in docs/log.md."""

    def ask(requests: int) -> int:
        link = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        for i in range(requests):
            link.request("POST", "/predict", jpeg(i % 7), {"content-type": "image/jpeg"})
            assert link.getresponse().read()
        link.close()
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{running.process.pid}/status").read_text())
        assert found
        return int(found[1])

    before = ask(200)
    assert ask(300) - before < 6_000  # kB; 20 kB a request would not pass


def test_clients_that_hang_up_leave_nothing_behind(running: RunningService) -> None:
    for cut in (10, len(jpeg())):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", running.port), timeout=60) as link:
                head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
                head += f"Content-Length: {len(jpeg())}\r\n\r\n"
                link.sendall(head.encode() + jpeg()[:cut])
    while b"resnetlab_in_flight 0.0" not in running.request("GET", "/metrics")[2]:
        pass
    still_up(running)


def test_an_answer_that_takes_too_long_times_out(model_file: Path) -> None:
    """A model that works for seconds, in this process."""
    from fastapi.testclient import TestClient

    from resnetlab.serve.app import make_app
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.models import ServedClassifier
    from resnetlab.serve.service import Service

    held = threading.Event()

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        held.wait(60)
        raise MemoryError("a backend's own message")

    app = make_app(Service(ServedClassifier(load(model_file), scores), Limits(timeout=0.3)))
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/predict", content=jpeg(), headers={"content-type": "image/jpeg"})
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert "0.3 seconds" in sentence(answer.json())
        held.set()
        answer = client.post("/predict", content=jpeg(), headers={"content-type": "image/jpeg"})
        assert answer.status_code == 500 and sentence(answer.json()) == "the service failed; its log says why."
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/healthz").status_code == 200


def test_decoding_stops_when_the_request_timed_out(model_file: Path) -> None:
    """Otherwise a form of 64 large images would block a thread for minutes after its 503."""
    from fastapi.testclient import TestClient

    from resnetlab.serve.app import make_app
    from resnetlab.serve.limits import Limits
    from resnetlab.serve.models import ServedClassifier
    from resnetlab.serve.service import Service

    held, served = threading.Event(), ServedClassifier(load(model_file))
    prepared: list[Image.Image] = []

    def prepare(image: Image.Image) -> torch.Tensor:
        prepared.append(image)
        held.wait(60)
        return served.model.preprocessing(image)

    served.prepare = prepare
    with TestClient(make_app(Service(served, Limits(timeout=0.2)))) as client:
        body, kind = form([("image", f"{i}.jpg", jpeg(i)) for i in range(5)])
        assert client.post("/predict", content=body, headers={"content-type": kind}).status_code == 503
        held.set()
    assert len(prepared) <= 1  # the threads have ended; none where the machine was so busy that not even one was begun


def test_memory_of_large_images_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library would keep it; memory of smaller images is reused."""
    from resnetlab.serve import uploads
    from resnetlab.serve.limits import Limits

    given: list[torch.device] = []
    monkeypatch.setattr(uploads, "release_memory", given.append)
    monkeypatch.setattr(uploads, "LARGE", 1000)
    for side, times in ((30, 0), (40, 1)):
        assert uploads.decode_uploads("image/png", png(side, side), lambda image: image, Limits())[0].error is None
        assert len(given) == times


def test_full_collections_skip_objects_from_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn
    from fastapi import FastAPI

    from resnetlab.serve.process import run_server

    frozen: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    run_server(FastAPI(), "127.0.0.1", 0, 1.0, lambda address: None)
    assert frozen[0] > 10_000 and gc.get_freeze_count() == 0


def test_requests_are_batched_too_many_are_refused_and_sigterm_finishes_the_rest(
    model_file: Path, tmp_path: Path
) -> None:
    """With a long latency, requests are in flight until it has passed."""
    options = ("--latency-ms", "2500", "--max-in-flight", "4")
    with service_process(model_file, tmp_path, *options) as it, ThreadPoolExecutor(4) as pool:
        assert [status for status, _ in pool.map(lambda i: it.post(jpeg(i)), range(4))] == [200] * 4
        text = it.request("GET", "/metrics")[2].decode()
        batches = re.search(r"^resnetlab_batch_images_count (\S+)$", text, re.MULTILINE)
        assert "resnetlab_images_total 4.0" in text and batches and float(batches[1]) < 4

        waiting = [
            pool.submit(it.request, "POST", "/predict", jpeg(i), {"content-type": "image/jpeg"}) for i in range(4)
        ]
        while b"resnetlab_in_flight 4.0" not in it.request("GET", "/metrics")[2]:
            pass
        status, headers, content = it.request("POST", "/predict", jpeg(), {"content-type": "image/jpeg"})
        assert (status, headers["retry-after"]) == (429, "1") and "4 requests" in sentence(json.loads(content))

        it.process.send_signal(signal.SIGTERM)
        for each in waiting:
            status, headers, _ = each.result()
            assert (status, headers["connection"]) == (
                200,
                "close",
            )  # otherwise the client sends its next request in vain
        assert it.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            it.request("GET", "/healthz")


def test_wrong_options_are_refused(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "70000"], "--port must be between"),
            (["--host", "192.0.2.1"], "cannot listen on"),
            (["--max-batch", "0"], "--max-batch must be above 0"),
            (["--timeout", "nan"], "--timeout must be above 0"),
            (["--latency-ms", "-1"], "--latency-ms must be between"),
            (["--backend", "opnvino"], "unknown backend 'opnvino'; did you mean 'openvino'?"),
        ):
            assert run_command(["serve", str(model_file), *arguments]) == 2
            assert words in capsys.readouterr().err
    assert run_command(["serve", str(model_file), "--images", "nowhere"]) == 1
    assert "nowhere is not a folder; --images takes a folder of images." in capsys.readouterr().err


def schema(port: int) -> Any:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")


def test_answers_are_as_the_openapi_document_says(running: RunningService) -> None:
    """Schemathesis makes requests from the document, right ones and wrong ones; the answers must be what it promises."""
    from hypothesis import HealthCheck, given, settings

    for operation in (each.ok() for each in schema(running.port).get_all_operations()):
        modes = list(schemathesis.GenerationMode)
        for mode in modes if operation.method == "post" else modes[:1]:  # to the others nothing wrong can be sent

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
            )
            def answers(case: Any) -> None:
                case.call_and_validate(checks=CHECKS)

            answers()
    still_up(running)


@pytest.mark.parametrize("field", ["image", "file", "picture", "any name"])
def test_a_file_in_a_field_of_any_name_is_an_image(running: RunningService, field: str) -> None:
    status, answer = running.post(*form([(field, "a.jpg", jpeg())]))
    assert status == 200 and answer["predictions"][0]["image"] == "a.jpg"


def test_names_that_are_not_ascii_are_kept_however_they_are_sent(running: RunningService) -> None:
    body, kind = form([("image", name, jpeg()) for name in ("été.jpg", "x")])
    body = body.replace(b'filename="x"', b"filename*=utf-8''hiv%C3%A9r.jpg")
    status, answer = running.post(body, kind)
    assert (status, [row["image"] for row in answer["predictions"]]) == (200, ["été.jpg", "hivér.jpg"])


def test_packed_bodies_are_unpacked_within_the_limit(running: RunningService) -> None:
    def send(body: bytes, encoding: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"content-type": "image/jpeg", "content-encoding": encoding}
        return running.request("POST", "/predict", body, headers)

    plain = running.post(jpeg())[1]
    for packed, encoding in ((gzip.compress(jpeg()), "gzip"), (zlib.compress(jpeg()), "deflate"), (jpeg(), "identity")):
        status, _, content = send(packed, encoding)
        assert (status, json.loads(content)) == (200, plain)
    status, headers, content = send(jpeg(), "br")
    assert (
        status == 415
        and "content encoding br" in sentence(json.loads(content))
        and "gzip" in headers["accept-encoding"]
    )
    for body, status, words in (
        (gzip.compress(bytes(10**8)), 413, "unpacked body is larger than 1 MB"),
        (gzip.compress(jpeg())[:-9], 400, "cut short"),
        (gzip.compress(jpeg()) + gzip.compress(jpeg()), 400, "goes on after its end"),
        (jpeg(), 400, "is not gzip"),
    ):
        found, _, content = send(body, "gzip")
        assert found == status and words in sentence(json.loads(content))


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz", "/metrics", "/model", "/openapi.json", "/page.js"])
def test_head_is_answered_wherever_get_is(running: RunningService, path: str) -> None:
    status, headers, content = running.request("HEAD", path)
    assert (status, content) == (200, b"") and int(headers["content-length"]) > 0


def test_all_addresses_are_relative_so_that_a_proxy_may_serve_them_below_a_path(running: RunningService) -> None:
    for path in ("/", "/docs", "/page.js", "/views.js"):
        text = running.request("GET", path)[2].decode()
        assert not re.search(r"""(?:href=|src=|fetch\(|post\(|path: )["']/""", text), path
    assert json.loads(running.request("GET", "/openapi.json")[2])["servers"] == [{"url": "."}]
    status, headers, _ = running.request("POST", "/predict/", jpeg(), {"content-type": "image/jpeg"})
    assert status == 404 and "location" not in headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", ""])
def test_names_that_are_not_the_services_are_refused(running: RunningService, host: str) -> None:
    status, _, content = running.request("GET", "/model", headers={"host": host})
    assert status in (400, 421) and b"classes" not in content
    for name in ("localhost", "LOCALHOST:80", f"127.0.0.1:{running.port}", "[::1]:8000", "192.168.1.2"):
        assert running.request("GET", "/model", headers={"host": name})[0] == 200


def test_an_empty_host_is_refused_and_other_names_can_be_allowed(
    model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["serve", str(model_file), "--host", ""]) == 2
    assert "--host is empty; 127.0.0.1 is this machine" in capsys.readouterr().err
    assert cli_serve._find_host_names("0.0.0.0", ()) == ()
    assert "vision.example" in cli_serve._find_host_names("0.0.0.0", ("vision.example",))
    assert "localhost" in cli_serve._find_host_names("::1", ())


def test_hostile_forms_take_no_time() -> None:
    """A parser that looks at single bytes holds Python's lock for seconds, and every other request waits."""
    lines = 0

    def count_lines(*_: object) -> Callable[..., Any]:
        nonlocal lines
        lines += 1
        return count_lines

    before = sys.gettrace()
    for content in (b"\r\n" * 5_000_000, b"\r\n--X" * 2_000_000, b"\r" * 10_000_000):
        body, kind = form([("image", "a", content)])
        try:
            sys.settrace(count_lines)
            parts = uploads.split_body(kind, body)
        finally:
            sys.settrace(before)
        assert parts == [("a", content)]
    assert 0 < lines < 3000, lines


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_CONNECTIONS", 2)
    protocol = process._protocol_with_limits(30)
    written: list[bytes] = []

    class Transport:
        def get_extra_info(self, *_: object) -> None:
            return None

        def write(self, content: bytes) -> None:
            written.append(content)

        def close(self) -> None:
            written.append(b"closed")

        is_closing = close

    async def connect(n: int) -> None:
        config = uvicorn.Config(FastAPI(), http=protocol)  # type: ignore[arg-type]
        config.load()
        state = uvicorn.server.ServerState()
        for _ in range(n):
            made = protocol(config=config, server_state=state, app_state={})  # type: ignore[call-arg]
            made.connection_made(Transport())  # type: ignore[arg-type]

    asyncio.run(connect(2))
    assert not written
    asyncio.run(connect(3))
    assert (
        written[0].startswith(b"HTTP/1.1 503 ") and b"2 connections are open" in written[0] and written[1] == b"closed"
    )


def test_as_many_batches_are_computed_at_once_as_the_backend_can(model_file: Path) -> None:
    """Each takes what has arrived: two batches at a time must not share a single batch's images."""
    meeting = threading.Barrier(2)
    sizes: list[int] = []

    def predict(images: Sequence[int]) -> list[int]:
        sizes.append(len(images))
        meeting.wait(60)  # fails if the second batch starts after the first one
        return [2 * image for image in images]

    async def work() -> list[list[int]]:
        async with Batcher(predict, 60, 4, at_once=2) as batcher:
            return await asyncio.gather(*(batcher.predict([i]) for i in range(8)))

    assert asyncio.run(work()) == [[2 * i] for i in range(8)] and sizes == [4, 4]
    served = [load_served_model(str(model_file), backend, "fp32", "cpu")[0] for backend in ("torch", "openvino")]
    assert [each.batches_at_once for each in served] == [1, 2]


def test_an_answer_depends_on_its_batch_mates_by_rounding_only(model_file: Path) -> None:
    """The bound that docs/security.md states, for fp32."""
    served = load_served_model(str(model_file), "torch", "fp32", "cpu")[0]
    images = [served.prepare(photo(i, 40, 40)) for i in range(16)]
    alone = torch.stack([served.predict([image])[0] for image in images])
    for n in (2, 3, 7, 16):
        together = torch.stack(list(served.predict(images[:n])))
        assert float((together - alone[:n]).abs().max()) < 1e-5
