"""Latency of good requests, sent at a steady rate to `resnetlab serve`, before, during and after hostile ones at full speed.

    python tests/robustness/latency.py --rate 10 --seconds 30 --clients 2

A request is due at its time whether or not those before it have been answered, and its latency counts from then, so a service
that stands still is seen by all requests that fall into that time. Every hundredth hostile request is a form of 10 MB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import harness  # noqa: F401 - finds the tests' modules
from http_requests import GOOD, make_request

from service import RunningService, service_process, write_classifier

BODY = b"--XX\r\ncontent-disposition: form-data; name=image; filename=a\r\n\r\n" + b"\r\n--X" * 2_000_000
LARGE = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=XX\r\n"
LARGE += b"content-length: %d\r\n\r\n" % len(BODY) + BODY


def attack(port: int, seed: int, sent: Synchronized[int]) -> None:
    """Sends hostile requests, one after the other, until the process is ended."""
    draw = random.Random(seed)
    while True:
        content = LARGE if draw.random() < 0.01 else make_request(draw)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):
                    pass
        except OSError:
            pass
        with sent.get_lock():
            sent.value += 1


def measure(service: RunningService, rate: float, seconds: float) -> tuple[list[float], int]:
    """Latencies of good requests in seconds, sorted, and how many were not answered with 200."""
    start = time.monotonic() + 0.1

    def send(i: int) -> tuple[float, bool]:
        due = start + i / rate
        time.sleep(max(0.0, due - time.monotonic()))
        status, _ = service.post(GOOD)
        return time.monotonic() - due, status == 200

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(send, range(round(rate * seconds))))
    return sorted(latency for latency, _ in answers), sum(not good for _, good in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=10, help="good requests in a second")
    parser.add_argument("--seconds", type=float, default=30, help="of each of the three times")
    parser.add_argument("--clients", type=int, default=2, help="hostile clients, each a process")
    parser.add_argument("--model", type=Path, help="a classifier; without it a ResNet-8 for 32 pixels")
    options, context, refused = parser.parse_args(), multiprocessing.get_context("spawn"), 0
    sent = context.Value("l", 0)
    folder = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
    model = (options.model or write_classifier(folder / "m.safetensors")).resolve()
    with service_process(model, folder, "--backend", "torch", "--precision", "fp32") as service:
        service.post(GOOD)
        for clients in (0, options.clients, 0):
            before = sent.value
            attackers = [context.Process(target=attack, args=(service.port, i, sent)) for i in range(clients)]
            for each in attackers:
                each.start()
            while attackers and sent.value < before + 20 * clients:
                time.sleep(0.1)
            began, before = time.monotonic(), sent.value
            found, wrong = measure(service, options.rate, options.seconds)
            hostile = (sent.value - before) / (time.monotonic() - began)
            for each in attackers:
                each.kill()
            p50, p99 = statistics.median(found), found[int(0.99 * len(found))]
            print(
                f"{clients} hostile clients, {hostile:.0f} requests/s: n = {len(found):,} good ones, p50 {1e3 * p50:.1f} ms, "
                f"p99 {1e3 * p99:.1f} ms, largest {1e3 * found[-1]:.1f} ms, refused {wrong}",
                flush=True,
            )
            refused += wrong
    sys.exit(refused > 0)


if __name__ == "__main__":
    main()
