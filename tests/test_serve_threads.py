"""The service's threads, and what of a body waits for them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

import zygote
from resnetlab.serve.batching import Batcher
from resnetlab.serve.http_protocol import READ_AHEAD, HttpProtocol
from resnetlab.serve.limits import append_part
from resnetlab.serve.priority import interrupt_nobody
from resnetlab.serve.process import run_server
from service import service_process, write_classifier
from shard_files import jpeg

linux = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="other systems have no such policy")


def policy(thread: int = 0) -> int:
    return os.sched_getscheduler(thread)


@linux
def test_the_network_interrupts_the_services_other_threads_and_not_the_reverse() -> None:
    """New threads inherit the policy of the one that starts them, but those of the network."""
    found: dict[str, int] = {}

    def predict(images: Sequence[int]) -> Sequence[int]:
        found["network"] = policy()
        return images

    async def work() -> None:
        async with Batcher(predict, 0, 1) as batcher:
            await batcher.predict([0])

    def serve() -> None:  # in a thread, since a failure would leave its policy changed
        with interrupt_nobody():
            found["own"] = policy()
            with ThreadPoolExecutor(1) as decoders:
                found["decoder"] = decoders.submit(policy).result()
            asyncio.run(work())
        found["afterwards"] = policy()

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(60)
    batch, other = os.SCHED_BATCH, os.SCHED_OTHER
    assert found == {"own": batch, "decoder": batch, "network": other, "afterwards": other}


@linux
@pytest.mark.parametrize("refusal", [PermissionError, OSError])
def test_a_sandbox_that_refuses_a_policy_is_no_error(refusal: type[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getscheduler", "sched_setscheduler"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, Mock(side_effect=refusal))
            with interrupt_nobody():
                pass


@linux
def test_a_policy_of_the_callers_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda thread: os.SCHED_IDLE)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("it is changed"))
    with interrupt_nobody():
        pass


@linux
def test_a_server_has_the_policy_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: found.append(policy()))
    run_server(FastAPI(), "127.0.0.1", 0, 1.0, lambda address: None)
    assert [*found, policy()] == [os.SCHED_BATCH, os.SCHED_OTHER]


@linux
def test_the_threads_of_a_real_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's and the decoders', by Linux; those of the network are as usual."""
    monkeypatch.setattr(zygote, "python", lambda: sys.executable)  # so that the process is the service's own
    with service_process(write_classifier(tmp_path / "model.safetensors"), tmp_path) as running:
        assert running.post(jpeg(1))[0] == 200
        pid = running.process.pid
        policies = [policy(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]
    assert policies.count(os.SCHED_BATCH) >= 2 and os.SCHED_OTHER in policies


def test_no_more_of_a_body_is_read_than_the_service_takes() -> None:
    """The kernel then tells the client to wait. What has been read reaches the service whole, in order."""
    body = bytes(range(256)) * (4 * READ_AHEAD // 256)
    parts = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
    received: list[bytes] = []

    async def work() -> None:
        begin, done = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await begin.wait()
            more = True
            while more:
                message = await receive()
                more = message["more_body"]
                received.append(message["body"])
            done.set()
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

        transport = Mock(is_closing=lambda: False, get_extra_info=lambda name: None)
        protocol = HttpProtocol(uvicorn.Config(app, log_level="error"), ServerState(), {})
        protocol.connection_made(transport)
        protocol.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
        for count, part in enumerate(parts, 1):
            protocol.data_received(part)
            assert transport.pause_reading.called == (50_000 * count > READ_AHEAD)
            if transport.pause_reading.called and not begin.is_set():
                transport.resume_reading.assert_not_called()
                begin.set()
                while not received:
                    await asyncio.sleep(0)
                transport.resume_reading.assert_called_once()
                transport.reset_mock()
                break
        for part in parts[count:]:
            protocol.data_received(part)
            await asyncio.sleep(0)
        await asyncio.wait_for(done.wait(), 60)

    asyncio.run(work())
    assert b"".join(received) == body


def test_one_part_of_a_body_is_not_copied_and_many_are_not_copied_again_and_again() -> None:
    parts = [bytes([i]) * 1000 for i in range(4)]
    assert append_part(append_part(b"", parts[0]), b"") == append_part(bytearray(), parts[0]) == parts[0]
    assert append_part(b"", parts[0]) is parts[0]
    body = two = append_part(parts[0], parts[1])
    for part in parts[2:]:
        body = append_part(body, part)
    assert body is two and bytes(body) == b"".join(parts) and parts[0] == bytes(1000)
