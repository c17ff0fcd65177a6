"""What the scripts in this folder share: the command line, random damage, and the count of failures.

    python tests/robustness/images.py --n 5000

Each script prints how many faults it made, and every one that ended otherwise than it should: it exits with 1 if there is one.
The n-th fault of a seed is always the same, so a failure is repeated with --seed SEED --first N --n 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

Attack = Callable[[random.Random], "str | None"]  # makes one fault; returns what went wrong, or None


def damage(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to three random changes: flipped bits, other bytes, a part that is missing, doubled or moved."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        if not data:
            break
        at = draw.randrange(len(data))
        length = min(len(data) - at, draw.choice((1, 2, 4, 16, 256, len(data))))
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at : at + length] = bytes([draw.choice((0, 255, 127, 128))]) * length
        else:
            other = draw.randrange(len(data))
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def run(what: str, attack: Attack, default: int) -> None:
    """Makes the faults that the command line asks for; prints their number and the failures."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--n", type=int, default=default, help="how many faults")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, failures = time.monotonic(), 0
    for i in range(options.first, options.first + options.n):
        try:
            wrong = attack(random.Random(f"{options.seed}/{i}"))
        except Exception:
            wrong = traceback.format_exc()
        if wrong:
            failures += 1
            print(f"{what} {i} (seed {options.seed}): {wrong}", flush=True)
    print(f"{what}: n = {options.n:,}, failures {failures:,}, {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failures > 0)
