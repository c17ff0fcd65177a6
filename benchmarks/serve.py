#!/usr/bin/env python3
"""Requests per second and latency of the service under a bounded load on loopback, beside its model called directly.

    python benchmarks/serve.py MODEL PICTURE [--seconds 15] [--clients 32] [--requests 0]
        [--engine auto] [--precision auto]

The direct figure is the same engine's on one batch of 16 pictures, ready in memory, again and again in one thread; it and the
service take turns, in rounds. The load is this process, with so many connections, each sending the next request when the last
is answered, one JPEG a request: the service also receives, decodes, resizes and answers. With --requests N, N requests are
sent instead, and the service's memory is printed on the way: it must stay flat.
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
    """One connection that asks until the clock says stop, or until the count is used up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}"
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n".encode()
    while time.perf_counter() < until and count[0] > 0:
        count[0] -= 1
        began = time.perf_counter()
        writer.write(head + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200"), answer
        length = re.search(rb"content-length: (\d+)", answer)
        assert length
        await reader.readexactly(int(length[1]))
        times.append(time.perf_counter() - began)
    writer.close()


async def load(port: int, body: bytes, clients: int, seconds: float, requests: int) -> tuple[float, list[float]]:
    """(seconds, latencies) of a bounded load."""
    times: list[float] = []
    count, began = [requests], time.perf_counter()
    await asyncio.gather(*(client(port, body, began + seconds, count, times) for _ in range(clients)))
    return time.perf_counter() - began, times


def memory(pid: int) -> float:
    """MiB that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def direct(model: str, picture: Path, seconds: float, engine: str, precision: str) -> float:
    """Pictures per second of the engine itself; in a process of its own, which then gives the cores back."""
    program = f"""
import time, torch, residuum
from pathlib import Path
from residuum.data.decode import decode
model = residuum.load({model!r})
model.choose({engine!r}, {precision!r})
pixels = torch.stack([model.preprocessing(decode(Path({str(picture)!r})))] * {BATCH})
for _ in range(3): model.scores(pixels)
n, began = 0, time.perf_counter()
while time.perf_counter() - began < {seconds}:
    model.scores(pixels); n += {BATCH}
print(n / (time.perf_counter() - began))
"""
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "residuum",
        "serve",
        options.model,
        "--port",
        "0",
        "--engine",
        options.engine,
        "--precision",
        options.precision,
    ]
    service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert service.stderr is not None
        print(service.stderr.readline().strip())  # the engine
        address = re.search(r":(\d+)/", service.stderr.readline())
        assert address, service.stderr.read()
        port, body = int(address[1]), options.picture.read_bytes()
        if options.requests:
            for part in range(10):
                asyncio.run(load(port, body, options.clients, 1e9, options.requests // 10))
                print(f"{(part + 1) * options.requests // 10:,} requests: {memory(service.pid):,.1f} MiB", flush=True)
            return
        asyncio.run(load(port, body, options.clients, 2, 10**9))
        for _ in range(options.rounds):
            rate = direct(options.model, options.picture, options.seconds / 2, options.engine, options.precision)
            seconds, times = asyncio.run(load(port, body, options.clients, options.seconds, 10**9))
            served = len(times) / seconds
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            print(
                f"direct {rate:,.1f} pictures/s; served {served:,.1f} requests/s ({served / rate:.1%}), "
                f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, n = {len(times):,}, {memory(service.pid):,.0f} MiB",
                flush=True,
            )
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    main()
