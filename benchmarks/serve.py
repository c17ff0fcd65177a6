#!/usr/bin/env python3
"""Requests per second and latency of the service on loopback, compared with its model called directly.

    python benchmarks/serve.py MODEL IMAGE [--seconds 15] [--clients 32] [--requests 0]
        [--backend auto] [--precision auto]

The direct rate is that of the same backend on a batch of 16 prepared images, repeated in one thread; direct and served rounds
alternate. The load comes from this process: every client has one connection and sends the next request, one JPEG, when the
previous one is answered, so the service also receives, decodes, resizes and answers. With --requests N, N requests are sent
instead and the service's memory is printed repeatedly; it must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 16


async def client(port: int, body: bytes, until: float, count: list[int], times: list[float]) -> None:
    """One connection that sends requests until the time is over or the count is used up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}"
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\n\r\n".encode()
    while time.perf_counter() < until and count[0] > 0:
        count[0] -= 1
        start = time.perf_counter()
        writer.write(head + body)
        response = await reader.readuntil(b"\r\n\r\n")
        assert response.startswith(b"HTTP/1.1 200"), response
        length = re.search(rb"content-length: (\d+)", response)
        assert length
        await reader.readexactly(int(length[1]))
        times.append(time.perf_counter() - start)
    writer.close()


async def run_load(port: int, body: bytes, clients: int, seconds: float, requests: int) -> tuple[float, list[float]]:
    """(seconds, latencies) of a load that is limited by time and number of requests."""
    times: list[float] = []
    count, start = [requests], time.perf_counter()
    await asyncio.gather(*(client(port, body, start + seconds, count, times) for _ in range(clients)))
    return time.perf_counter() - start, times


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def measure_direct(model: str, image: Path, seconds: float, backend: str, precision: str) -> float:
    """Images per second of the backend itself, in a process of its own."""
    program = f"""
import time, torch, resnetlab
from pathlib import Path
from resnetlab.data.decode import decode
model = resnetlab.load({model!r})
model.select_backend({backend!r}, {precision!r})
pixels = torch.stack([model.preprocessing(decode(Path({str(image)!r})))] * {BATCH})
for _ in range(3): model.predict_scores(pixels)
n, start = 0, time.perf_counter()
while time.perf_counter() - start < {seconds}:
    model.predict_scores(pixels); n += {BATCH}
print(n / (time.perf_counter() - start))
"""
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("image", type=Path)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "resnetlab",
        "serve",
        options.model,
        "--port",
        "0",
        "--backend",
        options.backend,
        "--precision",
        options.precision,
    ]
    service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert service.stderr is not None
        lines = []
        while not (lines and (address := re.search(r":(\d+)/", lines[-1]))):  # after what it says of its backend
            lines.append(service.stderr.readline())
            assert lines[-1], "the service ended"
            print(lines[-1].strip(), flush=True)
        port, body = int(address[1]), options.image.read_bytes()
        if options.requests:
            for part in range(10):
                asyncio.run(run_load(port, body, options.clients, 1e9, options.requests // 10))
                print(f"{(part + 1) * options.requests // 10:,} requests: {memory(service.pid):,.1f} MiB", flush=True)
            return
        asyncio.run(run_load(port, body, options.clients, 2, 10**9))
        for _ in range(options.rounds):
            rate = measure_direct(options.model, options.image, options.seconds / 2, options.backend, options.precision)
            seconds, times = asyncio.run(run_load(port, body, options.clients, options.seconds, 10**9))
            served = len(times) / seconds
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            print(
                f"direct {rate:,.1f} images/s; served {served:,.1f} requests/s ({served / rate:.1%}), "
                f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, n = {len(times):,}, {memory(service.pid):,.0f} MiB",
                flush=True,
            )
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    main()
